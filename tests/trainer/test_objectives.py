"""What each objective asks of each trajectory."""

from __future__ import annotations

import pickle

import pytest
import torch
from pydantic import ValidationError

from trainer.config import TrainerConfig
from trainer.objectives.base import SequenceStats
from trainer.objectives.config import (
    OBJECTIVES,
    GrpoConfig,
    KdConfig,
    KdrlConfig,
    ObjectiveConfig,
    OpdConfig,
    RftConfig,
    ScopeConfig,
)
from trainer.objectives.kinds import objective
from trainer.objectives.log_ratio import opd
from trainer.objectives.paths import scope
from trainer.objectives.rewards import everything, grpo, kdrl, rft

SWITCHES = (  # the authors' names
    "tau",
    "use_dual_path_weighting",
    "use_seq_weights",
    "use_student_path_weights",
    "use_teacher_path_weights",
    "student_path_ppl_positive",
    "teacher_path_ppl_positive",
)

# One group: two correct of student PPL e and e², one unknown, two incorrect of teacher PPL e, e².
STATS = SequenceStats(
    group=torch.zeros(5, dtype=torch.long),
    correct=torch.tensor([True, True, False, False, False]),
    incorrect=torch.tensor([False, False, False, True, True]),
    student_nll=torch.tensor([1.0, 2.0, 9.0, 9.0, 9.0]),
    teacher_nll=torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0]),
)
LOW, HIGH = 1 / (1 + torch.e), torch.e / (1 + torch.e)
TAU_HALF = [torch.e**2 / (1 + torch.e**2), 1 / (1 + torch.e**2)]


def coefficients(**options: object) -> tuple[list[float], list[float]]:
    made = scope(STATS, ScopeConfig(**options))  # type: ignore[arg-type]
    return made.reinforce.tolist(), made.distil.tolist()


def test_scope_reinforces_surprising_correct_ones_and_trusts_a_confident_teacher() -> None:
    reinforce, distil = coefficients()
    assert reinforce == pytest.approx([LOW, HIGH, 0, 0, 0])
    assert distil == pytest.approx([0, 0, 0, HIGH, LOW])


def test_an_unknown_verdict_is_on_neither_path() -> None:
    reinforce, distil = coefficients()
    assert reinforce[2] == distil[2] == 0
    assert opd(STATS, OpdConfig()).distil[2] == 0


@pytest.mark.parametrize(
    ("option", "reinforce", "distil"),
    [
        ({"use_student_path_weights": False}, [0.5, 0.5], [HIGH, LOW]),
        ({"use_teacher_path_weights": False}, [LOW, HIGH], [0.5, 0.5]),
        ({"use_seq_weights": False}, [0.5, 0.5], [0.5, 0.5]),
        ({"student_path_ppl_positive": False}, [HIGH, LOW], [HIGH, LOW]),
        ({"teacher_path_ppl_positive": True}, [LOW, HIGH], [LOW, HIGH]),
        ({"tau": 0.5}, [1 / (1 + torch.e**2), torch.e**2 / (1 + torch.e**2)], TAU_HALF),
        ({"normalization": "released"}, [2 * LOW, 2 * HIGH], [2 * HIGH, 2 * LOW]),
    ],
)
def test_switches(option: dict[str, object], reinforce: list[float], distil: list[float]) -> None:
    got_reinforce, got_distil = coefficients(**option)
    assert got_reinforce[:2] == pytest.approx(reinforce)
    assert got_distil[3:] == pytest.approx(distil)


def test_opd_distils_all_alike() -> None:
    made = opd(STATS, OpdConfig())
    assert made.distil.tolist() == pytest.approx([0.25, 0.25, 0, 0.25, 0.25])
    assert made.reinforce.tolist() == [0] * 5


# Two groups: one with a correct, three incorrect and an unknown one; one that is all correct.
MIXED = SequenceStats(
    group=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]),
    correct=torch.tensor([True, False, False, False, False, True, True, True]),
    incorrect=torch.tensor([False, True, True, True, False, False, False, False]),
    student_nll=torch.zeros(8),
    teacher_nll=torch.zeros(8),
)
# Rewards 1, 0, 0, 0: mean 1/4, deviation √3/4, so advantages √3 and −1/√3; a quarter of each.
GRPO = [3**0.5 / 4] + [-(3**-0.5) / 4] * 3 + [0.0] * 4


def test_grpo_is_the_group_normalised_reward() -> None:
    made = grpo(MIXED, GrpoConfig())
    assert made.reinforce.tolist() == pytest.approx(GRPO)
    assert made.reinforce[5:].tolist() == [0.0] * 3  # exactly: nothing to tell apart
    assert not made.distil.any()


