"""The short form of `make chaos`: one kill of the roles that are hardest to lose.
test_resume.py kills the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.chaos import chaos, shared_chaos


@pytest.mark.slow
def test_every_prompt_is_trained_exactly_once_whatever_dies(tmp_path: Path) -> None:
    roles = ["redis", "rollout worker", "learner rank"]
    report = chaos(tmp_path, roles, seed=0)
    assert {role: len(times) for role, times in report.recovery_s.items()} == dict.fromkeys(
        roles, 1
    )
    assert (report.lost, report.duplicated, report.dead) == (0, 0, 0)
    assert report.fed == report.trained


@pytest.mark.slow
def test_a_whole_node_dies(tmp_path: Path) -> None:
    report = shared_chaos(tmp_path, ["one"], kills=1)["one"]
    assert len(report.recovery_s["ray node"]) == 1
    assert (report.lost, report.duplicated, report.dead) == (0, 0, 0)
    assert report.fed == report.trained
