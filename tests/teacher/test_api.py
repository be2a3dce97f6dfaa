from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.api import ROUNDING, InvalidLogProbs, SequenceScore, valid_logprobs


def test_perplexity_is_the_exponential_of_the_mean_negative_log_prob() -> None:
    score = SequenceScore.of([math.log(0.5), math.log(0.125)])
    assert score.perplexity == pytest.approx(4.0)


def test_an_empty_completion_has_no_log_probs_and_perplexity_one() -> None:
    assert SequenceScore.of([]) == SequenceScore(logprobs=[], perplexity=1.0)


def test_a_perplexity_always_fits_a_number() -> None:
    assert math.isfinite(SequenceScore.of([-1e30]).perplexity)


@given(st.lists(st.floats(-1e30, 0.0)))
def test_valid_log_probs_come_through_as_float32(values: list[float]) -> None:
    checked = valid_logprobs(values, len(values))
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, np.asarray(values, np.float32))


def test_rounding_above_zero_is_removed() -> None:
    assert valid_logprobs([ROUNDING / 2, -1.0], 2).tolist() == [0.0, -1.0]


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
        valid_logprobs(values, 2)
