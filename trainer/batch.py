"""Scored groups as one flat batch, its fair split over ranks, and its micro-batches.

Axes: `N` trajectories of the global batch, `C` completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from services.packed import Pack, pack
from services.trajectory import LogProbs, ScoredGroup, TokenIds
from trainer.objectives import TeacherNeed


class BadGroup(ValueError):
    """A scored group that must not be trained on; the message says why."""


def check(group: ScoredGroup, need: TeacherNeed) -> None:
    """Refuses a group whose numbers would poison the gradient, or lack a score.

    Raises:
        BadGroup: a log-prob is missing, not finite or positive, or lengths differ.
    """
    if len(group.prompt.token_ids) == 0:
        raise BadGroup("the prompt is empty, so the first token has no log-prob")
    scored = {"incorrect": ("incorrect",), "all": ("correct", "incorrect"), "none": ()}[need]
    for place, (trajectory, verdict) in enumerate(
        zip(group.rollout.trajectories, group.verified.verdicts, strict=True)
    ):
        _check_logprobs(f"rollout log-probs of trajectory {place}", trajectory, trajectory.logprobs)
        teacher = group.teacher_logprobs.get(place)
        if teacher is not None:
            _check_logprobs(f"teacher log-probs of trajectory {place}", trajectory, teacher)
        elif verdict.outcome in scored:
            raise BadGroup(f"trajectory {place} is {verdict.outcome} and has no teacher score")


def _check_logprobs(what: str, trajectory: object, values: LogProbs) -> None:
    length = len(trajectory.token_ids)  # type: ignore[attr-defined]
    if len(values) != length:
        raise BadGroup(f"{what}: {len(values)} values for {length} tokens")
    if not np.isfinite(values).all():
        raise BadGroup(f"{what}: not finite")
    if (values > 1e-4).any():
        raise BadGroup(f"{what}: {values.max():.4g} is positive")


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory of the batch with its prompt."""

    prompt: TokenIds  # [P]
    completion: TokenIds  # [T]
    behaviour: LogProbs  # [T] under the distribution that sampled
    teacher: LogProbs | None  # [T]


@dataclass(frozen=True, slots=True)
class Batch:
    """The global batch of one gradient step. Its numbers are the same on every rank; the
    sequences may be those alone that a rank works on (`part`)."""

    groups: tuple[ScoredGroup, ...]  # none in a part
    group_count: int
    sequences: Mapping[int, Sample]  # by place in the batch
    group: Tensor  # [N] int64
    correct: Tensor  # [N] bool
    incorrect: Tensor  # [N] bool
    lengths: Tensor  # [N] int64, completion tokens
    tokens: Tensor  # [N] int64, prompt and completion tokens
    teacher_nll: Tensor  # [N] float32, 0 where there is no score

    @staticmethod
    def of(groups: Sequence[ScoredGroup]) -> Batch:
        """Flattens groups, which `check` has passed, in the order of their prompts, so that a
        step does not depend on the order in which they arrived."""
        ordered = tuple(sorted(groups, key=lambda g: g.prompt.order))
        sequences = [
            Sample(g.prompt.token_ids, t.token_ids, t.logprobs, g.teacher_logprobs.get(i))
            for g in ordered
            for i, t in enumerate(g.rollout.trajectories)
        ]
        outcomes = [
            v.outcome if len(t.token_ids) else "empty"  # nothing to train on: on neither path
            for g in ordered
            for t, v in zip(g.rollout.trajectories, g.verified.verdicts, strict=True)
        ]
        sizes = torch.tensor([len(g.rollout.trajectories) for g in ordered])
        return Batch(
            groups=ordered,
            group_count=len(ordered),
            sequences=dict(enumerate(sequences)),
            group=torch.repeat_interleave(torch.arange(len(ordered)), sizes),
            correct=torch.tensor([o == "correct" for o in outcomes]),
            incorrect=torch.tensor([o == "incorrect" for o in outcomes]),
            lengths=torch.tensor([len(s.completion) for s in sequences]),
            tokens=torch.tensor([len(s.prompt) + len(s.completion) for s in sequences]),
            teacher_nll=torch.tensor(
                [
                    -float(s.teacher.mean()) if s.teacher is not None and len(s.teacher) else 0.0
                    for s in sequences
                ]
            ),
        )

    def part(self, mine: Iterable[int]) -> Batch:
        """The same batch with the sequences at `mine` alone: what another rank is sent."""
        return replace(self, groups=(), sequences={i: self.sequences[i] for i in mine})


def shares(batch: Batch, passes: Tensor, ranks: int, *, pair_cost: float) -> list[list[int]]:
    """Which trajectories each rank works on: the dearest first, each to the rank with the least
    work so far. The same on every rank, so nothing needs to be communicated.

    Args:
        passes: [N] how often a trajectory goes through the model; 0 for one that nobody needs.
        pair_cost: what two tokens that see each other cost (attention), where one token by
            itself (the linear layers) costs 1. A sequence costs its Σ length and Σ length².
    """
    work = (passes * batch.tokens * (1.0 + pair_cost * batch.tokens)).tolist()
    load = [0.0] * ranks
    made: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        if work[index]:
            lightest = load.index(min(load))
            load[lightest] += work[index]
            made[lightest].append(index)
    return [sorted(part) for part in made]


def micro_batches(batch: Batch, indices: Sequence[int], budget: int) -> list[list[int]]:
    """Splits `indices` into micro-batches of at most `budget` tokens (a longer sequence goes
    alone), of similar lengths each, which is what padded attention on CPU likes."""
    parts: list[list[int]] = []
    spent = budget
    tokens = batch.tokens.tolist()
    for index in sorted(indices, key=lambda i: (tokens[i], i)):
        cost = tokens[index]
        if spent + cost > budget:
            parts.append([])
            spent = 0
        parts[-1].append(index)
        spent += cost
    return parts


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward works on, on the device."""

    pack: Pack
    sequence: Tensor  # [C] int64, place in the global batch of each token's trajectory
    behaviour: Tensor  # [C] float32
    teacher: Tensor  # [C] float32, 0 where there is no score

    @staticmethod
    def of(batch: Batch, indices: Sequence[int], device: torch.device) -> MicroBatch:
        """Packs the trajectories at `indices` and moves them to `device`."""
        chosen = [batch.sequences[i] for i in indices]
        packed = pack(
            [np.concatenate([s.prompt, s.completion]).tolist() for s in chosen],
            [len(s.prompt) for s in chosen],
        )
        teacher = [
            s.teacher if s.teacher is not None else np.zeros(len(s.completion), np.float32)
            for s in chosen
        ]
        return MicroBatch(
            pack=packed.to(device),
            sequence=torch.repeat_interleave(
                torch.tensor(indices), torch.tensor(packed.lengths)
            ).to(device),
            behaviour=torch.from_numpy(np.concatenate([s.behaviour for s in chosen])).to(device),
            teacher=torch.from_numpy(np.concatenate(teacher)).to(device),
        )
