"""What is counted of a verified group, and that a result survives being written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.accuracy import Estimate
from deploy.evaluate import Result, Tally
from services.trajectory import RolloutGroup, Trajectory, VerifiedGroup
from tests.builders import scored_group

GROUPS: list[VerifiedGroup] = [
    scored_group(["correct", "incorrect", "incorrect", "incorrect"]).verified,
    scored_group(["incorrect", "incorrect", "unknown", "incorrect"], order=1).verified,
    scored_group(["correct", "correct", "correct", "incorrect"], order=2).verified,
]


def test_accuracy_by_hand() -> None:
    score = Result(7, tuple(map(Tally.of, GROUPS))).score
    assert score.avg_at_k.value == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert score.pass_at_k.value == pytest.approx(2 / 3)
    assert (score.k, score.prompts, score.unknown, score.truncated) == (4, 3, 1, 0)
    # Four draws with replacement find the one correct of four with 1 − (3/4)⁴, the three with 1.
    expected = (1 - (3 / 4) ** 4 + 1 - (1 / 4) ** 4) / 3
    assert score.pass_at_k_bootstrap.value == pytest.approx(expected, abs=0.02)


def test_truncated_and_unknown_are_counted_apart() -> None:
    verified = GROUPS[1]
    cut = Trajectory(np.array([3], np.int32), np.array([-1.0], np.float32), "length", "")
    rollout = RolloutGroup(verified.rollout.prompt, (cut, *verified.rollout.trajectories[1:]), 3)
    tally = Tally.of(VerifiedGroup(rollout, verified.verdicts))
    assert (tally.truncated, tally.unknown, tally.correct, tally.samples) == (1, 1, 0, 4)
    assert tally.weight_version == 3


def test_every_data_source_has_its_score() -> None:
    tallies = [Tally("0", "a", 4, 4, 0, 0, 0), Tally("1", "b", 4, 0, 0, 0, 0)]
    found = Result(0, tuple(tallies)).by_source
    assert {name: score.avg_at_k.value for name, score in found.items()} == {"a": 1.0, "b": 0.0}


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result(7, tuple(map(Tally.of, GROUPS)))
    result.write(tmp_path, "after")
    assert Result.read(tmp_path, "after") == result
    assert Result.read(tmp_path, "before") is None


def test_no_prompts_are_no_accuracy() -> None:
    assert Result(0, ()).score.avg_at_k == Estimate(0.0, 0.0, 0.0)
