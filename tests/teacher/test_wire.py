"""The binary form: what one side writes the other reads, and anything else is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from services.errors import WireError
from teacher import wire
from teacher.api import ScoreRequest
from teacher.scores import More
from tests.teacher.fakes import fake_scores

tokens = st.lists(st.integers(0, 99), max_size=8)
pairs = st.lists(st.tuples(tokens.filter(bool), tokens), min_size=1, max_size=5)
REQUEST = wire.encode_request([(np.array([1, 2]), np.array([3]))] * 2, top=1, model="m")
ANSWER = wire.encode_answer("m", "f", [fake_scores([1, 2], 2), fake_scores([], 2)], 2)


@given(pairs, st.integers(0, 5), st.none() | st.text())
def test_a_request_comes_through(
    asked: list[tuple[list[int], list[int]]], top: int, model: str | None
) -> None:
    arrays = [(np.array(p, np.int32), np.array(c, np.int32)) for p, c in asked]
    query = wire.decode_request(wire.encode_request(arrays, top=top, model=model))
    assert (query.model, query.top) == (model, top)
    assert query.sequences == [[*p, *c] for p, c in asked]
    assert query.starts == [len(p) for p, _ in asked]


@given(pairs, st.integers(1, 3), st.booleans())
def test_what_else_is_asked_and_answered_comes_through(
    asked: list[tuple[list[int], list[int]]], width: int, entropy: bool
) -> None:
    arrays = [(np.array(p, np.int32), np.array(c, np.int32)) for p, c in asked]
    named = [np.arange(width * len(c), dtype=np.int32).reshape(-1, width) % 99 for _, c in arrays]
    more = More(entropy, named)
    in_binary = wire.decode_request(wire.encode_request(arrays, more=more))
    in_json = ScoreRequest.model_validate_json(wire.json_request(arrays, more=more)).query()
    for query in (in_binary, in_json):
        assert query.more.entropy == entropy
        for got, expected in zip(query.more.candidates, named, strict=True):
            assert got.tolist() == expected.tolist()
    scores = [fake_scores(c, 0, 1.0, more.of([i])) for i, (_, c) in enumerate(asked)]
    answer = wire.decode_answer(wire.encode_answer("m", "f", scores, 0))
    for index, score in enumerate(scores):
        np.testing.assert_array_equal(answer.candidates[index], score.candidates)
        if entropy:
            np.testing.assert_array_equal(answer.entropy[index], score.entropy)
    assert bool(answer.entropy) == entropy


@given(st.lists(tokens, min_size=1, max_size=5), st.integers(0, 3))
def test_an_answer_comes_through(completions: list[list[int]], top: int) -> None:
    scores = [fake_scores(ids, top) for ids in completions]
    answer = wire.decode_answer(wire.encode_answer("m", "f", scores, top))
    assert (answer.model, answer.fingerprint) == ("m", "f")
    for index, score in enumerate(scores):
        np.testing.assert_array_equal(answer.logprobs[index], score.logprobs)
        np.testing.assert_array_equal(answer.top_ids[index], score.top_ids)
        np.testing.assert_array_equal(answer.top_logprobs[index], score.top_logprobs)


@pytest.mark.parametrize(
    ("decode", "body"),
    [(wire.decode_request, REQUEST), (wire.decode_answer, ANSWER)],
    ids=["request", "answer"],
)
@settings(max_examples=300)
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(
    decode: Callable[[bytes], Any], body: bytes, data: st.DataObject
) -> None:
    changed = bytearray(body)
    place = st.integers(0, len(body) - 1)
    for where, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)):
        changed[where] = value
    cut = data.draw(st.just(len(body)) | place)
    try:
        decode(bytes(changed[:cut]))
    except WireError as error:
        assert str(error)


def _request(**arrays: Any) -> bytes:
    whole = {
        "tokens": np.array([1, 2, 3], np.int32),
        "prompt_lengths": np.array([2], np.int32),
        "completion_lengths": np.array([1], np.int32),
    }
    return save({name: value for name, value in {**whole, **arrays}.items() if value is not None})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (_request(tokens=None), "'tokens' is missing"),
        (_request(tokens=np.array([1, 2, 3], np.int64)), "int64 of 1 axes, not int32 of 1"),
        (_request(tokens=np.array([[1, 2, 3]], np.int32)), "int32 of 2 axes"),
        (_request(tokens=np.array([1, 2, -3], np.int32)), "negative"),
        (_request(prompt_lengths=np.array([0], np.int32)), "at least one token"),
        (_request(completion_lengths=np.array([-1], np.int32)), "at least one token"),
        (_request(completion_lengths=np.array([2**31 - 1], np.int32)), "3 tokens for lengths"),
        (_request(prompt_lengths=np.array([], np.int32)), "0 prompt lengths"),
        (_request(candidates=np.array([[1], [2]], np.int32)), "2 of candidates for lengths"),
        (_request(candidates=np.array([1], np.int32)), "int32 of 1 axes, not int32 of 2"),
        (_request(candidates=np.array([[-1]], np.int32)), "candidates are 1 to 1024 token ids"),
        (_request(candidates=np.empty((1, 0), np.int32)), "candidates are 1 to 1024 token ids"),
    ],
)
def test_a_wrong_request_is_refused_in_words(body: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        wire.decode_request(body)
