"""The example of docs/objectives.md trains as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.builders import scored_group, tiny_model
from trainer.batch import Batch
from trainer.config import ObjectiveConfig, TrainerConfig
from trainer.learner import Learner
from trainer.objectives import SequenceStats, objective

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectiveConfig:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("\n") < 50
    (tmp_path / "trusted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return ObjectiveConfig(kind="trusted:OBJECTIVE")


def test_its_coefficients_by_hand(config: ObjectiveConfig) -> None:
    stats = SequenceStats(
        group=torch.zeros(4, dtype=torch.long),
        correct=torch.tensor([True, False, False, False]),
        incorrect=torch.tensor([False, True, True, True]),
        student_nll=torch.zeros(4),
        teacher_nll=torch.tensor([0.0, 0.5, 0.9, 3.0]),
    )
    made = objective(config).coefficients(stats, config)
    assert made.reinforce.tolist() == [1, 0, 0, 0]
    assert made.distil.tolist() == [0, 0.5, 0.5, 0]


def test_a_learner_trains_with_it(config: ObjectiveConfig) -> None:
    learner = Learner(tiny_model(), TrainerConfig(objective=config), temperature=1.0)
    before = [p.detach().clone() for p in learner.model.parameters()]
    metrics = learner.step(Batch.of([scored_group(["correct", "incorrect"])]))
    assert metrics["actor/grad_norm"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
