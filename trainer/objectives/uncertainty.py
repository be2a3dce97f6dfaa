"""Objectives that ask how certain the teacher is, by its entropy at each token."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.base import Coefficients, Objective, SequenceStats, Tokens, bounded, uniform
from trainer.objectives.config import EopdConfig, SrpoConfig
from trainer.objectives.log_ratio import opd
from trainer.objectives.rewards import grpo


def eopd_advantage(tokens: Tokens, config: EopdConfig) -> Tensor:
    """EOPD (arXiv 2603.07079): the sampled reverse KL at every token."""
    return tokens.distil * bounded(tokens.log_ratio, config)


def eopd_divergence(tokens: Tokens, config: EopdConfig) -> Tensor:
    """And the forward KL where the teacher's entropy is above the threshold, so that the student
    keeps what an uncertain teacher would say too. Made after the abstract and notes on the
    authors' code. The smooth gate is made after the title of arXiv 2605.13255 alone."""
    above = tokens.teacher_entropy - config.entropy_threshold
    if config.entropy_width is None:
        return torch.where(above > 0, tokens.distil, 0.0)
    return tokens.distil * torch.sigmoid(above / config.entropy_width)


def srpo(stats: SequenceStats, config: SrpoConfig) -> Coefficients:
    """SRPO (arXiv 2604.02288): GRPO's advantage on the correct, distillation on the incorrect. The
    paper's teacher is the student itself with a hint, which incorrect answers without one lack;
    this one is whatever teacher the run has."""
    alike = uniform(stats, stats.correct | stats.incorrect, config)
    return Coefficients(
        reinforce=torch.where(stats.correct, grpo(stats, config).reinforce, 0.0),
        distil=torch.where(stats.incorrect, alike, 0.0),
    )


def srpo_advantage(tokens: Tokens, config: SrpoConfig) -> Tensor:
    """GRPO's alone."""
    return tokens.reinforce


def srpo_divergence(tokens: Tokens, config: SrpoConfig) -> Tensor:
    """w = exp(−β H) over its mean: of the trajectory's tokens, where the paper takes that of all
    that are distilled."""
    weight = torch.exp(-config.beta * tokens.teacher_entropy)
    return tokens.distil * weight * tokens.length / tokens.total(weight)


EOPD = Objective(
    EopdConfig, opd, teacher="all", advantage=eopd_advantage, divergence=eopd_divergence
)
SRPO = Objective(
    SrpoConfig, srpo, teacher="incorrect", advantage=srpo_advantage, divergence=srpo_divergence
)
