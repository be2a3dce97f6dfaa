"""The example of docs/objectives.md trains as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deploy.config import ConfigError, load
from tests.builders import scored_group, tiny_model
from trainer.batch import Batch
from trainer.config import TrainerConfig
from trainer.learner import Learner
from trainer.objectives.base import SequenceStats
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.kinds import objective

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectiveConfig:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("\n") < 50
    (tmp_path / "trusted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return own(likely=1.0)


def own(**settings: float) -> ObjectiveConfig:
    section = {"kind": "trusted:OBJECTIVE", **settings}
    return TrainerConfig.model_validate({"objective": section}).objective


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
    wary = own(likely=0.7)
    assert objective(wary).coefficients(stats, wary).distil.tolist() == [0, 1, 0, 0]


def test_its_settings_are_checked_when_the_config_is_read(config: ObjectiveConfig) -> None:
    assert config.model_dump()["likely"] == 1.0
    assert TrainerConfig.model_validate(TrainerConfig(objective=config).model_dump()) == (
        TrainerConfig(objective=config)
    )
    for setting, message in (("likely", "valid number"), ("tau", "tau is a setting of scope, not")):
        with pytest.raises(ValidationError, match=message):
            own(**{setting: "often"})  # type: ignore[arg-type]


def test_a_key_that_it_lacks_is_one_sentence(config: ObjectiveConfig, tmp_path: Path) -> None:
    override = "trainer.objective={kind: 'trusted:OBJECTIVE', likly: 2}"
    with pytest.raises(ConfigError, match=r"objective\.likly'; did you mean '.*\.likely'"):
        load(PAGE.parents[1] / "deploy/runs/demo.yaml", [override])


def test_a_learner_trains_with_it(config: ObjectiveConfig) -> None:
    learner = Learner(tiny_model(), TrainerConfig(objective=config), temperature=1.0)
    before = [p.detach().clone() for p in learner.model.parameters()]
    metrics = learner.step(*learner.plans(Batch.of([scored_group(["correct", "incorrect"])])))
    assert metrics["actor/grad_norm"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
