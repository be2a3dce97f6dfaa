"""The short form of `make chaos`: a rank of the learner is killed, then the node with all that
computes. Elsewhere a run loses its driver (test_resume.py), its sampler and its Redis
(tests/examples/test_calculator.py), a replica of its teacher (test_self_teacher.py) and its vLLM
(test_vllm_pipeline.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.chaos import NODE, shared_chaos


@pytest.mark.slow
def test_every_prompt_is_trained_exactly_once_whatever_dies(tmp_path: Path) -> None:
    victims = ["learner rank", NODE]
    report = shared_chaos(tmp_path, ["one"], victims)["one"]
    assert {what: len(times) for what, times in report.recovery_s.items()} == dict.fromkeys(
        victims, 1
    )
    assert (report.lost, report.duplicated, report.dead) == (0, 0, 0)
    assert report.fed == report.trained
