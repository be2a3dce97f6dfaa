"""Objectives that train on some tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.base import Objective, Tokens, bounded
from trainer.objectives.config import OpsaConfig, TaOpdConfig
from trainer.objectives.log_ratio import opd
from trainer.objectives.rewards import everything


def ta_advantage(tokens: Tokens, config: TaOpdConfig) -> Tensor:
    """TA-OPD (arXiv 2605.26844): the log-ratio of the most teachable tokens, where teacher and
    student differ and the teacher's mass lies on what the student considers. Both are brought to
    [0, 1] between their 5 % and 95 % quantiles and multiplied.

    Made after notes on the paper and its code, which choose among the tokens of a batch; here it is
    among those of a trajectory. What the student considers are its 16 most likely tokens."""
    if tokens.teacher_top is None:
        return torch.zeros_like(tokens.student)
    mass = tokens.teacher_top.exp().sum(1)
    differ = _between_quantiles(tokens, tokens.reverse_kl)
    teachable = differ * _between_quantiles(tokens, mass)
    chosen = tokens.lowest(-teachable, config.fraction)
    return tokens.distil * torch.where(chosen, bounded(tokens.log_ratio, config), 0.0)


def _between_quantiles(tokens: Tokens, values: Tensor) -> Tensor:
    low, high = tokens.quantile(values, 0.05), tokens.quantile(values, 0.95)
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def opsa_advantage(tokens: Tokens, config: OpsaConfig) -> Tensor:
    """OPSA (arXiv 2608.31046) with a fixed advantage: the tokens that the student itself finds
    least likely get a negative one, all others none. Trajectories are all alike, as in KD.

    After its authors' code, which chooses among the tokens of a rank's batch; here it is among
    those of a trajectory. Their other mode, whose strength grows with the student's entropy, is
    left out."""
    chosen = tokens.lowest(tokens.student, config.fraction)
    return -config.strength * torch.where(chosen, tokens.reinforce, 0.0)


TA_OPD = Objective(TaOpdConfig, opd, teacher="all", advantage=ta_advantage)
OPSA = Objective(OpsaConfig, everything, teacher="none", advantage=opsa_advantage)