def test_kdrl_adds_the_reverse_kl() -> None:
    made = kdrl(MIXED, KdrlConfig(kl_coef=0.5))
    assert made.reinforce.tolist() == pytest.approx(GRPO)
    assert made.distil.tolist() == pytest.approx([1 / 8] * 4 + [0] + [1 / 6] * 3)


def test_rft_reinforces_the_correct_alike() -> None:
    made = rft(MIXED, RftConfig())
    assert made.reinforce.tolist() == pytest.approx([1, 0, 0, 0, 0] + [1 / 3] * 3)
    assert not made.distil.any()


def test_kd_learns_all_that_the_teacher_wrote() -> None:
    made = everything(MIXED, KdConfig())
    assert made.reinforce.tolist() == pytest.approx([1 / 4] * 4 + [0] + [1 / 3] * 3)
    assert not made.distil.any()


def test_a_group_without_a_known_verdict_is_left_alone() -> None:
    unknown = MIXED._replace(
        correct=torch.zeros(8, dtype=torch.bool), incorrect=torch.zeros(8, dtype=torch.bool)
    )
    for kind in OBJECTIVES:
        config = OBJECTIVES[kind].model_validate({})
        made = objective(config).coefficients(unknown, config)
        assert made.reinforce.tolist() == made.distil.tolist() == [0.0] * 8


def test_only_kd_lets_the_teacher_sample() -> None:
    samplers = {kind: objective(OBJECTIVES[kind].model_validate({})).sampler for kind in OBJECTIVES}
    assert {kind for kind, sampler in samplers.items() if sampler == "teacher"} == {"kd"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_package:x", "No module named"),
        ("math:nothing", "nothing"),
        ("math:pi", "is not an Objective"),
    ],
)
def test_an_objective_of_ones_own_that_is_none_says_so(kind: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        TrainerConfig.model_validate({"objective": {"kind": kind}})
    assert caught.value.errors()[0]["loc"] == ("objective", "kind")


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_kind_is_read_by_its_own_class_and_computed_with_it(kind: str) -> None:
    config = TrainerConfig.model_validate({"objective": {"kind": kind}}).objective
    assert type(config) is OBJECTIVES[kind] is objective(config).settings
    assert type(pickle.loads(pickle.dumps(config))) is OBJECTIVES[kind]  # as Ray sends it


@pytest.mark.parametrize(
    ("setting", "owner"), [*((name, "scope") for name in SWITCHES), ("kl_coef", "kdrl")]
)
def test_a_setting_of_another_kind_is_refused_by_name(setting: str, owner: str) -> None:
    for kind in {*OBJECTIVES} - {owner}:
        with pytest.raises(ValidationError, match=f"{setting} is a setting of {owner}, not of"):
            ObjectiveConfig.model_validate({"kind": kind, setting: 1})
        with pytest.raises(ValidationError, match=f"{setting} is a setting of {owner}, not of"):
            OBJECTIVES[kind].model_validate({setting: 1})


READS = {  # of what the teacher says, and what of that can be set
    "log_ratio_bound": "scope opd kdrl iw_opd sg_opd vopd ta_opd tgopd eopd",
    "divergence": "scope opd kdrl srpo",
    "top_k": "scope opd kdrl vopd ta_opd eopd srpo",
    "top_k_of": "scope opd kdrl vopd eopd srpo",
    "entropy": "eopd srpo",
}


@pytest.mark.parametrize("setting", READS)
def test_a_kind_has_the_settings_that_it_reads_and_no_others(setting: str) -> None:
    having = {kind for kind, one in OBJECTIVES.items() if setting in one.model_fields}
    assert having == set(READS[setting].split())


def test_only_what_is_needed_is_scored() -> None:
    assert {k: objective(OBJECTIVES[k].model_validate({})).teacher for k in OBJECTIVES} == {
        "scope": "incorrect", "opd": "all", "grpo": "none",
        "rft": "none", "kdrl": "all", "kd": "none", "power_opd": "all", "iw_opd": "all",
        "sg_opd": "all", "vopd": "all", "ta_opd": "all", "opsa": "none", "tgopd": "all",
        "eopd": "all", "srpo": "incorrect",
    }  # fmt: skip
    assert objective(ScopeConfig()).teacher == "incorrect"
    assert objective(OpdConfig()).teacher == "all"
    assert objective(ScopeConfig(use_dual_path_weighting=False)).teacher == "all"
    assert objective(ScopeConfig()).student_perplexity
    assert not objective(ScopeConfig(use_seq_weights=False)).student_perplexity
