from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trajectory import ScoredGroup, TopTokens
from tests.builders import scored_group
from trainer.batch import BadGroup, Batch, MicroBatch, check, fits, micro_batches, shares

lengths = st.lists(st.integers(0, 50), min_size=1, max_size=12)


def batch_of(sizes: list[int]) -> Batch:
    return Batch.of([scored_group(["correct"] * len(sizes), lengths=sizes)])


@given(lengths, st.integers(1, 200))
def test_micro_batches_hold_every_sequence_once_within_the_budget(
    sizes: list[int], budget: int
) -> None:
    batch = batch_of(sizes)
    parts = micro_batches(batch, range(len(sizes)), budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or sum(int(batch.tokens[i]) for i in part) <= budget


@given(lengths, st.integers(1, 5), st.floats(0, 0.5), st.data())
def test_ranks_share_everything_once_and_fairly(
    sizes: list[int], ranks: int, pair_cost: float, data: st.DataObject
) -> None:
    batch = batch_of(sizes)
    passes = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)))
    )
    made = shares(batch, passes, ranks, pair_cost=pair_cost)
    assert sorted(i for part in made for i in part) == passes.nonzero().flatten().tolist()
    work = [
        int(p) * int(t) * (1 + pair_cost * int(t))
        for p, t in zip(passes, batch.tokens, strict=True)
    ]
    loads = [sum(work[i] for i in part) for part in made]
    assert max(loads) - min(loads) <= max(work) * (1 + 1e-4)


def test_a_long_sequence_weighs_by_its_square_where_attention_counts() -> None:
    batch = batch_of([97, 47, 47])  # 100, 50 and 50 tokens with their prompts
    once = torch.ones(3)
    assert shares(batch, once, 2, pair_cost=0.0) == [[0], [1, 2]]
    assert shares(batch_of([97, 47, 47, 27]), torch.ones(4), 2, pair_cost=1.0) == [[0], [1, 2, 3]]


def test_a_part_holds_its_own_sequences_and_all_numbers() -> None:
    batch = batch_of([3, 4, 5])
    part = batch.part([2])
    assert list(part.sequences) == [2]
    assert part.sequences[2] is batch.sequences[2]
    assert (part.groups, part.group_count) == ((), 1)
    assert part.tokens.tolist() == [6, 7, 8]


@settings(deadline=None)
@given(st.permutations([0, 1, 2]))
def test_a_batch_does_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    groups = [scored_group(["correct", "incorrect"], order=i, lengths=[3 + i, 5]) for i in range(3)]
    batch = Batch.of([groups[i] for i in order])
    assert [g.prompt.order for g in batch.groups] == [0, 1, 2]
    assert batch.lengths.tolist() == [3, 5, 4, 5, 5, 5]
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_micro_batch_lines_up_tokens_of_all_sources() -> None:
    group = scored_group(["correct", "incorrect"], lengths=[2, 3], teacher_nll=[0, 0.5])
    micro = MicroBatch.of(Batch.of([group]), [1, 0], torch.device("cpu"))
    first, second = group.rollout.trajectories
    assert micro.pack.targets.tolist() == [*second.token_ids, *first.token_ids]
    assert micro.sequence.tolist() == [1, 1, 1, 0, 0]
    assert micro.teacher.tolist() == [-0.5, -0.5, -0.5, 0, 0]
    assert micro.behaviour.tolist() == [-1.0] * 5


def spoil_teacher(group: ScoredGroup, value: float) -> None:
    group.teacher_logprobs[1][2] = value


def spoil_rollout(group: ScoredGroup, value: float) -> None:
    group.rollout.trajectories[0].logprobs[1] = value


@pytest.mark.parametrize("spoil", [spoil_teacher, spoil_rollout])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "not finite"), (-np.inf, "not finite"), (0.5, "0.5 is positive")],
)
def test_numbers_that_would_poison_the_gradient_are_refused(
    spoil: Callable[[ScoredGroup, float], None], value: float, message: str
) -> None:
    group = scored_group(["correct", "incorrect"])
    spoil(group, value)
    with pytest.raises(BadGroup, match=message):
        check(group, "incorrect")


def test_a_missing_score_is_refused_only_where_it_is_needed() -> None:
    group = scored_group(["correct", "incorrect", "unknown"], score=())
    check(group, "none")
    with pytest.raises(BadGroup, match="trajectory 1 is incorrect and has no teacher score"):
        check(group, "incorrect")
    with pytest.raises(BadGroup, match="trajectory 0 is correct"):
        check(group, "all")
    check(scored_group(["correct", "incorrect", "unknown"]), "incorrect")


def test_the_most_likely_tokens_are_missed_where_a_divergence_needs_them() -> None:
    group = scored_group(["correct", "incorrect"], lengths=[2, 3])
    with pytest.raises(BadGroup, match="top 4 of trajectory 1: none"):
        check(group, "incorrect", top=4)
    for k, message in ((2, r"top 4 of trajectory 1: \(3, 2\)"), (4, "not finite")):
        tokens = TopTokens(np.zeros((3, k), np.int32), np.full((3, k), -np.inf, np.float32))
        with pytest.raises(BadGroup, match=message):
            check(dataclasses.replace(group, teacher_top={1: tokens}), "incorrect", top=4)


@given(st.lists(st.integers(1, 40), min_size=6, max_size=6), st.integers(20, 300))
def test_groups_that_have_room_stay_whole(sizes: list[int], budget: int) -> None:
    groups = [
        scored_group(["correct"] * 3, order=i, lengths=sizes[3 * i : 3 * i + 3]) for i in (0, 1)
    ]
    batch = Batch.of(groups)
    together = fits(batch, batch.correct, budget)
    parts = micro_batches(batch, range(6), budget, together)
    assert sorted(i for part in parts for i in part) == list(range(6))
    for group in ({0, 1, 2}, {3, 4, 5}):
        assert bool(together[min(group)]) == (int(batch.tokens[list(group)].sum()) <= budget)
        if together[min(group)]:
            assert any(group <= set(part) for part in parts)
    for part in parts:
        assert len(part) == 1 or int(batch.tokens[part].sum()) <= budget


def test_a_score_of_the_wrong_length_is_refused() -> None:
    group = scored_group(["incorrect"], lengths=[4])
    group.teacher_logprobs[0] = group.teacher_logprobs[0][:3]  # type: ignore[index]
    with pytest.raises(BadGroup, match="3 values for 4 tokens"):
        check(group, "incorrect")
