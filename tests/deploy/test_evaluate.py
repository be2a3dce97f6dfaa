from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.evaluate import pass_at_k, summarise
from services.trajectory import VerifiedGroup
from tests.builders import scored_group


@given(st.data(), st.integers(1, 8))
def test_pass_at_k_is_the_fraction_of_draws_with_a_correct_one(
    data: st.DataObject, samples: int
) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(combinations(range(samples), k))
    hits = sum(any(i < correct for i in draw) for draw in draws)
    assert pass_at_k(samples, correct, k) == pytest.approx(hits / len(draws))


def test_accuracy_by_hand() -> None:
    groups: list[VerifiedGroup] = [
        scored_group(["correct", "incorrect", "incorrect", "incorrect"]).verified,
        scored_group(["incorrect", "incorrect", "unknown", "incorrect"]).verified,
        scored_group(["correct", "correct", "correct", "incorrect"]).verified,
    ]
    result = summarise(groups, version=7)
    assert result.avg_at_k == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert (result.k, result.prompts, result.unknown, result.version) == (4, 3, 1, 7)


def test_no_prompts_are_no_accuracy() -> None:
    assert summarise([], version=0).avg_at_k == 0.0
