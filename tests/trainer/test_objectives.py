"""What each objective asks of each trajectory."""

from __future__ import annotations

import pytest
import torch

from trainer.config import OBJECTIVES, ObjectiveConfig
from trainer.objectives import (
    ObjectiveError,
    SequenceStats,
    grpo,
    kd,
    kdrl,
    objective,
    opd,
    rft,
    scope,
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
    made = scope(STATS, ObjectiveConfig(**options))  # type: ignore[arg-type]
    return made.reinforce.tolist(), made.distil.tolist()


def test_scope_reinforces_surprising_correct_ones_and_trusts_a_confident_teacher() -> None:
    reinforce, distil = coefficients()
    assert reinforce == pytest.approx([LOW, HIGH, 0, 0, 0])
    assert distil == pytest.approx([0, 0, 0, HIGH, LOW])


def test_an_unknown_verdict_is_on_neither_path() -> None:
    reinforce, distil = coefficients()
    assert reinforce[2] == distil[2] == 0
    assert opd(STATS, ObjectiveConfig(kind="opd")).distil[2] == 0


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
    made = opd(STATS, ObjectiveConfig(kind="opd"))
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
    made = grpo(MIXED, ObjectiveConfig(kind="grpo"))
    assert made.reinforce.tolist() == pytest.approx(GRPO)
    assert made.reinforce[5:].tolist() == [0.0] * 3  # exactly: nothing to tell apart
    assert not made.distil.any()


def test_kdrl_adds_the_reverse_kl() -> None:
    made = kdrl(MIXED, ObjectiveConfig(kind="kdrl", kl_coef=0.5))
    assert made.reinforce.tolist() == pytest.approx(GRPO)
    assert made.distil.tolist() == pytest.approx([1 / 8] * 4 + [0] + [1 / 6] * 3)


def test_rft_reinforces_the_correct_alike() -> None:
    made = rft(MIXED, ObjectiveConfig(kind="rft"))
    assert made.reinforce.tolist() == pytest.approx([1, 0, 0, 0, 0] + [1 / 3] * 3)
    assert not made.distil.any()


def test_kd_learns_all_that_the_teacher_wrote() -> None:
    made = kd(MIXED, ObjectiveConfig(kind="kd"))
    assert made.reinforce.tolist() == pytest.approx([1 / 4] * 4 + [0] + [1 / 3] * 3)
    assert not made.distil.any()


def test_a_group_without_a_known_verdict_is_left_alone() -> None:
    unknown = MIXED._replace(
        correct=torch.zeros(8, dtype=torch.bool), incorrect=torch.zeros(8, dtype=torch.bool)
    )
    for kind in OBJECTIVES:
        config = ObjectiveConfig(kind=kind)
        made = objective(config).coefficients(unknown, config)
        assert made.reinforce.tolist() == made.distil.tolist() == [0.0] * 8


def test_only_kd_lets_the_teacher_sample() -> None:
    samplers = {kind: objective(ObjectiveConfig(kind=kind)).sampler for kind in OBJECTIVES}
    assert {kind for kind, sampler in samplers.items() if sampler == "teacher"} == {"kd"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [("no_such_package:x", "No module named"), ("math:nothing", "nothing"), ("math:pi", "is no")],
)
def test_an_objective_of_ones_own_that_is_none_says_so(kind: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        objective(ObjectiveConfig(kind=kind))


def test_only_what_is_needed_is_scored() -> None:
    assert {k: objective(ObjectiveConfig(kind=k)).teacher for k in OBJECTIVES} == {
        "scope": "incorrect", "opd": "all", "grpo": "none",
        "rft": "none", "kdrl": "all", "kd": "none",
    }  # fmt: skip
    assert objective(ObjectiveConfig()).teacher == "incorrect"
    assert objective(ObjectiveConfig(kind="opd")).teacher == "all"
    assert objective(ObjectiveConfig(use_dual_path_weighting=False)).teacher == "all"
    assert objective(ObjectiveConfig()).student_perplexity
    assert not objective(ObjectiveConfig(use_seq_weights=False)).student_perplexity
