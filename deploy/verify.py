"""`scope verify`: judges a file from the shell, for people who tune a verifier."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from services.errors import RunFailed
from services.trajectory import Verdict
from verifier.config import CodeConfig, VerifierConfig
from verifier.judges import Judges

_SLOWEST = 0.99
_PATIENCE_S = 3.0  # for so long a verdict waits for those of the lines before it
_AHEAD = 8  # lines that are read for each that is judged
_OURS = ("completion", "reference", "data_source")


class BadRow(RunFailed):
    """The file or the kind is not to be judged. The message says why."""


@dataclass(frozen=True, slots=True)
class _Row:
    completion: str
    reference: str
    data_source: str


def verify_file(
    file: Path, config: VerifierConfig | None, kind: str, answer_from: str | None = None
) -> None:
    """Judges `file` (`-` is standard input) to standard output, by `config` or else by one kind
    on every core.

    Raises:
        BadRow: the file cannot be read, or there is no such kind.
    """
    try:
        cores = len(os.sched_getaffinity(0))
        code = CodeConfig(programs=cores)
        used = config or VerifierConfig(kind=kind, judges=cores, code=code)
        if answer_from is not None:
            settings = {**used.model_dump(), "answer_from": answer_from}
            used = VerifierConfig.model_validate(settings)
    except ValidationError as error:
        if "answer_from" in str(error):
            raise BadRow(
                f"`{answer_from}` is no place of an answer: use boxed, hashes or final_line"
            ) from None
        raise BadRow(
            f"`{kind}` is not a kind of verifier: use exact, math, code or package.module:function"
        ) from None
    try:
        if str(file) == "-":
            verify(sys.stdin, sys.stdout, used)
            return
        with file.open(encoding="utf-8") as source:
            verify(source, sys.stdout, used)
    except (OSError, UnicodeDecodeError) as error:
        raise BadRow(f"{file}: {error}") from error


def verify(source: Iterable[str], target: IO[str], config: VerifierConfig) -> None:
    """Judges JSONL (`completion`, `reference`, `data_source`) into JSONL.

    Each line of `target` has the row's other keys and `line`, `verdict`, `reason` and `seconds`
    (of judging alone). A line that is no row is `unknown`, with an `error`; a number as reference
    is taken as its text. Verdicts come in the order of the lines as they are made, and one that
    takes long comes later. Blank lines are passed over. The summary goes to standard error.
    """
    asyncio.run(_verify(source, _Output(target), config))


class _Output:
    """Lines in their order, but for those that take long."""

    def __init__(self, target: IO[str]) -> None:
        self._target = target
        self._next = 0
        self._finished: dict[int, dict[str, Any]] = {}
        self._passed: set[int] = set()
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()

    def put(self, index: int, line: dict[str, Any]) -> None:
        self.seconds.append(line["seconds"])
        self.outcomes[line["verdict"]] += 1
        if index < self._next:
            self._write(line)
        else:
            self._finished[index] = line
            self._advance()

    def pass_over(self, index: int) -> None:
        """Those behind it need not wait for it any longer."""
        if index >= self._next:
            self._passed.add(index)
            self._advance()

    def _advance(self) -> None:
        while self._next in self._finished or self._next in self._passed:
            if line := self._finished.pop(self._next, None):
                self._write(line)
            self._passed.discard(self._next)
            self._next += 1

    def _write(self, line: dict[str, Any]) -> None:
        self._target.write(json.dumps(line) + "\n")
        self._target.flush()


async def _verify(source: Iterable[str], output: _Output, config: VerifierConfig) -> None:
    # As many rows at once as there are places for them, so that none of its seconds is waiting.
    places = {
        True: asyncio.Semaphore(config.code.programs),
        False: asyncio.Semaphore(config.judges),
    }
    ahead = asyncio.Semaphore(_AHEAD * (config.code.programs + config.judges))
    loop = asyncio.get_running_loop()
    lines = iter(source)
    async with Judges(config) as judges, asyncio.TaskGroup() as tasks:
        started = time.monotonic()

        async def judge(index: int, row: _Row | str, kept: dict[str, Any]) -> None:
            if isinstance(row, str):
                line = {**kept, "verdict": "unknown", "reason": row, "error": row}
                output.put(index, {**line, "seconds": 0.0})
                ahead.release()
                return
            async with places[config.kind_of(row.data_source) == "code"]:
                timer = loop.call_later(_PATIENCE_S, output.pass_over, index)
                began = time.monotonic()
                verdict = await judges.judge(row.data_source, row.completion, row.reference)
                took = time.monotonic() - began
                timer.cancel()
            output.put(index, {**kept, **_line(verdict, took)})
            ahead.release()

        number = index = 0
        # In a thread: whoever writes into the pipe may take his time, and verdicts do not wait.
        while (text := await asyncio.to_thread(next, lines, None)) is not None:
            number += 1
            if text.strip():
                await ahead.acquire()
                row, kept = _row(text, number)
                tasks.create_task(judge(index, row, {**kept, "line": number}))
                index += 1
    print(
        _summary(output.outcomes, sorted(output.seconds), time.monotonic() - started),
        file=sys.stderr,
    )


def _line(verdict: Verdict, took: float) -> dict[str, Any]:
    return {"verdict": verdict.outcome, "reason": verdict.reason, "seconds": round(took, 4)}


def _summary(outcomes: Counter[str], seconds: list[float], wall_s: float) -> str:
    total = len(seconds)
    if not total:
        return "no rows"
    counts = ", ".join(
        f"{outcomes[name]} {name} ({outcomes[name] / total:.1%})"
        for name in ("correct", "incorrect", "unknown")
    )
    slow = seconds[min(total - 1, int(_SLOWEST * total))]
    return (
        f"{total} rows: {counts}\n"
        f"{total / wall_s:.0f} rows/s, "
        f"p99 {slow * 1000:.0f} ms, slowest {seconds[-1] * 1000:.0f} ms"
    )


def _row(line: str, number: int) -> tuple[_Row | str, dict[str, Any]]:
    """The row, or what is wrong with it, and its other keys."""
    try:
        keys: dict[str, Any] = json.loads(line)
        kept = {key: value for key, value in keys.items() if key not in _OURS}
    except (ValueError, AttributeError, RecursionError) as error:
        return f"line {number} is not a row to judge: {type(error).__name__}: {error}", {}
    missing = [key for key in _OURS[:2] if key not in keys]
    if missing:
        return f"line {number} is not a row to judge: it has no `{missing[0]}`", kept
    reference = keys["reference"]
    if type(reference) in (int, float) and math.isfinite(reference):
        reference = str(reference)
    row = _Row(keys["completion"], reference, keys.get("data_source", ""))
    if not all(isinstance(text, str) for text in (row.completion, row.reference, row.data_source)):
        return f"line {number}: completion, reference and data_source must be text", kept
    return row, kept
