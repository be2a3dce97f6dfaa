"""What an objective is: a pure function from a scored batch to coefficients of trajectories and,
where it looks at tokens, one from tokens' own numbers to their advantages.

All train on one surrogate, `−Σ_t ρ_t A_t`. Without an `advantage` of its own, an objective has

    A_t = reinforce + distil · (log π_T(y_t) − log π_S̄(y_t))        (S̄: detached)

so that it only says how strongly each trajectory is reinforced and how strongly it is pulled
towards the teacher. ρ, its truncation, the surrogate and the sums are the learner's. A new
objective is a function or two and one `Objective`, in this folder or in a package of your own
(docs/objectives.md has an example).

Axes: `N` trajectories of the global batch, `G` groups (prompts), `C` tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from services.teacher_need import TeacherNeed
from trainer.divergence import divergence, entropy
from trainer.objectives.config import ObjectiveConfig
from trainer.scope import path_weights

SettingsT = TypeVar("SettingsT", bound=ObjectiveConfig)

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


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What objectives see of the sampled tokens of a micro-batch: detached, on the device, every
    trajectory whole and in order. Log-probs in nats, at temperature 1 but for `behaviour`."""

    trajectory: Tensor  # [C] int64, its index in the global batch
    student: Tensor  # [C]
    teacher: Tensor  # [C] 0 where there is no score; a chunk's with its first token
    behaviour: Tensor  # [C] under the distribution that sampled
    reinforce: Tensor  # [C] the trajectory's
    distil: Tensor  # [C] the trajectory's
    correct: Tensor  # [C] bool
    incorrect: Tensor  # [C] bool
    count: int  # N
    student_top: Tensor | None = None
    """[C, k] the student's log-probs of the most likely tokens (`top_k_of`)."""
    teacher_top: Tensor | None = None
    """[C, k] the teacher's; −inf for tokens that the student lacks."""
    entropy: Tensor | None = None
    """[C] nats, the teacher's over the vocabulary; 0 where there is no score."""
    chunk: Tensor | None = None
    """[C] int64, below C: which of them share one log-prob of a teacher with another tokenizer."""

    @property
    def share(self) -> Tensor:
        """[C] what each token adds to the log-ratios of all; 0 where the teacher has no say."""
        return torch.where(self.distil != 0, self.teacher - self.student, 0.0)

    @property
    def log_ratio(self) -> Tensor:
        """[C] log π_T − log π_S; 0 where the teacher has no say. Under another tokenizer that of
        the whole chunk, for each of its tokens: the policy gradient of the chunk's reverse KL."""
        if self.chunk is None:
            return self.share
        of_chunk = torch.zeros_like(self.share).index_add(0, self.chunk, self.share)
        return of_chunk[self.chunk]

    @property
    def reverse_kl(self) -> Tensor:
        """[C] KL(π_S ‖ π_T) over the most likely tokens and, as one, all others."""
        if self.student_top is None or self.teacher_top is None:
            return torch.zeros_like(self.student)
        return divergence(self.student_top, self.teacher_top, "reverse_kl")

    @property
    def teacher_entropy(self) -> Tensor:
        """[C] nats, over the vocabulary where that was asked for; else over the most likely tokens
        and, as one, all others, which is at most that."""
        if self.entropy is not None:
            return self.entropy
        if self.teacher_top is None:
            return torch.zeros_like(self.student)
        return entropy(self.teacher_top)

    @property
    def length(self) -> Tensor:
        """[C] int64, sampled tokens of each one's trajectory."""
        return torch.bincount(self.trajectory, minlength=self.count)[self.trajectory]

    @property
    def position(self) -> Tensor:
        """[C] int64, which of its trajectory's sampled tokens each is, from 0 on."""
        position = torch.arange(len(self.trajectory), device=self.trajectory.device)
        first = torch.full((self.count,), len(position), device=position.device)
        return (
            position - first.scatter_reduce(0, self.trajectory, position, "amin")[self.trajectory]
        )

    def total(self, values: Tensor) -> Tensor:
        """[C] the sum of `values` [C] over each token's trajectory."""
        return values.new_zeros(self.count).index_add(0, self.trajectory, values)[self.trajectory]

    def before(self, values: Tensor) -> Tensor:
        """[C] the sum of `values` [C] over the tokens before each in its trajectory."""
        running = values.double().cumsum(0) - values  # float64: long micro-batches add up much
        first = torch.arange(len(values), device=values.device) - self.position
        return (running - running[first]).to(values.dtype)

    def rank(self, values: Tensor) -> Tensor:
        """[C] int64, how many tokens of its trajectory come before each in ascending order of
        `values` [C]; of equal ones, the earlier first."""
        order = torch.argsort(values, stable=True)
        order = order[torch.argsort(self.trajectory[order], stable=True)]
        count = torch.bincount(self.trajectory, minlength=self.count)
        position = torch.arange(len(order), device=order.device)
        ranks = position - (count.cumsum(0) - count)[self.trajectory[order]]
        return torch.empty_like(order).index_copy(0, order, ranks)

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """[C] the `q`-quantile of `values` [C] over each token's trajectory, between two of them
        linearly."""
        count = torch.bincount(self.trajectory, minlength=self.count)
        first = (count.cumsum(0) - count)[self.trajectory]
        ordered = torch.empty_like(values).index_copy(0, first + self.rank(values), values)
        rank = q * (count - 1)[self.trajectory].to(values.dtype)
        low = ordered[first + rank.floor().long()]
        return low + rank.frac() * (ordered[first + rank.ceil().long()] - low)

    def lowest(self, values: Tensor, fraction: float) -> Tensor:
        """[C] bool: the `fraction` of each trajectory's tokens with the lowest `values` [C],
        rounded down but for the first."""
        kept = (fraction * self.length).floor().clamp_min(1)
        return self.rank(values) < kept


