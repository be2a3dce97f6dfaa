"""What each objective asks of each trajectory."""

from __future__ import annotations

import pytest
import torch

from trainer.config import ObjectiveConfig
from trainer.objectives import SequenceStats, objective, opd, scope

# One group: two correct of student PPL e and e², one unknown, two incorrect of teacher PPL e, e².
STATS = SequenceStats(
    group=torch.zeros(5, dtype=torch.long),
    correct=torch.tensor([True, True, False, False, False]),
    incorrect=torch.tensor([False, False, False, True, True]),
    student_nll=torch.tensor([1.0, 2.0, 9.0, 9.0, 9.0]),
    teacher_nll=torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0]),
)
LOW, HIGH = 1 / (1 + torch.e), torch.e / (1 + torch.e)


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


def test_only_what_is_needed_is_scored() -> None:
    assert objective(ObjectiveConfig()).teacher == "incorrect"
    assert objective(ObjectiveConfig(kind="opd")).teacher == "all"
    assert objective(ObjectiveConfig(use_dual_path_weighting=False)).teacher == "all"
    assert objective(ObjectiveConfig()).student_perplexity
    assert not objective(ObjectiveConfig(use_seq_weights=False)).student_perplexity
