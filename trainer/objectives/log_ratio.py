"""On-policy distillation (OPD), and what others make of a token's log-ratio to the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.base import Coefficients, Objective, SequenceStats, Tokens, bounded, uniform
from trainer.objectives.config import (
    IwOpdConfig,
    ObjectiveConfig,
    OpdConfig,
    PowerOpdConfig,
    SgOpdConfig,
    VopdConfig,
)


def opd(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """On-policy distillation: the sampled reverse KL to the teacher, the same for all."""
    alike = uniform(stats, stats.correct | stats.incorrect, config)
    return Coefficients(reinforce=torch.zeros_like(alike), distil=alike)


def power_advantage(tokens: Tokens, config: PowerOpdConfig) -> Tensor:
    """PowerOPD (arXiv 2606.17199): π_T^α − π_S^α, which lies in [−1, 1] and has the log-ratio's
    sign. Divided by α, it tends to the log-ratio as α goes to 0."""
    power = torch.exp(config.alpha * tokens.teacher) - torch.exp(config.alpha * tokens.student)
    return tokens.distil * power


def iw_advantage(tokens: Tokens, config: IwOpdConfig) -> Tensor:
    """IW-OPD (arXiv 2606.22600, algorithm 1): with a = log π_T − log π_old, the token's

        A_t = (1 + γ (1 − Σ_{s<t} |a_s| / Σ_s |a_s|)) · a_t

    The earlier a token, the closer the student still is to where the teacher would be."""
    a = bounded(torch.where(tokens.distil != 0, tokens.teacher - tokens.behaviour, 0.0), config)
    drift = tokens.before(a.abs()) / tokens.total(a.abs()).clamp_min(1e-8)
    return tokens.distil * (1 + config.gamma * (1 - drift)) * a


def sg_advantage(tokens: Tokens, config: SgOpdConfig) -> Tensor:
    """SG-OPD (arXiv 2606.09304): the log-ratio, amplified where its sign is the verdict's and
    damped elsewhere.

    Made after summaries of the paper, which gives the two factors 1.8 and 1 and extrapolates
    from a reference model; its rollouts of the teacher at the beginning are left out."""
    ratio = bounded(tokens.log_ratio, config)
    agrees = torch.where(tokens.correct, ratio > 0, tokens.incorrect & (ratio < 0))
    return tokens.distil * torch.where(agrees, config.agree, config.disagree) * ratio


def v_advantage(tokens: Tokens, config: VopdConfig) -> Tensor:
    """vOPD (arXiv 2605.07865): the log-ratio minus its expectation under the student, which is
    −KL(π_S ‖ π_T). A baseline leaves the gradient's expectation as it is and takes variance away.
    The paper sums over the vocabulary or the student's most likely tokens; this one over those and,
    as one, all others, which is the whole sum once k is the vocabulary."""
    return tokens.distil * (bounded(tokens.log_ratio, config) + tokens.reverse_kl)


OPD = Objective(OpdConfig, opd, teacher="all")
POWER_OPD = Objective(PowerOpdConfig, opd, teacher="all", advantage=power_advantage)
IW_OPD = Objective(IwOpdConfig, opd, teacher="all", advantage=iw_advantage)
SG_OPD = Objective(SgOpdConfig, opd, teacher="all", advantage=sg_advantage, any_tokenizer=True)
VOPD = Objective(VopdConfig, opd, teacher="all", advantage=v_advantage)
