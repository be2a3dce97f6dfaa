"""The wire forms: everything comes back, and nothing but what was written is accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from services.errors import WireError
from services.trajectory import (
    Episode,
    Finish,
    Outcome,
    Prompt,
    Record,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    TopTokens,
    Trajectory,
    Verdict,
    VerifiedGroup,
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
    messages=st.lists(
        st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=3
    ).map(tuple),
    teacher_context=st.none() | ids,
)
verdicts = st.builds(Verdict, st.sampled_from(get_args(Outcome)), st.text())
episodes = st.builds(
    Episode, st.integers(1, 99), st.integers(0, 99), st.floats(0, 1e6), st.none() | verdicts
)


@st.composite
def trajectories(draw: st.DrawFn, k: int = 0) -> Trajectory:
    tokens = draw(ids)
    finish = draw(st.sampled_from(get_args(Finish)))
    starts = draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else set()
    runs = tuple((start, 3 + number) for number, start in enumerate([0, *sorted(starts)]))
    mask = draw(st.none() | arrays(np.bool_, len(tokens)).map(lambda m: None if m.all() else m))
    return Trajectory(
        tokens,
        draw(logprobs(len(tokens))),
        finish,
        draw(st.text()),
        runs if starts else (),
        mask,
        draw(st.none() | episodes),
        draw(arrays(np.int32, (len(tokens), k))) if k else None,
    )


rollouts = st.builds(
    RolloutGroup,
    prompt=prompts,
    trajectories=st.integers(0, 3).flatmap(
        lambda k: st.lists(trajectories(k), max_size=5).map(tuple)
    ),
    weight_version=st.integers(0, 10**6),
)


@st.composite
def verified_groups(draw: st.DrawFn) -> VerifiedGroup:
    rollout = draw(rollouts)
    return VerifiedGroup(rollout, tuple(draw(verdicts) for _ in rollout.trajectories))


def _tables(k: int, lengths: list[int], indices: list[int]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(*(arrays(np.int32, (lengths[i], k)) for i in indices)).map(list)


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    verified = draw(verified_groups())
    lengths = [len(t.token_ids) for t in verified.rollout.trajectories]
    indices = draw(st.lists(st.sampled_from(range(len(lengths))), unique=True)) if lengths else []
    scores = {i: draw(logprobs(lengths[i])) for i in indices}
    top = {}
    if indices and draw(st.booleans()):
        own = [verified.rollout.trajectories[i].top for i in indices]
        k = draw(st.integers(1, 4))
        named = [ids for ids in own if ids is not None] if draw(st.booleans()) else []
        for i, ids in zip(indices, named or draw(_tables(k, lengths, indices)), strict=True):
            top[i] = TopTokens(ids, draw(arrays(np.float32, ids.shape)))
    version = draw(st.none() | st.integers(0, 10**6))
    chunks = {}
    if indices and draw(st.booleans()):
        chunks = {i: draw(arrays(np.int32, lengths[i])) for i in indices}
    entropy = {i: draw(logprobs(lengths[i])) for i in indices} if draw(st.booleans()) else {}
    return ScoredGroup(verified, scores, draw(st.text()), top, version, chunks, entropy)


items: st.SearchStrategy[Record] = st.one_of(prompts, rollouts, verified_groups(), scored_groups())


def stages(record: Record) -> list[Record]:
    """The record, and every one before it."""
    before = [getattr(record, name, None) for name in ("verified", "rollout", "prompt")]
    return [record, *(r for r in before if r is not None)]


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
def test_round_trip(item: Record) -> None:
    assert_same(decode(type(item), encode(item)), item)


def test_every_token_has_the_version_of_its_run() -> None:
    runs: list[tuple[tuple[int, int], ...]] = [(), ((0, 4), (1, 5), (3, 9))]
    made = [Trajectory(np.zeros(4, np.int32), np.zeros(4, np.float32), "stop", "", r) for r in runs]
    group = RolloutGroup(prompt(), tuple(made), weight_version=4)
    assert group.token_versions(0).tolist() == [4, 4, 4, 4]
    assert group.token_versions(1).tolist() == [4, 5, 5, 9]
    assert group.mean_weight_version == (4 * 4 + 4 + 5 + 5 + 9) / 8
    assert RolloutGroup(prompt(), (), weight_version=4).mean_weight_version == 4


@given(scored_groups())
def test_a_stage_appends_its_part_and_copies_the_others(scored: ScoredGroup) -> None:
    blobs = [encode(record) for record in reversed(stages(scored))]
    for kind, earlier, later in zip(
        (Prompt, RolloutGroup, VerifiedGroup), blobs, blobs[1:], strict=False
    ):
        assert later[8:].startswith(earlier[8:])  # past the format and the checksum
        assert encode(decode(kind, earlier)) is earlier


@given(scored_groups())
def test_what_was_read_is_handed_on_as_it_came(scored: ScoredGroup) -> None:
    # Bytes that no `encode` of today makes, such as those of another safetensors version.
    blob = encode(scored.verified)
    read = decode(VerifiedGroup, blob)
    again = replace(scored, verified=read)
    assert encode(again) == encode(scored)
    assert encode(again.verified) is blob
    assert encode(again.rollout) == encode(scored.rollout)
    # A record that was changed is written anew, on top of what was not.
    changed = replace(read, verdicts=tuple(Verdict("unknown", "") for _ in read.verdicts))
    assert_same(decode(VerifiedGroup, encode(changed)), changed)
    assert encode(changed)[8:].startswith(encode(read.rollout)[8:])


def test_a_record_of_an_older_format_is_refused_by_name() -> None:
    with pytest.raises(WireError, match="a record of format 1, and this version reads format 2"):
        decode(Prompt, b"SCP1" + encode(prompt())[4:])


def test_a_trajectory_without_a_mask_was_sampled_whole() -> None:
    ids, logprobs = np.zeros(3, np.int32), np.zeros(3, np.float32)
    assert Trajectory(ids, logprobs, "stop", "").sampled.tolist() == [True] * 3
    partly = Trajectory(ids, logprobs, "stop", "", mask=np.array([True, False, True]))
    assert (partly.sampled.tolist(), partly.sampled_count) == ([True, False, True], 2)


@given(items)
def test_the_order_can_be_read_from_any_stage(item: Record) -> None:
    prompt = item if isinstance(item, Prompt) else getattr(item, "rollout", item).prompt
    assert order_of(encode(item)) == prompt.order


@given(items, st.data())
def test_truncated_bytes_are_a_wire_error(item: Record, data: st.DataObject) -> None:
    blob = encode(item)
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(WireError):
        decode(type(item), blob[:cut])


@given(items, st.data())
def test_a_corrupted_byte_is_a_wire_error(item: Record, data: st.DataObject) -> None:
    blob = bytearray(encode(item))
    index = data.draw(st.integers(0, len(blob) - 1))
    blob[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode(type(item), bytes(blob))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_wire_error(blob: bytes) -> None:
    with pytest.raises(WireError):
        decode(ScoredGroup, blob)


@given(rollouts)
def test_an_item_of_another_stage_is_a_wire_error(item: RolloutGroup) -> None:
    with pytest.raises(WireError, match="expected a ScoredGroup, found a RolloutGroup"):
        decode(ScoredGroup, encode(item))
