"""The wire forms: everything comes back, and nothing but what was written is accepted."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from services.trajectory import (
    Finish,
    Item,
    Outcome,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    TopTokens,
    Trajectory,
    Verdict,
    VerifiedGroup,
    WireError,
    decode,
    encode,
    order_of,
)
from tests.builders import prompt

ids = arrays(np.int32, st.integers(0, 20), elements=st.integers(0, 2**31 - 1))


def logprobs(size: int) -> st.SearchStrategy[Any]:
    return arrays(np.float32, size, elements=st.floats(-(2.0**100), 0, width=32))


prompts = st.builds(
    Prompt,
    id=st.text(),
    order=st.integers(0, 2**40),
    token_ids=ids,
    data_source=st.text(),
    reference=st.text(),
    sampling=st.builds(
        Sampling,
        n=st.integers(1, 64),
        max_tokens=st.integers(1, 10**6),
        temperature=st.floats(0.01, 5),
        top_p=st.just(1.0),
        seed=st.integers(0, 2**63),
    ),
    min_weight_version=st.integers(0, 10**6),
)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    tokens = draw(ids)
    finish = draw(st.sampled_from(get_args(Finish)))
    starts = draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else set()
    runs = tuple((start, 3 + number) for number, start in enumerate([0, *sorted(starts)]))
    return Trajectory(
        tokens, draw(logprobs(len(tokens))), finish, draw(st.text()), runs if starts else ()
    )


rollouts = st.builds(
    RolloutGroup,
    prompt=prompts,
    trajectories=st.lists(trajectories(), max_size=5).map(tuple),
    weight_version=st.integers(0, 10**6),
)


@st.composite
def verified_groups(draw: st.DrawFn) -> VerifiedGroup:
    rollout = draw(rollouts)
    verdict = st.builds(Verdict, st.sampled_from(get_args(Outcome)), st.text())
    return VerifiedGroup(rollout, tuple(draw(verdict) for _ in rollout.trajectories))


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    verified = draw(verified_groups())
    lengths = [len(t.token_ids) for t in verified.rollout.trajectories]
    places = draw(st.lists(st.sampled_from(range(len(lengths))), unique=True)) if lengths else []
    scores = {i: draw(logprobs(lengths[i])) for i in places}
    top = {}
    if places and draw(st.booleans()):
        k = draw(st.integers(1, 4))
        for i in places:
            ids = draw(arrays(np.int32, (lengths[i], k)))
            top[i] = TopTokens(ids, draw(arrays(np.float32, (lengths[i], k))))
    return ScoredGroup(verified, scores, draw(st.text()), top)


items: st.SearchStrategy[Item] = st.one_of(prompts, rollouts, verified_groups(), scored_groups())


def assert_same(got: object, expected: object) -> None:
    """Equality through arrays, which compare element by element."""
    if isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, tuple):
        assert isinstance(got, tuple)
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e)
    elif isinstance(expected, dict):
        assert isinstance(got, dict)
        assert sorted(got) == sorted(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif hasattr(expected, "__slots__"):
        assert type(got) is type(expected)
        for name in expected.__slots__:
            assert_same(getattr(got, name), getattr(expected, name))
    else:
        assert got == expected


@given(items)
def test_round_trip(item: Item) -> None:
    assert_same(decode(type(item), encode(item)), item)


def test_every_token_has_the_version_of_its_run() -> None:
    runs: list[tuple[tuple[int, int], ...]] = [(), ((0, 4), (1, 5), (3, 9))]
    made = [Trajectory(np.zeros(4, np.int32), np.zeros(4, np.float32), "stop", "", r) for r in runs]
    group = RolloutGroup(prompt(), tuple(made), weight_version=4)
    assert group.token_versions(0).tolist() == [4, 4, 4, 4]
    assert group.token_versions(1).tolist() == [4, 5, 5, 9]
    assert group.mean_weight_version == (4 * 4 + 4 + 5 + 5 + 9) / 8
    assert RolloutGroup(prompt(), (), weight_version=4).mean_weight_version == 4


@given(items)
def test_the_order_can_be_read_from_any_stage(item: Item) -> None:
    prompt = item if isinstance(item, Prompt) else getattr(item, "rollout", item).prompt
    assert order_of(encode(item)) == prompt.order


@given(items, st.data())
def test_truncated_bytes_are_a_wire_error(item: Item, data: st.DataObject) -> None:
    blob = encode(item)
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(WireError):
        decode(type(item), blob[:cut])


@given(items, st.data())
def test_a_corrupted_byte_is_a_wire_error(item: Item, data: st.DataObject) -> None:
    blob = bytearray(encode(item))
    place = data.draw(st.integers(0, len(blob) - 1))
    blob[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode(type(item), bytes(blob))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_wire_error(blob: bytes) -> None:
    with pytest.raises(WireError):
        decode(ScoredGroup, blob)


@given(rollouts)
def test_an_item_of_another_stage_is_a_wire_error(item: RolloutGroup) -> None:
    with pytest.raises(WireError, match="expected a ScoredGroup, found 'RolloutGroup'"):
        decode(ScoredGroup, encode(item))
