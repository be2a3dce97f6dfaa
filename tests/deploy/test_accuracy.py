"""The statistics, against enumeration and against numbers that are known."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.accuracy import average, over_prompts, over_seeds, pass_at_k, passed, passed_bootstrap


@given(st.data(), st.integers(1, 8))
def test_pass_at_k_is_the_fraction_of_draws_with_a_correct_one(
    data: st.DataObject, samples: int
) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(combinations(range(samples), k))
    hits = sum(any(i < correct for i in draw) for draw in draws)
    assert pass_at_k(samples, correct, k) == pytest.approx(hits / len(draws))


def test_the_bootstrap_draws_with_replacement() -> None:
    draws = list(product(range(4), repeat=3))  # 1 of 4 samples is correct, k = 3
    exact = sum(0 in draw for draw in draws) / len(draws)
    found = passed_bootstrap([1] * 400, [4] * 400, 3)
    assert found.value == pytest.approx(exact, abs=0.005)
    assert found.value < pass_at_k(4, 1, 3)
    half = 1.96 * math.sqrt(exact * (1 - exact) / 400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_averages_by_hand() -> None:
    assert average([1, 0, 3], [4, 4, 4]).value == pytest.approx(1 / 3)
    assert passed([1, 0, 3], [4, 4, 4], 4).value == pytest.approx(2 / 3)
    assert passed([1, 0], [2, 0], 4).value == pytest.approx(1 / 2)


def test_an_interval_over_prompts_is_as_wide_as_the_normal_one() -> None:
    found = over_prompts([0.0, 1.0] * 200)
    half = 1.96 * math.sqrt(0.25 / 400)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


def test_an_interval_over_seeds_is_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0])  # deviation 1, t(2) = 4.303
    assert found == pytest.approx((2.0, 2.0 - 4.303 / 3**0.5, 2.0 + 4.303 / 3**0.5))
    assert over_seeds([1.0])[1:] == (-math.inf, math.inf)


def test_no_prompts_are_no_accuracy() -> None:
    assert average([], []).value == passed_bootstrap([], [], 4).value == 0.0
