"""How often the verifier is right on cases whose verdict is known, by group.

    python -m benchmarks.verifier_cases FILE.jsonl… [--show]

A case is a line with `completion`, `reference`, `expected` and `data_source` (its group; one that
starts with "code/" is a program). A wrong answer taken for right is what a policy learns to give,
so it is counted apart from a right one taken for wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from verifier.config import CodeConfig, VerifierConfig
from verifier.judges import Judges

_COLUMNS = ("right", "wrong taken for right", "right taken for wrong", "unknown")


async def outcomes(cases: Sequence[dict[str, str]]) -> list[str]:
    """Which of the columns each case belongs to, judged as in a run."""
    cores = len(os.sched_getaffinity(0))
    kinds = {c["data_source"]: "code" for c in cases if c["data_source"].startswith("code/")}
    config = VerifierConfig(kinds=kinds, judges=cores, code=CodeConfig(programs=cores))
    left = iter(enumerate(cases))
    results = [""] * len(cases)
    async with Judges(config) as judges:

        async def work_off() -> None:
            for index, case in left:
                verdict = await judges.judge(
                    case["data_source"], case["completion"], case["reference"]
                )
                results[index] = _column(verdict.outcome, case["expected"])

        await asyncio.gather(*(work_off() for _ in range(2 * cores)))
    return results


def _column(outcome: str, expected: str) -> str:
    if outcome == expected:
        return "right"
    if outcome == "unknown":
        return outcome
    return "wrong taken for right" if outcome == "correct" else "right taken for wrong"


def table(groups: Iterable[str], columns: Iterable[str]) -> str:
    """One line a group, and their sum."""
    counts = Counter(zip(groups, columns, strict=True))
    names = sorted({group for group, _ in counts})
    lines = [f"{'':24}" + "".join(f"{column:>24}" for column in _COLUMNS)]
    for name in names:
        lines.append(f"{name:24}" + "".join(f"{counts[name, c]:24}" for c in _COLUMNS))
    sums = [sum(counts[name, c] for name in names) for c in _COLUMNS]
    lines.append(f"{'all':24}" + "".join(f"{total:24}" for total in sums))
    lines.append(f"{sums[0] / sum(sums):.1%} right")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("files", type=Path, nargs="+")
    arguments.add_argument("--show", action="store_true", help="print every case that is not right")
    given = arguments.parse_args()
    lines = (line for file in given.files for line in file.open(encoding="utf-8"))
    cases = [json.loads(line) for line in lines if line.strip()]
    results = asyncio.run(outcomes(cases))
    if given.show:
        for case, column in zip(cases, results, strict=True):
            if column != "right":
                shown = {key: case[key] for key in ("data_source", "completion", "reference")}
                print(f"{column}: {json.dumps(shown, ensure_ascii=False)}")
    print(table([case["data_source"] for case in cases], results))


if __name__ == "__main__":
    main()
