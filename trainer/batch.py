"""Scored groups as one flat batch, its fair split over ranks, and its micro-batches.

Axes: `N` trajectories of the global batch, `C` completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.attention import on_device
from services.errors import BadItem
from services.packed import Pack, pack
from services.teacher_need import SCORED, TeacherNeed
from services.trajectory import LogProbs, Mask, ScoredGroup, TokenIds, TopTokens, Trajectory

# A prompt is shared where that spares so much of what remains. Less than 0.07 did not pay for
# merging what each answer sees of itself and of the prompt (docs/learner.md).
MIN_SPARED = 0.1
_MOST_MASS = 1.01  # of some tokens of a distribution, with all that servers round


class BadGroup(BadItem):
    """A scored group that must not be trained on; the message says why."""


def check(
    group: ScoredGroup,
    need: TeacherNeed,
    top: int = 0,
    *,
    vocabulary: int,
    entropy: bool = False,
) -> None:
    """Refuses a group whose numbers would poison the gradient, or that lacks a score or, where
    they are needed, the `top` most likely tokens or the teacher's `entropy`, or has tokens that are
    not among the student's `vocabulary`. What passes cannot make a step fail.

    Raises:
        BadGroup: a log-prob is missing, not finite or positive, lengths differ, or a token is
            unknown.
    """
    if len(group.prompt.token_ids) == 0:
        raise BadGroup("the prompt is empty, so the first token has no log-prob")
    _check_tokens("the prompt", group.prompt.token_ids, vocabulary)
    for index, (trajectory, verdict) in enumerate(
        zip(group.rollout.trajectories, group.verified.verdicts, strict=True)
    ):
        _check_tokens(f"trajectory {index}", trajectory.token_ids, vocabulary)
        _check_logprobs(f"rollout log-probs of trajectory {index}", trajectory, trajectory.logprobs)
        teacher = group.teacher_logprobs.get(index)
        if teacher is not None:
            _check_logprobs(f"teacher log-probs of trajectory {index}", trajectory, teacher)
            if top:
                _check_top(f"top {top} of trajectory {index}", teacher, group, index, top)
            spread = group.teacher_entropy.get(index, np.empty(0))
            if entropy and not (len(spread) == len(teacher) and np.isfinite(spread).all()):
                raise BadGroup(f"teacher's entropy of trajectory {index}: missing, or not finite")
            if group.chunks:
                _check_chunks(f"chunks of trajectory {index}", trajectory, group.chunks.get(index))
        elif verdict.outcome in SCORED[need]:
            raise BadGroup(f"trajectory {index} is {verdict.outcome} and has no teacher score")


def _check_tokens(what: str, ids: TokenIds, vocabulary: int) -> None:
    unknown = ids[(ids < 0) | (ids >= vocabulary)]
    if len(unknown):
        raise BadGroup(f"{what}: token {unknown[0]} is not among the student's {vocabulary}")


def _check_logprobs(what: str, trajectory: object, values: LogProbs) -> None:
    length = len(trajectory.token_ids)  # type: ignore[attr-defined]
    if len(values) != length:
        raise BadGroup(f"{what}: {len(values)} values for {length} tokens")
    if not np.isfinite(values).all():
        raise BadGroup(f"{what}: not finite")
    if (values > 1e-4).any():
        raise BadGroup(f"{what}: {values.max():.4g} is positive")


def _check_chunks(what: str, trajectory: Trajectory, chunks: TokenIds | None) -> None:
    if chunks is None or len(chunks) != len(trajectory.token_ids):
        raise BadGroup(f"{what}: {0 if chunks is None else len(chunks)} for its tokens")
    if trajectory.mask is not None:
        raise BadGroup(f"{what}: the world wrote some of its tokens")
    steps = np.diff(chunks[chunks >= 0], prepend=-1)
    if (chunks < -1).any() or (steps < 0).any() or (steps > 1).any() or (steps[:1] == 0).any():
        raise BadGroup(f"{what}: not in order")


def _check_top(what: str, teacher: LogProbs, group: ScoredGroup, index: int, top: int) -> None:
    top_scores = group.teacher_top.get(index)
    if top_scores is None or top_scores.ids.shape != (len(teacher), top):
        raise BadGroup(f"{what}: {'none' if top_scores is None else top_scores.ids.shape}")
    if top_scores.logprobs.shape != top_scores.ids.shape:
        raise BadGroup(
            f"{what}: {top_scores.logprobs.shape} log-probs of {top_scores.ids.shape} tokens"
        )
    if (top_scores.ids < 0).any():
        raise BadGroup(f"{what}: token {top_scores.ids.min()}")
    if not np.isfinite(top_scores.logprobs).all():
        raise BadGroup(f"{what}: not finite")
    mass = np.exp(top_scores.logprobs.astype(np.float64)).sum(1).max(initial=0.0)
    if mass > _MOST_MASS:
        raise BadGroup(f"{what}: their probabilities add up to {mass:.4g}")


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory of the batch with its prompt."""

    prompt: TokenIds  # [P]
    completion: TokenIds  # [L] all tokens after the prompt
    behaviour: LogProbs  # [L] under the distribution that sampled
    teacher: LogProbs | None  # [L]
    top: TopTokens | None = None  # [L, k]
    mask: Mask | None = None  # [L] which tokens are trained on; None: all
    chunks: TokenIds | None = None  # [L] see `ScoredGroup`; None: each token is one
    entropy: LogProbs | None = None  # [L] the teacher's

    @staticmethod
    def of(group: ScoredGroup, index: int) -> Sample:
        """Of one trajectory: trained on are the tokens that the student sampled, without those of
        which a teacher with another tokenizer can say nothing."""
        one, mask = group.rollout.trajectories[index], group.rollout.trajectories[index].mask
        if (chunks := group.chunks.get(index)) is not None and (chunks < 0).any():
            mask = chunks >= 0
        return Sample(
            group.prompt.token_ids,
            one.token_ids,
            one.logprobs,
            group.teacher_logprobs.get(index),
            group.teacher_top.get(index),
            mask,
            chunks,
            group.teacher_entropy.get(index),
        )

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.completion) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class Batch:
    """The global batch of one gradient step. Its numbers are the same on every rank; the
    sequences may be those alone that a rank works on (`part`)."""

    groups: tuple[ScoredGroup, ...]  # none in a part
    group_count: int
    sequences: Mapping[int, Sample]  # by index in the batch
    group: Tensor  # [N] int64
    correct: Tensor  # [N] bool
    incorrect: Tensor  # [N] bool
    lengths: Tensor  # [N] int64, tokens after the prompt
    sampled: Tensor  # [N] int64, those of them that are trained on
    tokens: Tensor  # [N] int64, prompt and completion tokens
    teacher_nll: Tensor  # [N] float32, 0 where there is no score

    @staticmethod
    def of(groups: Sequence[ScoredGroup]) -> Batch:
        """Flattens groups, which `check` has passed, in the order of their prompts, so that a
        step does not depend on the order in which they arrived."""
        ordered = tuple(sorted(groups, key=lambda g: g.prompt.order))
        sequences = [Sample.of(g, i) for g in ordered for i in range(len(g.rollout.trajectories))]
        verdicts = (v for g in ordered for v in g.verified.verdicts)
        outcomes = [
            v.outcome if s.trained else "empty"  # nothing to train on: on neither path
            for s, v in zip(sequences, verdicts, strict=True)
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
            sampled=torch.tensor([s.trained for s in sequences]),
            tokens=torch.tensor([len(s.prompt) + len(s.completion) for s in sequences]),
            teacher_nll=torch.tensor([_mean_nll(s.teacher, s.mask) for s in sequences]),
        )

    def part(self, mine: Iterable[int]) -> Batch:
        """The same batch with the sequences at `mine` alone: what another rank is sent."""
        return replace(self, groups=(), sequences={i: self.sequences[i] for i in mine})


