"""All objectives on the study's task at equal tokens, whoever wins.

    python -m examples.arithmetic.family

As `study.py`, of every kind with its defaults; what the study itself has run is not run again. A
finished run is one line of `results/family.jsonl`. Prints one table in Markdown over the seeds that
every kind has run: Student's intervals, differences paired by seed. `--seeds 0` runs nothing and
prints what there is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.arithmetic.study import RESULTS, TOKENS, Bench, Experiment, made, read_runs
from trainer.objectives.config import OBJECTIVES

SEEDS = 5
TOP = 12  # of a vocabulary of 17, so that there is a tail


def experiments(tokens: int) -> list[Experiment]:
    """Every kind with its defaults, and SCOPE from the first error on. `top_k` is cut below the
    vocabulary, and a bound of the log-ratio is the study's."""
    settings: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in OBJECTIVES}
    for kind in ("vopd", "ta_opd", "eopd", "srpo"):
        settings[kind]["top_k"] = TOP
    settings["scope, first_error 1"] = {"kind": "scope", "first_error": 1.0}
    return [Experiment(name, SEEDS, s, tokens) for name, s in settings.items()]


def todo(
    every: Sequence[Experiment], seeds: int, done: Sequence[dict[str, Any]]
) -> Iterator[tuple[Experiment, int]]:
    """What is left, a seed of all before the next seed of any."""
    finished = {(run["experiment"], run["seed"], run["tokens"]) for run in done}
    for seed in range(seeds):
        for one in every:
            if (one.name, seed, one.tokens) not in finished:
                yield one, seed


def whole(runs: Sequence[dict[str, Any]], every: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The runs with these settings, of the seeds that every experiment has run."""
    tokens = {one.name: one.tokens for one in every}
    ours = [run for run in runs if tokens.get(run["experiment"], -1) == run["tokens"]]
    ran: dict[int, set[str]] = {}
    for run in ours:
        ran.setdefault(run["seed"], set()).add(run["experiment"])
    return [run for run in ours if len(ran[run["seed"]]) == len(tokens)]


def table(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """One row an experiment, the best first."""
    from examples.arithmetic.study_report import (
        by_experiment,
        difference,
        over_runs,
        percent,
        points,
    )

    grouped = by_experiment(runs)
    steps = {
        name: [len(r["train_accuracy"]) for r in runs if r["experiment"] == name] for name in names
    }
    rows = [
        f"| {name} | {len(grouped[name])} | {sum(steps[name]) / len(steps[name]):.0f} "
        f"| {percent(over_runs(grouped, name, 1))} "
        f"| {points(difference(grouped, name, 1)) if name != 'scope' else '–'} |"
        for name in sorted(grouped, key=lambda name: -over_runs(grouped, name, 1).value)
    ]
    head = ["| | seeds | steps | Avg@32 | Avg@32 − SCOPE's |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _finished(results: Path) -> list[dict[str, Any]]:
    """With the study's own runs, whose methods have their defaults too."""
    return [*read_runs(), *read_runs(results)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="sampled in a run")
    parser.add_argument("--results", type=Path, default=RESULTS / "family.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench, every = Bench(), experiments(options.tokens)
    for experiment, seed in todo(every, options.seeds, _finished(options.results)):
        record = made(bench, experiment, seed)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{experiment.name}, seed {seed}: {record['seconds']} s", flush=True)
    if finished := whole(_finished(options.results), every):
        print(table(finished, [e.name for e in every]))


if __name__ == "__main__":
    main()
