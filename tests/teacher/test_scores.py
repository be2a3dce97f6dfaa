from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.scores import ROUNDING, InvalidLogProbs, TokenScores, valid_scores


def test_perplexity_is_the_exponential_of_the_mean_negative_log_prob() -> None:
    score = valid_scores([math.log(0.5), math.log(0.125)], 2)
    assert score.perplexity == pytest.approx(4.0)


def test_no_tokens_have_no_log_probs_and_perplexity_one() -> None:
    for none in (TokenScores.empty(3), valid_scores([], 0, [], [], 3)):
        assert (len(none.logprobs), none.perplexity) == (0, 1.0)
        assert none.top_ids.shape == none.top_logprobs.shape == (0, 3)


def test_a_perplexity_always_fits_a_number() -> None:
    assert math.isfinite(valid_scores([-1e30], 1).perplexity)


@given(st.lists(st.floats(-1e30, 0.0)))
def test_valid_log_probs_come_through_as_float32(values: list[float]) -> None:
    checked = valid_scores(values, len(values)).logprobs
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, np.asarray(values, np.float32))


def test_rounding_above_zero_is_removed() -> None:
    assert valid_scores([ROUNDING / 2, -1.0], 2).logprobs.tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([-1.0], "1 log-probs for 2"),
        ([-1.0, -1.0, -1.0], "3 log-probs for 2"),
        ([-1.0, float("nan")], "log-prob 1 of 2 is nan"),
        ([float("-inf"), -1.0], "log-prob 0 of 2 is -inf"),
        ([-1.0, float("inf")], "log-prob 1 of 2 is inf"),
        ([-1.0, 2 * ROUNDING], "log-prob 1 of 2 is 0.0002"),
        ([-1.0, -1e39], "log-prob 1 of 2 is -1e"),
    ],
    ids=str,
)
def test_anything_else_is_refused(values: list[float], said: str) -> None:
    with pytest.raises(InvalidLogProbs, match=said):
        valid_scores(values, 2)


def test_alternatives_come_through() -> None:
    scores = valid_scores([-1.0, -2.0], 2, [[7, 1], [3, 2]], [[-0.5, -1.0], [-1.0, -1.5]], 2)
    assert scores.top_ids.tolist() == [[7, 1], [3, 2]]
    assert scores.top_logprobs.tolist() == [[-0.5, -1.0], [-1.0, -1.5]]


@pytest.mark.parametrize(
    ("ids", "values", "said"),
    [
        ([[7, 1]], [[-1.0, -2.0]], r"shape \(1, 2\)"),
        ([[7], [1]], [[-1.0], [-2.0]], r"shape \(2, 1\)"),
        ([[7, 1], [2]], [[-1.0, -2.0], [-1.0]], "no table"),
        ([[7, -1], [1, 2]], [[-1.0, -2.0], [-1.0, -2.0]], "not a token id"),
        ([[7, 1], [1, 2]], [[-1.0, -2.0], [-2.0, -1.0]], "not in order"),
        ([[7, 1], [1, 2]], [[-1.0, -2.0], [float("nan"), -1.0]], "alternative 1 of 2 is nan"),
        ([[7, 1], [1, 2]], [[0.5, -2.0], [-1.0, -1.0]], "alternative 0 of 2 is 0.5"),
    ],
    ids=str,
)
def test_other_alternatives_are_refused(
    ids: list[list[int]], values: list[list[float]], said: str
) -> None:
    with pytest.raises(InvalidLogProbs, match=said):
        valid_scores([-1.0, -2.0], 2, ids, values, 2)
