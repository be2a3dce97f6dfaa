"""Every figure that takes a GPU, most valuable first, within a time that is given.

    python -m benchmarks.gpu --json FILE [--minutes 25] [--device cpu] [--layers 28 …]

`benchmarks/gpu.sh` calls it, and says what it needs. Each part has a process of its own, which is
killed when it takes too long. Each row is appended to FILE as soon as it is there, and one that is
there is not taken again: the same command goes on where the last one ended. To take a row again,
delete its line. `--device cpu` rehearses everything with a tiny model.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks import gpu_parts
from benchmarks.gpu_parts import MATRIX_RATE, PACKAGES, REGIMES, TINY, Found, Shapes
from benchmarks.rows import Row, append, figures, machine, show

T = TypeVar("T")

# On a CPU all processes are forked from one that has imported these. CUDA allows no such thing.
_PRELOADED = ["benchmarks.gpu_parts", "transformers.models.qwen2.modeling_qwen2", "trainer.learner"]


class Figure(NamedTuple):
    """One row of a part."""

    what: str
    unit: str
    lower_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured in one process, and the rows that come of it."""

    name: str
    figures: Sequence[Figure]
    work: Callable[..., list[Found]]
    arguments: tuple[Any, ...] = ()
    limit_s: float = 240.0
    package: str = ""  # without which there is nothing to measure

    @property
    def rows(self) -> list[str]:
        """The names of its rows."""
        return [f"gpu: {self.name}{f', {one.what}' * bool(one.what)}" for one in self.figures]


def parts(shapes: Shapes) -> Iterator[Part]:
    """All of them, in the order of their value."""
    yield Part("tests", [Figure("passed", "tests")], gpu_parts.kernel_tests)
    rate = MATRIX_RATE.removeprefix("gpu: ")
    yield Part(rate, [Figure("", "TFLOP/s")], gpu_parts.matrix_rate)
    step = [
        Figure("share of the matrix rate", "peer: the goal"),
        Figure("time of a step", "ms", True),
        Figure("memory at most", "GiB", True),
    ]
    for budget in (shapes.small_pack, shapes.large_pack):
        for regime in REGIMES:
            name = f"{regime}, packed to {budget:,} tokens"
            yield Part(name, step, gpu_parts.utilisation, (regime, budget))
    head = [Figure("memory", "GiB", True), Figure("time", "ms", True)]
    for name in gpu_parts.CONTESTANTS:
        package = PACKAGES.get(name, "")
        yield Part(f"log-probs, {name}", head, gpu_parts.head, (name,), package=package)
    way = [Figure("time", "s", True), Figure("rate", "GB/s, peer: assumed")]
    yield Part("weights off the device", way, gpu_parts.weights_off_the_device)
    rate_of = [Figure("", "tokens/s")]
    yield Part("sampling with transformers", rate_of, gpu_parts.sampling)
    yield Part("scoring with transformers", rate_of, gpu_parts.scoring)
    run = [
        Figure("time of a step", "s", True),
        Figure("sampled", "tokens/s"),
        Figure("right answers", "share, peer: the first step's"),
    ]
    yield Part("a small model's whole loop", run, gpu_parts.loop)


def take(shapes: Shapes, todo: Iterator[Part], file: Path, minutes: float) -> list[str]:
    """Measures what `file` does not have and appends it there; gives what went wrong."""
    end, known, troubles = time.monotonic() + 60 * minutes, figures(file), []
    for part in todo:
        missing = [name for name in part.rows if name not in known]
        if not missing:
            continue
        left = end - time.monotonic()
        try:
            found, why = measured(part, shapes, known, min(left, part.limit_s))
        except TimeoutError:
            if left < part.limit_s:  # next time it may have more
                troubles.append(f"no time was left for {part.name}")
                continue
            found, why = None, f"killed after {part.limit_s:g} s"
        if why and why != NOT_INSTALLED:
            troubles.append(f"{part.name}: {why}")
        for row in rows_of(part, found, why):
            if row.name in missing:
                append(row, file)
                known[row.name] = row.ours
                print(show([row]), flush=True)
    return troubles


NOT_INSTALLED = "not installed"


def measured(
    part: Part, shapes: Shapes, known: gpu_parts.Known, limit_s: float
) -> tuple[list[Found] | None, str]:
    """See `apart`."""
    if part.package and not importlib.util.find_spec(part.package):
        return None, NOT_INSTALLED
    method = "forkserver" if shapes.device == "cpu" else "spawn"
    return apart(part.work, shapes, known, *part.arguments, limit_s=limit_s, method=method)


def rows_of(part: Part, found: list[Found] | None, why: str) -> list[Row]:
    """A part's rows; without figures where nothing was found, and why not."""
    each = found or [Found(None, None, why)] * len(part.figures)
    return [
        Row(name, one.ours, one.peer, figure.unit, machine(), figure.lower_is_better, one.note)
        for name, figure, one in zip(part.rows, part.figures, each, strict=True)
    ]


def apart(
    work: Callable[..., T], *arguments: Any, limit_s: float, method: str = "spawn"
) -> tuple[T | None, str]:
    """What the work gives in a process of its own, or None and why: what it raised, or that the
    process died. A device that one part has broken is broken for its process only.

    Raises:
        TimeoutError: it did not end in time, and was killed.
    """
    context: Any = get_context(method)
    context.set_forkserver_preload(_PRELOADED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, arguments))
    if limit_s <= 0:
        raise TimeoutError
    process.start()
    there.close()  # so that the end of the other process is seen
    try:
        if not here.poll(limit_s):
            raise TimeoutError
        answer: tuple[T | None, str] = here.recv()
        return answer
    except EOFError:
        process.join()
        return None, f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _answer(there: Connection, work: Callable[..., T], arguments: Sequence[Any]) -> None:
    try:
        there.send((work(*arguments), ""))
    except Exception as error:  # whatever it is stands in the row
        lines = str(error).strip().splitlines() or [""]
        there.send((None, f"{type(error).__name__}: {lines[0]}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="after which nothing runs")
    for shape in fields(Shapes):
        option = "--" + shape.name.replace("_", "-")
        parser.add_argument(option, type=type(getattr(TINY, shape.name)))
    options = vars(parser.parse_args())
    file, minutes = options.pop("json"), options.pop("minutes")
    usual = TINY if options["device"] == "cpu" else Shapes()
    shapes = replace(usual, **{name: one for name, one in options.items() if one is not None})
    if troubles := take(shapes, parts(shapes), file, minutes):
        raise SystemExit("gpu: not all well: " + "; ".join(troubles))


if __name__ == "__main__":
    main()
