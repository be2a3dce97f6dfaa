"""Every objective is one pure function from a scored batch to two coefficients a trajectory.

All train on one surrogate, `−Σ_t ρ_t A_t`, with the token advantage

    A_t = reinforce + distil · (log π_T(y_t) − log π_S̄(y_t))        (S̄: detached)

so that an objective only says how strongly each trajectory is reinforced and how strongly it is
pulled towards the teacher. SCOPE reinforces the correct and distils the incorrect; OPD distils
all. A new objective is one function and one line in `OBJECTIVES`.

Axes: `N` trajectories of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.scope import path_weights

TeacherNeed: TypeAlias = Literal["incorrect", "all", "none"]


class SequenceStats(NamedTuple):
    """What objectives see of the global batch; all on one device, perplexities in nats."""

    group: Tensor  # [N] int64
    correct: Tensor  # [N] bool; neither correct nor incorrect: unknown or empty
    incorrect: Tensor  # [N] bool
    student_nll: Tensor  # [N] mean NLL under the student, temperature 1
    teacher_nll: Tensor  # [N] mean NLL under the teacher; read only where it was asked for


class Coefficients(NamedTuple):
    """How strongly each trajectory is trained, in both ways."""

    reinforce: Tensor  # [N]
    distil: Tensor  # [N]


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective and what it needs to be computed."""

    coefficients: Callable[[SequenceStats, ObjectiveConfig], Coefficients]
    teacher: TeacherNeed
    student_perplexity: bool


def scope(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """SCOPE: L = Σ_{Ω_c} w_i L_MLE + Σ_{Ω_w} w_i L_OPD, both weights normalised by group."""
    uniform = torch.zeros_like(stats.student_nll)
    by_student = config.use_seq_weights and config.use_student_path_weights
    by_teacher = config.use_seq_weights and config.use_teacher_path_weights
    student = path_weights(
        stats.student_nll if by_student else uniform,
        stats.group,
        stats.correct,
        tau=config.tau,
        higher_ppl_higher_weight=config.student_path_ppl_positive,
        normalization=config.normalization,
    )
    teacher = path_weights(
        stats.teacher_nll if by_teacher else uniform,
        stats.group,
        stats.incorrect,
        tau=config.tau,
        higher_ppl_higher_weight=config.teacher_path_ppl_positive,
        normalization=config.normalization,
    )
    return Coefficients(reinforce=student, distil=teacher)


def opd(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """On-policy distillation: the sampled reverse KL to the teacher, the same for all."""
    uniform = path_weights(
        torch.zeros_like(stats.student_nll),
        stats.group,
        stats.correct | stats.incorrect,
        higher_ppl_higher_weight=True,
        normalization=config.normalization,
    )
    return Coefficients(reinforce=torch.zeros_like(uniform), distil=uniform)


def objective(config: ObjectiveConfig) -> Objective:
    """The configured objective."""
    if config.kind == "opd" or not config.use_dual_path_weighting:
        return Objective(opd, teacher="all", student_perplexity=False)
    weighted = config.use_seq_weights and config.use_student_path_weights
    return Objective(scope, teacher="incorrect", student_perplexity=weighted)
