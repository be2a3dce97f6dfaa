"""SCOPE: each trajectory takes the path that its verdict says."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer.objectives.base import Coefficients, Objective, SequenceStats, Tokens, bounded
from trainer.objectives.config import ScopeConfig
from trainer.objectives.log_ratio import opd
from trainer.scope import path_weights


def scope(stats: SequenceStats, config: ScopeConfig) -> Coefficients:
    """SCOPE: L = Σ_{Ω_c} w_i L_MLE + Σ_{Ω_w} w_i L_OPD, both weights normalised by group."""
    alike = torch.zeros_like(stats.student_nll)
    by_student = config.use_seq_weights and config.use_student_path_weights
    by_teacher = config.use_seq_weights and config.use_teacher_path_weights
    student = path_weights(
        stats.student_nll if by_student else alike,
        stats.group,
        stats.correct,
        tau=config.tau,
        higher_ppl_higher_weight=config.student_path_ppl_positive,
        normalization=config.normalization,
    )
    teacher = path_weights(
        stats.teacher_nll if by_teacher else alike,
        stats.group,
        stats.incorrect,
        tau=config.tau,
        higher_ppl_higher_weight=config.teacher_path_ppl_positive,
        normalization=config.normalization,
    )
    return Coefficients(reinforce=student, distil=teacher)


def _after_first_error(tokens: Tokens, config: ScopeConfig) -> Tensor:
    """[C] `distil`, and 0 before the first token that the teacher finds wrong."""
    assert config.first_error is not None
    wrong = (-tokens.log_ratio > config.first_error).to(tokens.student.dtype)
    return torch.where(tokens.before(wrong) + wrong > 0, tokens.distil, 0.0)


def first_error_advantage(tokens: Tokens, config: ScopeConfig) -> Tensor:
    """SCOPE whose teacher path starts where the teacher and the student part: what stands before
    the first error may well be right. A trajectory without one is left alone. Ours."""
    if config.divergence != "sampled":
        return tokens.reinforce
    pull = bounded(tokens.log_ratio, config)
    return tokens.reinforce + _after_first_error(tokens, config) * pull


def first_error_divergence(tokens: Tokens, config: ScopeConfig) -> Tensor | None:
    """The same where a divergence stands for the log-ratio."""
    return None if config.divergence == "sampled" else _after_first_error(tokens, config)


def _scope_under(config: ScopeConfig) -> Objective[ScopeConfig]:
    weighted = config.use_seq_weights and config.use_student_path_weights
    objective = (
        Objective(ScopeConfig, scope, teacher="incorrect", student_perplexity=weighted)
        if config.use_dual_path_weighting
        else Objective(ScopeConfig, opd, teacher="all")
    )
    if config.first_error is None:
        return objective
    return replace(
        objective,
        advantage=first_error_advantage,
        divergence=first_error_divergence,
        any_tokenizer=True,
    )


SCOPE = Objective(ScopeConfig, scope, teacher="incorrect", under=_scope_under)
