from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trajectory import ScoredGroup, TopTokens
from tests.builders import VOCAB, scored_group
from trainer.batch import BadGroup, Batch, MicroBatch, check, families, fits, micro_batches, shares

lengths = st.lists(st.integers(0, 50), min_size=1, max_size=12)


def batch_of(sizes: list[int]) -> Batch:
    return Batch.of([scored_group(["correct"] * len(sizes), lengths=sizes)])


@settings(deadline=None)
@given(lengths, st.integers(1, 200))
def test_micro_batches_hold_every_sequence_once_within_the_budget(
    sizes: list[int], budget: int
) -> None:
    batch = batch_of(sizes)
    parts = [
        [i for (i,) in part]
        for part in micro_batches(batch, families(batch, range(len(sizes)), False), budget)
    ]
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or sum(int(batch.tokens[i]) for i in part) <= budget


answers = st.lists(st.integers(1, 50), min_size=1, max_size=9)


def batch_of_groups(groups: list[tuple[int, list[int]]]) -> Batch:
    """Of the lengths of each group's prompt and answers."""
    return Batch.of(
        [
            scored_group(["correct"] * len(sizes), order=i, lengths=sizes, prompt_length=prompt)
            for i, (prompt, sizes) in enumerate(groups)
        ]
    )


several = st.lists(st.tuples(st.integers(1, 60), answers), min_size=1, max_size=4)


@settings(deadline=None)
@given(several, st.integers(1, 300), st.booleans())
def test_families_fill_micro_batches_as_their_packs_say(
    groups: list[tuple[int, list[int]]], budget: int, whole: bool
) -> None:
    """Every answer once, after its own prompt; the tokens of the pack itself within the budget."""
    batch = batch_of_groups(groups)
    held = families(batch, range(len(batch.tokens)), True)
    together = fits(batch, held, budget) if whole else None
    made = micro_batches(batch, held, budget, together)
    assert sorted(i for part in made for family in part for i in family) == list(
        range(len(batch.tokens))
    )
    for part in made:
        for family in part:
            assert len(set(batch.group[family].tolist())) == 1
        tokens = len(
            MicroBatch.of(batch, part, torch.device("cpu"), vocabulary=VOCAB).pack.token_ids
        )
        assert tokens <= budget or [len(family) for family in part] == [1]
    for group in range(len(groups)) if together is not None else ():
        members = (batch.group == group).nonzero().flatten().tolist()
        if together is not None and together[members[0]]:
            assert any(set(members) <= {i for family in part for i in family} for part in made)


def test_a_prompt_is_shared_where_that_spares_a_tenth_of_what_remains() -> None:
    assert families(batch_of_groups([(16, [128] * 8)]), range(8), True) == [list(range(8))]
    assert families(batch_of_groups([(16, [128] * 2)]), range(2), True) == [[0], [1]]
    assert families(batch_of_groups([(100, [5])]), [0], True) == [[0]]
    both = batch_of_groups([(100, [5, 5]), (2, [90, 90])])
    assert families(both, [3, 0, 1, 2], True) == [[3], [2], [0, 1]]
    assert families(both, range(4), False) == [[0], [1], [2], [3]]


def test_ranks_split_a_family_only_where_that_leaves_the_busiest_less_to_do() -> None:
    def dealt(*groups: tuple[int, list[int]], share: bool = True) -> list[list[int]]:
        batch = batch_of_groups(list(groups))
        return shares(batch, torch.ones(len(batch.tokens)), 2, pair_cost=0.0, share=share)

    long = (60, [10] * 4)
    assert dealt(long, long) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dealt(long, long, share=False) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert dealt((10, [40] * 4)) == [[0, 2], [1, 3]]  # 90 each, and not 170 and nothing
    assert dealt((100, [20, 20]), (10, [30] * 4)) == [[0, 1], [2, 3, 4, 5]]  # 140 and 130


@settings(deadline=None)
@given(several, st.integers(1, 4), st.floats(0, 0.5))
def test_sharing_makes_no_rank_busier_than_it_would_be_without(
    groups: list[tuple[int, list[int]]], ranks: int, pair_cost: float
) -> None:
    batch = batch_of_groups(groups)
    once = torch.ones(len(batch.tokens))

    def busiest(made: list[list[int]]) -> float:
        """Counted one token at a time: what each costs and sees, a shared prompt's once."""
        loads = []
        for part in made:
            kept = {int(batch.group[i]) for i in part}
            load = 0.0
            for group in kept:
                prompt, sizes = groups[group]
                mine = [int(batch.lengths[i]) for i in part if batch.group[i] == group]
                pays = prompt * (len(sizes) - 1) >= 0.1 * (prompt + sum(sizes)) and len(sizes) > 1
                copies = 1 if pays else len(mine)
                load += copies * prompt * (1 + pair_cost * prompt)
                load += sum(a * (1 + pair_cost * (a + 2 * prompt)) for a in mine)
            loads.append(load)
        return max(loads)

    made = shares(batch, once, ranks, pair_cost=pair_cost, share=True)
    apart = shares(batch, once, ranks, pair_cost=pair_cost)
    assert sorted(i for part in made for i in part) == list(range(len(batch.tokens)))
    assert busiest(made) <= busiest(apart) * (1 + 1e-5)


