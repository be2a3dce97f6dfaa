"""Objectives that reinforce whole trajectories: by reward, by verdict, or all alike."""

from __future__ import annotations

import torch

from trainer.objectives.base import (
    Coefficients,
    Objective,
    SequenceStats,
    group_total,
    uniform,
)
from trainer.objectives.config import (
    GrpoConfig,
    KdConfig,
    KdrlConfig,
    ObjectiveConfig,
    RftConfig,
    TgopdConfig,
)
from trainer.objectives.log_ratio import opd


def grpo(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """GRPO (arXiv 2402.03300) without a teacher and without the division by each length: the
    reward, 1 or 0, minus its group's mean and over its standard deviation (of the population).
    A group that is all correct or all incorrect teaches nothing."""
    known = stats.correct | stats.incorrect
    reward = stats.correct.to(stats.student_nll.dtype)
    # Whole numbers, so that a group without a difference has a deviation of exactly 0.
    count, right = group_total(stats, known.to(reward.dtype)), group_total(stats, reward)
    deviation = torch.sqrt(right * (count - right)) / count.clamp_min(1)
    advantage = (reward - right / count.clamp_min(1)) / deviation
    reinforce = uniform(stats, known, config) * torch.where(deviation > 0, advantage, 0.0)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def kdrl(stats: SequenceStats, config: KdrlConfig) -> Coefficients:
    """KDRL (arXiv 2506.02208): GRPO's reward and, `kl_coef` times, OPD's reverse KL."""
    return Coefficients(
        reinforce=grpo(stats, config).reinforce,
        distil=config.kl_coef * opd(stats, config).distil,
    )


def rft(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """Rejection-sampling fine-tuning: maximum likelihood on the correct, all alike."""
    reinforce = uniform(stats, stats.correct, config)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def everything(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """All trajectories alike, and no teacher that scores. On the teacher's own samples it is
    sequence-level distillation (KD, arXiv 1606.07947): the verdict does not sort them, so that it
    is the classic baseline."""
    reinforce = uniform(stats, stats.correct | stats.incorrect, config)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def tgopd(stats: SequenceStats, config: TgopdConfig) -> Coefficients:
    """TGOPD (arXiv 2609.02998): OPD on prompts on which the teacher is reliable; on the others
    GRPO without the division by the deviation, which is nothing where all answers are alike.

    The paper lets the teacher answer each prompt three times and asks the verifier. No such
    answers are here: a teacher is taken for reliable if it finds the student's correct answers
    likelier than the incorrect ones, which the paper says is a poorer sign."""
    reward = stats.correct.to(stats.student_nll.dtype)
    right, wrong = group_total(stats, reward), group_total(stats, stats.incorrect.to(reward.dtype))
    of_right = group_total(stats, reward * stats.teacher_nll) / right
    of_wrong = group_total(stats, stats.incorrect * stats.teacher_nll) / wrong
    reliable = of_right + config.margin < of_wrong  # of no answers NaN, which nothing is below
    alike = uniform(stats, stats.correct | stats.incorrect, config)
    centred = alike * (reward - right / (right + wrong).clamp_min(1))
    return Coefficients(
        reinforce=torch.where(reliable, 0.0, centred), distil=torch.where(reliable, alike, 0.0)
    )


GRPO = Objective(GrpoConfig, grpo, teacher="none")
KDRL = Objective(KdrlConfig, kdrl, teacher="all")
RFT = Objective(RftConfig, rft, teacher="none")
KD = Objective(KdConfig, everything, teacher="none", sampler="teacher")
TGOPD = Objective(TgopdConfig, tgopd, teacher="all")
