"""What each rank does in one gradient step, decided once from the numbers of the global batch.

Axes: `N` trajectories of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Batch, Family, families, fits, micro_batches, shares
from trainer.config import TrainerConfig
from trainer.objectives.base import Objective, SequenceStats, entering


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One rank's part of a gradient step."""

    batch: Batch  # with the sequences alone that the rank works on
    scored: list[list[Family]]
    """Micro-batches of the forward that only gives perplexities: the weights of a group must be
    known before the first backward, and these groups are spread over micro-batches and ranks."""
    trained: list[list[Family]]
    """Micro-batches of what enters the loss."""
    together: Tensor
    """[N] bool: whose group is one micro-batch as a whole, so that the forward which is trained on
    gives the perplexities as well."""


def plan_step(
    batch: Batch,
    objective: Objective[Any],
    config: TrainerConfig,
    *,
    ranks: int,
    pair_cost: float,
    share: bool,
) -> list[StepPlan]:
    """The plan of each rank.

    Args:
        pair_cost, share: see `trainer.batch.shares`.
    """
    enters = _entering(batch, objective, config)
    # One correct trajectory alone in its group weighs 1, whatever its perplexity.
    several = torch.bincount(batch.group, batch.correct.double())[batch.group] > 1
    hangs = several if objective.student_perplexity else torch.zeros_like(several)
    wanted = hangs & batch.correct
    budget = config.micro_batch_tokens

    def plan(mine: list[int]) -> StepPlan:
        held = families(batch, mine, share)
        whole = ranks == 1 and bool(hangs.any())
        together = hangs & fits(batch, held, budget) if whole else torch.zeros_like(hangs)
        before = [i for i in mine if wanted[i] and not together[i]]
        return StepPlan(
            batch=batch.part(mine),
            scored=micro_batches(batch, families(batch, before, share), budget),
            trained=micro_batches(batch, held, budget, together),
            together=together,
        )

    if ranks == 1:
        return [plan(enters.nonzero().flatten().tolist())]
    passes = 3.0 * enters.double() + wanted  # backward costs twice the forward
    return [plan(mine) for mine in shares(batch, passes, ranks, pair_cost=pair_cost, share=share)]


def _entering(batch: Batch, objective: Objective[Any], config: TrainerConfig) -> Tensor:
    """[N] The trajectories that are computed."""
    nothing = torch.zeros_like(batch.teacher_nll)
    stats = SequenceStats(batch.group, batch.correct, batch.incorrect, nothing, batch.teacher_nll)
    return entering(objective, stats, config.objective)