Family = list[int]  # indices of trajectories that lie in a micro-batch after one prompt


def families(batch: Batch, indices: Iterable[int], share: bool) -> list[Family]:
    """The trajectories at `indices`: those of a group together where it pays that they `share`
    their prompt, others by themselves."""
    groups: dict[int, Family] = {}
    for index in indices:
        groups.setdefault(int(batch.group[index]), []).append(index)
    made: list[Family] = []
    for members in groups.values():
        spared = int(batch.tokens[members].sum()) - size(batch, members)
        pays = share and spared > 0 and spared >= MIN_SPARED * size(batch, members)
        made += [members] if pays else [[i] for i in members]
    return made


def size(batch: Batch, family: Family) -> int:
    """Tokens of a family: its prompt once, and its answers."""
    answers = int(batch.lengths[family].sum())
    return answers + int(batch.tokens[family[0]] - batch.lengths[family[0]])


def shares(
    batch: Batch, passes: Tensor, ranks: int, *, pair_cost: float, share: bool = False
) -> list[list[int]]:
    """Which trajectories each rank works on: the dearest first, each to the rank with the least
    work so far. The same on every rank, so nothing needs to be communicated. Families stay whole,
    unless the busiest rank has less to do when each answer is dealt out by itself.

    Args:
        passes: [N] how often a trajectory goes through the model; 0 for one that nobody needs.
        pair_cost: what two tokens that see each other cost (attention), where one token by
            itself (the linear layers) costs 1. A sequence costs its Σ length and Σ length².
        share: whether answers may share their prompt, which then costs once where they are.
    """
    alone = batch.tokens - batch.lengths  # the prompts
    whole: list[float] = (passes * batch.tokens * (1.0 + pair_cost * batch.tokens)).tolist()
    prompt: list[float] = (passes * alone * (1.0 + pair_cost * alone)).tolist()
    needed = [i for i, work in enumerate(whole) if work]
    kept = families(batch, needed, share)
    label = {i: number for number, family in enumerate(kept) for i in family}

    def work(part: Iterable[int]) -> float:
        once: dict[int, float] = {}
        for i in part:
            once[label[i]] = max(once.get(label[i], 0.0), prompt[i])
        return sum(whole[i] - prompt[i] for i in part) + sum(once.values())

    def dealt(units: Sequence[Family]) -> list[list[int]]:
        load = [0.0] * ranks
        made: list[list[int]] = [[] for _ in range(ranks)]
        for cost, unit in sorted(
            ((work(unit), unit) for unit in units), key=lambda x: (-x[0], x[1])
        ):
            lightest = load.index(min(load))
            load[lightest] += cost
            made[lightest] += unit
        return [sorted(part) for part in made]

    ways = [dealt(kept)]
    if len(kept) < len(needed):
        ways.append(dealt([[i] for i in needed]))
    return min(ways, key=lambda made: max(map(work, made)))


