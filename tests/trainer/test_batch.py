from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trajectory import ScoredGroup
from tests.builders import scored_group
from trainer.batch import BadGroup, Batch, MicroBatch, check, micro_batches, share

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
        assert len(part) == 1 or sum(batch.tokens(i) for i in part) <= budget


@given(lengths, st.integers(1, 5))
def test_ranks_share_everything_once_and_fairly(sizes: list[int], ranks: int) -> None:
    batch = batch_of(sizes)
    shares = [share(batch, range(len(sizes)), rank, ranks) for rank in range(ranks)]
    assert sorted(i for part in shares for i in part) == list(range(len(sizes)))
    loads = [sum(batch.tokens(i) for i in part) for part in shares]
    assert max(loads) - min(loads) <= max(batch.tokens(i) for i in range(len(sizes)))


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


def test_a_score_of_the_wrong_length_is_refused() -> None:
    group = scored_group(["incorrect"], lengths=[4])
    group.teacher_logprobs[0] = group.teacher_logprobs[0][:3]  # type: ignore[index]
    with pytest.raises(BadGroup, match="3 values for 4 tokens"):
        check(group, "incorrect")