def plain_advantage(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """[C] the trajectory's coefficients, and nothing of the token but its log-ratio."""
    if config.pull != "sampled":
        return tokens.reinforce
    return tokens.reinforce + tokens.distil * bounded(tokens.log_ratio, config)


def plain_divergence(tokens: Tokens, config: ObjectiveConfig) -> Tensor | None:
    """[C] the weight of each token's divergence from the teacher; None where the log-ratio of the
    sampled token stands for it."""
    return None if config.pull == "sampled" else tokens.distil


def bounded(log_ratio: Tensor, config: ObjectiveConfig) -> Tensor:
    """[C] within the config's `bound`."""
    bound = config.bound
    return log_ratio.clamp(-bound, bound) if bound else log_ratio


@dataclass(frozen=True, slots=True)
class Objective(Generic[SettingsT]):
    """An objective and what it needs to be computed."""

    settings: type[SettingsT]
    """Its settings under `trainer.objective`."""
    coefficients: Callable[[SequenceStats, SettingsT], Coefficients]
    teacher: TeacherNeed
    """Whose log-probs under the teacher are asked for; `distil` must be 0 elsewhere."""
    student_perplexity: bool = False
    """Whether `student_nll` of the correct trajectories is computed (one more forward)."""
    sampler: Sampler = "student"
    """Who samples. What the teacher sampled is trained on as it is, with ρ = 1."""
    under: Callable[[SettingsT], Objective[SettingsT]] | None = None
    """What it becomes under settings that change what it needs."""
    advantage: Callable[[Tokens, SettingsT], Tensor] = plain_advantage
    """[C] A_t of each token; 0 in trajectories whose coefficients are 0."""
    divergence: Callable[[Tokens, SettingsT], Tensor | None] = plain_divergence
    """[C] weights of the divergence from the teacher over its most likely tokens, which is added
    to the loss; None: there is none."""
    any_tokenizer: bool = False
    """Whether an `advantage` of its own reads nothing of the teacher but `log_ratio`, which is all
    that there is of one with another tokenizer."""

    def reads_chunks(self, settings: SettingsT) -> bool:
        """Whether a teacher with another tokenizer can teach by it: one log-prob for each chunk of
        tokens, and no alternatives."""
        return settings.top_tokens == 0 and (
            self.any_tokenizer or self.advantage is plain_advantage
        )


def entering(chosen: Objective[SettingsT], stats: SequenceStats, config: SettingsT) -> Tensor:
    """[N] bool: the trajectories that enter the loss, as far as verdicts tell. The others have
    coefficients of 0 (unknown verdicts, what RFT rejects, GRPO's groups without a difference) and
    are not computed. Where coefficients hang on perplexities, nothing but the verdict is known
    before a forward."""
    if chosen.student_perplexity:
        return stats.correct | stats.incorrect
    coefficients = chosen.coefficients(stats, config)
    return (coefficients.reinforce != 0) | (coefficients.distil != 0)


def group_total(stats: SequenceStats, values: Tensor) -> Tensor:
    """[N] the sum of `values` [N] over each trajectory's group."""
    groups = int(stats.group.max()) + 1 if stats.group.numel() else 0
    return values.new_zeros(groups).index_add(0, stats.group, values)[stats.group]


def uniform(stats: SequenceStats, member: Tensor, config: ObjectiveConfig) -> Tensor:
    """[N] the same weight for every member of a group."""
    return path_weights(
        torch.zeros_like(stats.student_nll),
        stats.group,
        member,
        higher_ppl_higher_weight=True,
        normalization=config.normalization,
    )
