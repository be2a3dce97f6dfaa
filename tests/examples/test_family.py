"""The comparison of all objectives: what is left to run, its table, and its driver."""

from __future__ import annotations

import pytest

from examples.arithmetic.family import TOP, experiments, table, todo, whole
from examples.arithmetic.study import Bench, Experiment, made
from trainer.objectives.config import OBJECTIVES


def test_every_kind_is_compared_and_no_run_is_made_twice() -> None:
    every = experiments(100)
    assert {one.objective.kind for one in every} == set(OBJECTIVES)
    assert max(one.objective.top_tokens for one in every) == TOP
    done = [{"experiment": e.name, "seed": 0, "tokens": 100} for e in every]
    left = [(e.name, seed) for e, seed in todo(every, 2, done)]
    assert left == [(e.name, 1) for e in every]
    begun = [*done, done[0] | {"seed": 1}]
    assert whole(begun, every) == done  # a seed counts once every kind has run it
    other = [run | {"tokens": 99} for run in done]
    assert whole(other, every) == []
    assert len([*todo(every, 1, other)]) == len(every)  # of another budget


def test_the_best_stands_first_and_differences_are_paired() -> None:
    runs = [
        {"experiment": name, "seed": seed, "correct": [correct, correct], "train_accuracy": [0.0]}
        for name, seed, correct in (
            ("scope", 0, 8),
            ("scope", 1, 16),
            ("opd", 0, 16),
            ("opd", 1, 24),
        )
    ]
    rows = table(runs, ["scope", "opd"]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| opd", "| scope"]
    assert rows[0].endswith("| +25.0 ± 0.0 |")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["srpo", "vopd"], ids=["the teacher's", "the student's"])
def test_a_run_ends_at_its_budget_and_asks_for_top_tokens(kind: str) -> None:
    bench = Bench()
    bench.held_out_rows = bench.held_out_rows[:2]
    settings = {"kind": kind, "top_k": TOP}
    record = made(bench, Experiment(kind, 1, settings, steps=5, tokens=1), seed=0)
    assert len(record["train_accuracy"]) == 1 and record["sampled_tokens"] > 1
