"""What the verifier costs: answers and programs a second, against the ways without isolation.

    python -m benchmarks.verifier --data deepmath.parquet [--json FILE]

Math: the same rows three times, by math-verify in this process, by math-verify in a process pool,
and by the verifier's judges. Every other row answers with the next row's reference. Nothing is
cached. Programs: one line of Python with one case, bare and in a sandbox of each level, one
after another, and then in as many sandboxes as there are cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import psutil
import pyarrow.parquet as pq
from math_verify import parse, verify

from benchmarks.processor import processor
from services.sandbox.bubblewrap import Bubblewrap
from services.sandbox.confined import Interpreter
from services.sandbox.landlock import Landlock
from verifier.code_tests import CodeJudge
from verifier.config import CodeConfig
from verifier.judge_pool import JudgePool

Row = tuple[str, str]  # completion, reference
_PROGRAMS = 100
_SOURCE = "print(sum(map(int, input().split())))"
_REFERENCE = '{"inputs": ["1 2 3"], "outputs": ["6"]}'


def rows(data: Path) -> list[Row]:
    """Boxed answers with their references, right and wrong in turn."""
    read = pq.read_table(data, columns=["reward_model"]).to_pylist()
    golds = [row["reward_model"]["ground_truth"] for row in read]
    others = [*golds[1:], golds[0]]
    return [
        (rf"So the answer is $\boxed{{{other if index % 2 else gold}}}$.", gold)
        for index, (gold, other) in enumerate(zip(golds, others, strict=True))
    ]


def by_math_verify(row: Row) -> float:
    """Seconds that the library takes for one row, without its time-outs (they need a signal)."""
    started = time.perf_counter()
    completion, reference = row
    gold = parse(rf"\boxed{{{reference}}}", parsing_timeout=None)
    verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None)
    return time.perf_counter() - started


async def by_judges(work: Sequence[Row], cores: int) -> dict[str, float]:
    """All rows, by as many judges as cores."""
    seconds: list[float] = []
    left = iter(work)

    async def work_off() -> None:
        for completion, reference in left:
            started = time.perf_counter()
            await pool.judge("math", completion, reference)
            seconds.append(time.perf_counter() - started)

    async with JudgePool({"math"}, judges=cores) as pool:
        await asyncio.gather(*(pool.judge("math", r"\boxed{1}", "1") for _ in range(cores)))
        clocks = _clocks()
        await asyncio.gather(*(work_off() for _ in range(cores)))
        return _rate(seconds, clocks)


def math_figures(work: Sequence[Row], cores: int) -> dict[str, dict[str, float]]:
    by_math_verify(work[0])  # warms up
    clocks = _clocks()
    figures = {"math-verify in process": _rate([by_math_verify(row) for row in work], clocks)}
    with ProcessPoolExecutor(cores) as executor:
        list(executor.map(by_math_verify, work[:cores]))
        clocks = _clocks()
        seconds = list(executor.map(by_math_verify, work))
        figures[f"math-verify in a pool of {cores}"] = _rate(seconds, clocks)
    figures[f"verifier, {cores} judges"] = asyncio.run(by_judges(work, cores))
    return figures


def _clocks() -> tuple[float, float]:
    """The time, and the processor seconds of this process and its children, which say on a busy
    machine what an idle one would do."""
    me = psutil.Process()
    spent = [process.cpu_times() for process in (me, *me.children())]
    return time.perf_counter(), sum(times.user + times.system for times in spent)


def _rate(seconds: Sequence[float], before: tuple[float, float]) -> dict[str, float]:
    wall_s, cpu_s = (now - then for now, then in zip(_clocks(), before, strict=True))
    ranked = sorted(seconds)
    return {
        "answers_per_s": round(len(ranked) / wall_s, 1),
        "cpu_ms_per_answer": round(1e3 * cpu_s / len(ranked), 2),
        "p50_ms": round(1e3 * median(ranked), 2),
        "p99_ms": round(1e3 * ranked[int(0.99 * len(ranked))], 2),
        "slowest_ms": round(1e3 * ranked[-1], 2),
    }


async def program_figures(cores: int) -> dict[str, dict[str, float]]:
    """For each level of confinement."""
    return {
        "bubblewrap": await _programs(cores, "bubblewrap", (await Bubblewrap.prepare()).python),
        "landlock": await _programs(cores, "landlock", (await Landlock.prepare()).python),
    }


async def _programs(cores: int, level: str, python: Interpreter) -> dict[str, float]:
    config = CodeConfig.model_validate({"sandbox": level})
    bare: list[float] = []
    sandboxed: list[float] = []
    one = await CodeJudge.start(config)
    for _ in range(_PROGRAMS):  # in turn, so that both see the same machine
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *(python.path, *python.flags, "-c", _SOURCE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        await process.communicate(b"1 2 3")
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        assert (await one.judge(_SOURCE, _REFERENCE)).outcome == "correct"
        sandboxed.append(time.perf_counter() - started)
    many = await CodeJudge.start(config.model_copy(update={"programs": cores}))
    started = time.perf_counter()
    await asyncio.gather(*(many.judge(_SOURCE, _REFERENCE) for _ in range(_PROGRAMS)))
    return {
        "bare_ms": round(1e3 * median(bare), 2),
        "sandboxed_ms": round(1e3 * median(sandboxed), 2),
        "overhead_ms": round(1e3 * (median(sandboxed) - median(bare)), 2),
        f"sandboxed_per_s_on_{cores}": round(_PROGRAMS / (time.perf_counter() - started), 1),
    }


def machine() -> dict[str, str | float]:
    """Where these figures were measured."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--data", type=Path, required=True, help="rows in verl's columns")
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    given = arguments.parse_args()
    where = machine()
    cores = int(where["cores"])
    figures = {
        "machine": where,
        "math": math_figures(rows(given.data), cores),
        "programs": asyncio.run(program_figures(cores)),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
