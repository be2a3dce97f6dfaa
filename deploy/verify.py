"""`scope verify`: judges a file from the shell, for people who tune a verifier."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from services.trajectory import Verdict
from verifier.config import CodeConfig, VerifierConfig
from verifier.judges import Judges

_SLOWEST = 0.99


class BadRow(RuntimeError):
    """A line that is no row to judge. The message says which, and why."""


@dataclass(frozen=True, slots=True)
class _Row:
    completion: str
    reference: str
    data_source: str


def verify_file(file: Path, config: VerifierConfig | None, kind: str) -> None:
    """Judges `file` to standard output, by `config` or else by one kind on every core.

    Raises:
        BadRow: the file cannot be read, a line is not a row, or there is no such kind.
    """
    try:
        cores = len(os.sched_getaffinity(0))
        code = CodeConfig(programs=cores)
        used = config or VerifierConfig(kind=kind, judges=cores, code=code)
    except ValidationError:
        raise BadRow(f"`{kind}` is no kind: exact, math, code or package.module:function") from None
    try:
        with file.open() as source:
            verify(source, sys.stdout, used)
    except (OSError, UnicodeDecodeError) as error:
        raise BadRow(f"{file}: {error}") from error


def verify(source: Iterable[str], target: IO[str], config: VerifierConfig) -> None:
    """Judges JSONL (`completion`, `reference`, `data_source`) into JSONL, line by line.

    Each line of `target` has `verdict`, `reason` and `seconds` (waiting for a judge included).
    Blank lines are passed over. The summary goes to standard error.

    Raises:
        BadRow: a line is not such a row; none is judged.
    """
    asyncio.run(_verify(source, target, config))


async def _verify(source: Iterable[str], target: IO[str], config: VerifierConfig) -> None:
    rows = list(_rows(source))
    seconds: list[float] = []
    outcomes: Counter[str] = Counter()
    at_once = config.judges + config.code.programs
    async with Judges(config) as judges:
        started = time.monotonic()

        async def judge(row: _Row) -> tuple[Verdict, float]:
            began = time.monotonic()
            verdict = await judges.judge(row.data_source, row.completion, row.reference)
            return verdict, time.monotonic() - began

        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            for verdict, took in await asyncio.gather(*map(judge, batch)):
                seconds.append(took)
                outcomes[verdict.outcome] += 1
                line = {
                    "verdict": verdict.outcome,
                    "reason": verdict.reason,
                    "seconds": round(took, 4),
                }
                target.write(json.dumps(line, ensure_ascii=False) + "\n")
            target.flush()
        wall_s = time.monotonic() - started
    print(_summary(outcomes, sorted(seconds), wall_s), file=sys.stderr)


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


def _rows(source: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(source, 1):
        if line.strip():
            yield _row(line, number)


def _row(line: str, number: int) -> _Row:
    try:
        found: dict[str, Any] = json.loads(line)
        row = _Row(found["completion"], found["reference"], found.get("data_source", ""))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRow(
            f"line {number} is not a row to judge: {type(error).__name__}: {error}"
        ) from None
    if not all(isinstance(text, str) for text in (row.completion, row.reference, row.data_source)):
        raise BadRow(f"line {number}: completion, reference and data_source must be text")
    return row
