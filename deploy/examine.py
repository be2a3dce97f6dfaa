"""`scope eval`: a model's accuracy on a run's rollout and verifier workers, without a learner.

settings.json   what is evaluated; a folder holds one evaluation
tallies.jsonl   one line a prompt, written as soon as it is verified: where a second call goes on
evaluation.json the result
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from deploy.cluster import start_ray
from deploy.config import ConfigError, EvaluationConfig, RunConfig
from deploy.crew import Crew
from deploy.evaluate import Result, Score, Tally, evaluate
from deploy.roles import roles, settings
from rollout.benchmarks import BENCHMARKS, convert
from rollout.config import DataConfig
from rollout.own_weights import OwnWeights
from rollout.prompts import PromptSource, load_rows
from rollout.sources import DataError
from services.models import ModelError, fingerprint, load_tokenizer
from services.pipeline import EVAL
from services.redis_server import EmbeddedRedis, resolve_url
from services.stage import Connection
from services.tasks import beside

_WATCH_S = 0.5


@dataclass(frozen=True)
class Examination:
    """One evaluation, prepared: what is asked, and what was answered before."""

    config: RunConfig
    model: str
    source: PromptSource
    count: int  # only the first so many of its prompts
    out: Path
    finished: tuple[Tally, ...]

    async def run(self, console: Console) -> Result:
        """Evaluates what is left, and writes the result.

        Raises:
            EvaluationStalled, WorkerFailed: see `evaluate` and `Crew.revive`.
        """
        left = self._left()
        if left:
            async with AsyncExitStack() as stack:
                connection = self._start(stack, console)
                async with connection.streams(EVAL) as streams:
                    await streams.create()
                crew = Crew(connection, console.print)
                stack.push_async_callback(crew.stop)
                for role in roles(self.config, EVAL):
                    crew.staff(role, settings(self.config, role, OwnWeights(self.model), {}))
                await beside(self._evaluate(connection, left, console), _look_after(crew))
        result = Result(0, tuple(sorted(_tallies(self.out), key=lambda t: t.id)))
        result.write(self.out, "result")
        return result

    def _left(self) -> list[int]:
        known = {tally.id for tally in self.finished}
        return [o for o in range(self.count) if self.source.prompt(o).id not in known]

    def _start(self, stack: AsyncExitStack, console: Console) -> Connection:
        url = resolve_url(self.config.redis)
        if url is None:
            server = EmbeddedRedis(Path(stack.enter_context(TemporaryDirectory(prefix="scope-"))))
            server.start()
            stack.callback(server.stop)
            url = server.url
        quiet = self.config.ray.model_copy(update={"dashboard": False})
        start_ray(quiet, f"scope-{self.config.name}-eval", console.print)
        stack.callback(ray.shutdown)
        # A name of its own: what an interrupted evaluation left behind belongs to nobody.
        run = f"{self.config.name}-eval-{secrets.token_hex(4)}"
        return Connection(url, run, self.config.stage, self.config.pipeline)

    async def _evaluate(self, connection: Connection, left: list[int], console: Console) -> None:
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with (
            Progress(*columns, console=console) as progress,
            (self.out / "tallies.jsonl").open("a", buffering=1, encoding="utf-8") as file,
        ):
            bar = progress.add_task("prompts", total=self.count)
            progress.advance(bar, len(self.finished))

            def done(tally: Tally) -> None:
                file.write(json.dumps(asdict(tally)) + "\n")
                progress.advance(bar)

            timeout_s = self.config.evaluation.timeout_s if self.config.evaluation else 3600.0
            await evaluate(connection, self.source, left, version=0, timeout_s=timeout_s, done=done)


def prepare(
    config: RunConfig, model: str, *, k: int, benchmarks: Mapping[str, Path], out: Path
) -> Examination:
    """Checks what is asked, and finds what `out` has of it.

    Args:
        config: of rollout, verifier and sampling; its `evaluation.data` is evaluated where no
            benchmarks are named.
        model: a Hugging Face directory or hub name.
        k: samples of each prompt.
        benchmarks: file of each benchmark of `rollout.benchmarks`.
        out: the evaluation's folder.

    Raises:
        ConfigError: it cannot be evaluated, or `out` holds something else.
    """
    held = config.evaluation
    if held is None and not benchmarks:
        raise ConfigError("name benchmarks, or give the config an `evaluation` section")
    sampling = (held.sampling if held else config.sampling).model_copy(update={"n": k})
    out.mkdir(parents=True, exist_ok=True)
    try:
        if local := Path(model).expanduser().is_dir():
            model = str(Path(model).expanduser().resolve())
        data = _benchmark_data(benchmarks, config, out) if benchmarks else _own_data(held)
        source = PromptSource(
            load_rows(data, load_tokenizer(model), environment=config.environment),
            sampling,
            seed=config.seed + 1,
            data=data,
        )
        count = len(source)
        if held and held.prompts and not benchmarks:
            count = min(count, held.prompts)
        asked = {
            "model": fingerprint(model).model if local else model,
            "data": [str(file) for file in data.files],
            "prompts": count,
            "sampling": sampling.model_dump(),
            "seed": config.seed,
        }
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    _same_or_new(out / "settings.json", asked)
    kinds = {name: BENCHMARKS[name].kind for name in benchmarks} | config.verifier.kinds
    verifier = config.verifier.model_validate(config.verifier.model_dump() | {"kinds": kinds})
    # What is sampled from is the model in question, whatever the run trains.
    config = config.model_copy(update={"verifier": verifier, "student": model})
    return Examination(config, model, source, count, out, tuple(_tallies(out)))


def _own_data(held: EvaluationConfig | None) -> DataConfig:
    assert held is not None
    return held.data.in_order()


def _benchmark_data(benchmarks: Mapping[str, Path], config: RunConfig, out: Path) -> DataConfig:
    """The benchmarks' files in this project's columns, in `out`, where they can be looked at."""
    files = []
    for name, file in benchmarks.items():
        rows = convert(name, file)
        files.append(out / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    longest = (config.evaluation.data if config.evaluation else config.data).max_prompt_tokens
    return DataConfig(path=tuple(map(str, files)), max_prompt_tokens=longest, shuffle=False)


def _same_or_new(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name, value in settings.items() if before.get(name) != value]
    if different:
        raise ConfigError(
            f"{file.parent} holds another evaluation: {', '.join(different)} differ; choose "
            f"another folder with --out"
        )


def _tallies(out: Path) -> list[Tally]:
    """What is finished; a line that a crash tore is left out, and its prompt asked again."""
    file = out / "tallies.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("}\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [Tally(**json.loads(line)) for line in whole]


async def _look_after(crew: Crew) -> None:
    """Until cancelled: starts dead workers again."""
    while True:
        await asyncio.sleep(_WATCH_S)
        crew.revive()


def table(result: Result) -> Table:
    """The scores, one row a data source."""
    k = result.score.k
    made = Table(title="accuracy, with 95% intervals")
    for heading in ("", f"Avg@{k}", f"Pass@{k}", "bootstrap", "prompts", "truncated", "unknown"):
        made.add_column(heading, justify="right")
    rows: dict[str, Score] = dict(result.by_source)
    if len(rows) > 1:
        rows["all"] = result.score
    for source, s in rows.items():
        made.add_row(
            source, str(s.avg_at_k), str(s.pass_at_k), str(s.pass_at_k_bootstrap),
            str(s.prompts), str(s.truncated), str(s.unknown),
        )  # fmt: skip
    return made