@settings(deadline=None)
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
    micro = MicroBatch.of(Batch.of([group]), [[1], [0]], torch.device("cpu"), vocabulary=VOCAB)
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
        check(group, "incorrect", vocabulary=VOCAB)


def test_a_missing_score_is_refused_only_where_it_is_needed() -> None:
    group = scored_group(["correct", "incorrect", "unknown"], score=())
    check(group, "none", vocabulary=VOCAB)
    with pytest.raises(BadGroup, match="trajectory 1 is incorrect and has no teacher score"):
        check(group, "incorrect", vocabulary=VOCAB)
    with pytest.raises(BadGroup, match="trajectory 0 is correct"):
        check(group, "all", vocabulary=VOCAB)
    check(scored_group(["correct", "incorrect", "unknown"]), "incorrect", vocabulary=VOCAB)


def test_the_most_likely_tokens_are_missed_where_a_divergence_needs_them() -> None:
    group = scored_group(["correct", "incorrect"], lengths=[2, 3])
    with pytest.raises(BadGroup, match="top 4 of trajectory 1: none"):
        check(group, "incorrect", top=4, vocabulary=VOCAB)
    for k, message in ((2, r"top 4 of trajectory 1: \(3, 2\)"), (4, "not finite")):
        tokens = TopTokens(np.zeros((3, k), np.int32), np.full((3, k), -np.inf, np.float32))
        with pytest.raises(BadGroup, match=message):
            check(
                dataclasses.replace(group, teacher_top={1: tokens}),
                "incorrect",
                top=4,
                vocabulary=VOCAB,
            )


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([0, 0, 1], "3 for its tokens"),
        ([0, 0, 2, 2], "not in order"),
        ([1, 1, 2, 2], "not in order"),
        ([0, 1, 0, 1], "not in order"),
        ([0, -2, 1, 1], "not in order"),
    ],
)
def test_chunks_that_are_none_are_refused(chunks: list[int], message: str) -> None:
    group = scored_group(["incorrect"], lengths=[4])
    for good in ([0, 1, 2, 3], [0, 0, 1, -1], [-1] * 4):
        cut = dataclasses.replace(group, chunks={0: np.array(good, np.int32)})
        check(cut, "incorrect", vocabulary=VOCAB)
    with pytest.raises(BadGroup, match=message):
        cut = dataclasses.replace(group, chunks={0: np.array(chunks, np.int32)})
        check(cut, "incorrect", vocabulary=VOCAB)


def test_the_entropy_is_missed_where_it_is_needed() -> None:
    group = scored_group(["correct", "incorrect"], lengths=[2, 3])
    for spread in ({}, {1: np.zeros(2, np.float32)}, {1: np.full(3, np.nan, np.float32)}):
        with pytest.raises(BadGroup, match="entropy of trajectory 1: missing"):
            check(
                dataclasses.replace(group, teacher_entropy=spread),
                "incorrect",
                vocabulary=VOCAB,
                entropy=True,
            )
    told = dataclasses.replace(group, teacher_entropy={1: np.ones(3, np.float32)})
    check(told, "incorrect", vocabulary=VOCAB, entropy=True)


def test_tokens_that_the_student_has_no_rows_for_are_refused() -> None:
    for bad in (-1, VOCAB):
        group = scored_group(["correct", "incorrect"])
        group.rollout.trajectories[1].token_ids[2] = bad
        with pytest.raises(BadGroup, match=rf"trajectory 1: token {bad} is not among"):
            check(group, "incorrect", vocabulary=VOCAB)
        group = scored_group(["correct"], prompt_length=3)
        group.prompt.token_ids[0] = bad
        with pytest.raises(BadGroup, match=rf"the prompt: token {bad} is not among"):
            check(group, "incorrect", vocabulary=VOCAB)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda top: top.ids.fill(-1), "token -1"),
        (lambda top: top.logprobs.fill(-0.1), "add up to 1.81"),
    ],
)
def test_most_likely_tokens_that_are_no_distribution_are_refused(
    spoil: Callable[[TopTokens], None], message: str
) -> None:
    tokens = TopTokens(np.zeros((5, 2), np.int32), np.full((5, 2), -2, np.float32))
    group = dataclasses.replace(scored_group(["incorrect"]), teacher_top={0: tokens})
    check(group, "incorrect", 2, vocabulary=VOCAB)
    spoil(tokens)
    with pytest.raises(BadGroup, match=message):
        check(group, "incorrect", 2, vocabulary=VOCAB)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=6, max_size=6), st.integers(20, 300))
def test_groups_that_have_room_stay_whole(sizes: list[int], budget: int) -> None:
    groups = [
        scored_group(["correct"] * 3, order=i, lengths=sizes[3 * i : 3 * i + 3]) for i in (0, 1)
    ]
    batch = Batch.of(groups)
    alone = families(batch, range(6), False)
    together = fits(batch, alone, budget)
    parts = [[i for (i,) in part] for part in micro_batches(batch, alone, budget, together)]
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
        check(group, "incorrect", vocabulary=VOCAB)