def fits(batch: Batch, held: Iterable[Family], budget: int) -> Tensor:
    """[N] bool: whether all `held` families of a trajectory's group have room in one
    micro-batch."""
    tokens = torch.zeros(batch.group_count, dtype=torch.int64)
    for family in held:
        tokens[batch.group[family[0]]] += size(batch, family)
    return (tokens <= budget)[batch.group]


def micro_batches(
    batch: Batch, held: Iterable[Family], budget: int, together: Tensor | None = None
) -> list[list[Family]]:
    """Fills micro-batches of at most `budget` tokens (a longer sequence goes alone): largest
    first, each into the first that has room, which makes few of them. A family with no room in one
    is cut into several.

    Args:
        held: who share their prompt, which then counts once (`families`).
        together: [N] bool, whose groups go whole into one micro-batch.
    """
    units: list[list[Family]] = []
    whole: dict[int, list[Family]] = {}
    for family in held:
        if together is not None and together[family[0]]:
            whole.setdefault(int(batch.group[family[0]]), []).append(family)
            continue
        room = budget - size(batch, family) + int(batch.lengths[family].sum())
        parts = _first_fit(batch.lengths[family].tolist(), room)
        units += [[[family[i] for i in part]] for part in parts]
    units += whole.values()
    sizes = [sum(size(batch, family) for family in unit) for unit in units]
    return [[family for i in part for family in units[i]] for part in _first_fit(sizes, budget)]


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sizes: the largest first, each into the first part that has room."""
    parts: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = next((i for i, left in enumerate(room) if left >= sizes[index]), len(parts))
        if at == len(parts):
            parts.append([])
            room.append(budget)
        parts[at].append(index)
        room[at] -= sizes[index]
    return parts


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward works on, on the device."""

    pack: Pack
    sequence: Tensor  # [C] int64, index in the global batch of each token's trajectory
    behaviour: Tensor  # [C] float32
    teacher: Tensor  # [C] float32, 0 where there is no score
    top_ids: Tensor | None = None  # [C, k] int64, the most likely tokens
    top_logprobs: Tensor | None = None
    """[C, k] float32; evenly spread where there is no score, −inf where the student has no such
    token."""
    sampled: Tensor | None = None
    """[C] int64: which of the pack's completion tokens are trained on; None: all. `top_ids` alone
    is of all of them, because the forward asks for it."""
    chunk: Tensor | None = None
    """[C] int64, below C: tokens with the same number share the teacher's log-prob, which stands
    with the first of them; None: each has its own."""
    entropy: Tensor | None = None  # [C] float32, the teacher's; 0 where there is no score

    @staticmethod
    def of(
        batch: Batch, held: Sequence[Family], device: torch.device, *, vocabulary: int
    ) -> MicroBatch:
        """Packs the families and moves them to `device`. The teacher's tokens that are not among
        the student's `vocabulary` belong to the tail (`trainer.divergence`)."""
        indices = [i for family in held for i in family]
        chosen = [batch.sequences[i] for i in indices]
        packed = pack(
            [np.concatenate([s.prompt, s.completion]) for s in chosen],
            [len(s.prompt) for s in chosen],
            families=_consecutive(map(len, held)),
        )
        nothing = [np.zeros(len(s.completion), np.float32) for s in chosen]
        teacher = [
            n if s.teacher is None else s.teacher for s, n in zip(chosen, nothing, strict=True)
        ]
        arrays = {
            "sequence": np.repeat(np.asarray(indices, np.int64), packed.lengths),
            "behaviour": np.concatenate([s.behaviour for s in chosen]),
            "teacher": np.concatenate(teacher),
            **_top_tokens(chosen, vocabulary),
        }
        if any(s.entropy is not None for s in chosen):
            arrays["entropy"] = np.concatenate(
                [
                    n if s.entropy is None else s.entropy
                    for s, n in zip(chosen, nothing, strict=True)
                ]
            )
        if any(s.mask is not None for s in chosen):
            masks = [
                np.ones(len(s.completion), np.bool_) if s.mask is None else s.mask for s in chosen
            ]
            arrays["sampled"] = np.flatnonzero(np.concatenate(masks))
            for name in arrays.keys() - {"sampled", "top_ids"}:
                arrays[name] = arrays[name][arrays["sampled"]]
        if any(s.chunks is not None for s in chosen):
            arrays["chunk"] = _numbered(chosen)
        tensors = {n: on_device(torch.from_numpy(a), device) for n, a in arrays.items()}
        return MicroBatch(pack=packed.to(device), **tensors)


def _mean_nll(logprobs: LogProbs | None, mask: Mask | None) -> float:
    """Over the sampled tokens; 0 where there is none, or no score."""
    if logprobs is None:
        return 0.0
    chosen = logprobs if mask is None else logprobs[mask]
    return -float(chosen.mean()) if len(chosen) else 0.0


def _numbered(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """[C] the chunks of all samples, numbered through; a token without one is its own."""
    starts = [
        np.ones(s.trained, np.bool_)
        if s.chunks is None
        else np.diff(s.chunks[s.chunks >= 0], prepend=-1) > 0
        for s in samples
    ]
    return np.cumsum(np.concatenate(starts), dtype=np.int64) - 1


def _consecutive(counts: Iterable[int]) -> list[list[int]]:
    """0, 1, … in runs of so many."""
    numbers = count()
    return [list(islice(numbers, n)) for n in counts]


def _top_tokens(samples: Sequence[Sample], vocabulary: int) -> dict[str, npt.NDArray[Any]]:
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
    flat = np.concatenate(ids).astype(np.int64)
    known = flat < vocabulary
    return {
        "top_ids": np.where(known, flat, 0),
        "top_logprobs": np.where(known, np.concatenate(logprobs), np.float32(-np.inf)),
    }
