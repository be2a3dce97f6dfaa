"""Scored groups as one flat batch, its fair split over ranks, and its micro-batches.

Axes: `N` trajectories of the global batch, `C` completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.attention import on_device
from services.packed import Pack, pack
from services.trajectory import LogProbs, ScoredGroup, TokenIds, TopTokens
from trainer.objectives import TeacherNeed


class BadGroup(ValueError):
    """A scored group that must not be trained on; the message says why."""


def check(group: ScoredGroup, need: TeacherNeed, top: int = 0) -> None:
    """Refuses a group whose numbers would poison the gradient, or lack a score or, where they
    are needed, the teacher's `top` most likely tokens.

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
            if top:
                _check_top(f"teacher's top {top} of trajectory {place}", teacher, group, place, top)
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


def _check_top(what: str, teacher: LogProbs, group: ScoredGroup, place: int, top: int) -> None:
    found = group.teacher_top.get(place)
    if found is None or found.ids.shape != (len(teacher), top):
        raise BadGroup(f"{what}: {'none' if found is None else found.ids.shape}")
    if not np.isfinite(found.logprobs).all():
        raise BadGroup(f"{what}: not finite")


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory of the batch with its prompt."""

    prompt: TokenIds  # [P]
    completion: TokenIds  # [T]
    behaviour: LogProbs  # [T] under the distribution that sampled
    teacher: LogProbs | None  # [T]
    top: TopTokens | None = None  # [T, k]


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
            Sample(
                g.prompt.token_ids,
                t.token_ids,
                t.logprobs,
                g.teacher_logprobs.get(i),
                g.teacher_top.get(i),
            )
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


def fits(batch: Batch, member: Tensor, budget: int) -> Tensor:
    """[N] bool: whether all members of a trajectory's group have room in one micro-batch."""
    tokens = torch.zeros(batch.group_count, dtype=torch.int64)
    return (tokens.index_add(0, batch.group, batch.tokens * member) <= budget)[batch.group]


def micro_batches(
    batch: Batch, indices: Sequence[int], budget: int, together: Tensor | None = None
) -> list[list[int]]:
    """Fills micro-batches of at most `budget` tokens (a longer sequence goes alone): largest
    first, each into the first that has room, which makes few of them.

    Args:
        together: [N] bool, whose groups go whole into one micro-batch.
    """
    units: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        alone = together is None or not together[index]
        units.setdefault((int(batch.group[index]), index if alone else -1), []).append(index)
    sizes = {unit: int(batch.tokens[members].sum()) for unit, members in units.items()}
    parts: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda u: (-sizes[u], u)):
        place = next((i for i, left in enumerate(room) if left >= sizes[unit]), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(budget)
        parts[place] += units[unit]
        room[place] -= sizes[unit]
    return parts


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward works on, on the device."""

    pack: Pack
    sequence: Tensor  # [C] int64, place in the global batch of each token's trajectory
    behaviour: Tensor  # [C] float32
    teacher: Tensor  # [C] float32, 0 where there is no score
    top_ids: Tensor | None = None  # [C, k] int64, the teacher's most likely tokens
    top_logprobs: Tensor | None = None  # [C, k] float32; evenly spread where there is no score

    @staticmethod
    def of(batch: Batch, indices: Sequence[int], device: torch.device) -> MicroBatch:
        """Packs the trajectories at `indices` and moves them to `device`."""
        chosen = [batch.sequences[i] for i in indices]
        packed = pack(
            [np.concatenate([s.prompt, s.completion]) for s in chosen],
            [len(s.prompt) for s in chosen],
        )
        teacher = [
            s.teacher if s.teacher is not None else np.zeros(len(s.completion), np.float32)
            for s in chosen
        ]
        arrays = {
            "sequence": np.repeat(np.asarray(indices, np.int64), packed.lengths),
            "behaviour": np.concatenate([s.behaviour for s in chosen]),
            "teacher": np.concatenate(teacher),
            **_top_tokens(chosen),
        }
        tensors = {n: on_device(torch.from_numpy(a), device) for n, a in arrays.items()}
        return MicroBatch(pack=packed.to(device), **tensors)


def _top_tokens(samples: Sequence[Sample]) -> dict[str, npt.NDArray[Any]]:
    """The rows of each sample, some for those without, which are not trained on them; nothing
    when none has any."""
    k = next((s.top.ids.shape[1] for s in samples if s.top is not None), 0)
    if k == 0:
        return {}
    shapes = [(len(s.completion), k) for s in samples]
    ids = [
        s.top.ids if s.top is not None else np.zeros(shape, np.int32)
        for s, shape in zip(samples, shapes, strict=True)
    ]
    logprobs = [
        s.top.logprobs if s.top is not None else np.full(shape, -np.log(k + 1.0), np.float32)
        for s, shape in zip(samples, shapes, strict=True)
    ]
    return {
        "top_ids": np.concatenate(ids).astype(np.int64),
        "top_logprobs": np.concatenate(logprobs),
    }
