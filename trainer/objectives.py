"""Every objective is one pure function from a scored batch to two coefficients a trajectory.

All train on one surrogate, `−Σ_t ρ_t A_t`, with the token advantage

    A_t = reinforce + distil · (log π_T(y_t) − log π_S̄(y_t))        (S̄: detached)

so that an objective only says how strongly each trajectory is reinforced and how strongly it is
pulled towards the teacher. SCOPE reinforces the correct and distils the incorrect; OPD distils
all. A new objective is one function and one `Objective`, here or in a package of your own
(docs/objectives.md has an example).

Axes: `N` trajectories of the global batch, `G` groups (prompts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.scope import path_weights

TeacherNeed: TypeAlias = Literal["incorrect", "all", "none"]
Sampler: TypeAlias = Literal["student", "teacher"]


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
    """Whose log-probs under the teacher are asked for; `distil` must be 0 elsewhere."""
    student_perplexity: bool = False
    """Whether `student_nll` of the correct trajectories is computed (one more forward)."""
    sampler: Sampler = "student"
    """Who samples. What the teacher sampled is trained on as it is, with ρ = 1."""


def entering(chosen: Objective, stats: SequenceStats, config: ObjectiveConfig) -> Tensor:
    """[N] bool: the trajectories that enter the loss, as far as verdicts tell. The others have
    coefficients of 0 (unknown verdicts, what RFT rejects, GRPO's groups without a difference) and
    are not computed. Where coefficients hang on perplexities, nothing but the verdict is known
    before a forward."""
    if chosen.student_perplexity:
        return stats.correct | stats.incorrect
    found = chosen.coefficients(stats, config)
    return (found.reinforce != 0) | (found.distil != 0)


class ObjectiveError(ValueError):
    """There is no such objective; the message says why."""


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
    uniform = _uniform(stats, stats.correct | stats.incorrect, config)
    return Coefficients(reinforce=torch.zeros_like(uniform), distil=uniform)


def grpo(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """GRPO (arXiv 2402.03300) without a teacher and without the division by each length: the
    reward, 1 or 0, minus its group's mean and over its standard deviation (of the population).
    A group that is all correct or all incorrect teaches nothing."""
    known = stats.correct | stats.incorrect
    reward = stats.correct.to(stats.student_nll.dtype)
    # Whole numbers, so that a group without a difference has a deviation of exactly 0.
    count, right = _total(stats, known.to(reward.dtype)), _total(stats, reward)
    deviation = torch.sqrt(right * (count - right)) / count.clamp_min(1)
    advantage = (reward - right / count.clamp_min(1)) / deviation
    reinforce = _uniform(stats, known, config) * torch.where(deviation > 0, advantage, 0.0)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def kdrl(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """KDRL (arXiv 2506.02208): GRPO's reward and, `kl_coef` times, OPD's reverse KL."""
    return Coefficients(
        reinforce=grpo(stats, config).reinforce,
        distil=config.kl_coef * opd(stats, config).distil,
    )


def rft(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """Rejection-sampling fine-tuning: maximum likelihood on the correct, all alike."""
    reinforce = _uniform(stats, stats.correct, config)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def kd(stats: SequenceStats, config: ObjectiveConfig) -> Coefficients:
    """Sequence-level distillation (arXiv 1606.07947): maximum likelihood on all of the teacher's
    own samples, which the verdict does not sort, so that it is the classic baseline."""
    reinforce = _uniform(stats, stats.correct | stats.incorrect, config)
    return Coefficients(reinforce=reinforce, distil=torch.zeros_like(reinforce))


def _total(stats: SequenceStats, values: Tensor) -> Tensor:
    """[N] the sum of `values` [N] over each trajectory's group."""
    groups = int(stats.group.max()) + 1 if stats.group.numel() else 0
    return values.new_zeros(groups).index_add(0, stats.group, values)[stats.group]


def _uniform(stats: SequenceStats, member: Tensor, config: ObjectiveConfig) -> Tensor:
    """[N] the same weight for every member of a group."""
    return path_weights(
        torch.zeros_like(stats.student_nll),
        stats.group,
        member,
        higher_ppl_higher_weight=True,
        normalization=config.normalization,
    )


def objective(config: ObjectiveConfig) -> Objective:
    """The configured objective.

    Raises:
        ObjectiveError: `kind` names a package of one's own that has no such `Objective`.
    """
    kind = config.kind
    if kind == "scope" and config.use_dual_path_weighting:
        weighted = config.use_seq_weights and config.use_student_path_weights
        return Objective(scope, teacher="incorrect", student_perplexity=weighted)
    if ":" in kind:
        return _imported(kind)
    return _OTHERS["opd" if kind == "scope" else kind]


_OTHERS = {
    "opd": Objective(opd, teacher="all"),
    "grpo": Objective(grpo, teacher="none"),
    "rft": Objective(rft, teacher="none"),
    "kdrl": Objective(kdrl, teacher="all"),
    "kd": Objective(kd, teacher="none", sampler="teacher"),
}


def _imported(kind: str) -> Objective:
    module, _, name = kind.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"trainer.objective.kind {kind!r}: {error}") from error
    if not isinstance(found, Objective):
        raise ObjectiveError(f"trainer.objective.kind {kind!r} is no Objective")
    return found
