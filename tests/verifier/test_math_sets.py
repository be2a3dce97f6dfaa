"""Sets of real numbers are told apart by which numbers are in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.math_sets import read_set, same_set
from verifier.math_text import normalise


def same(a: str, b: str) -> bool:
    first, second = (read_set(normalise(text)) for text in (a, b))
    assert first is not None
    assert second is not None
    return same_set(first, second)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("x<3", r"(-\infty, 3)", True),
        (r"x \le 3", r"(-\infty, 3)", False),
        ("|x|<2", "(-2,2)", True),
        ("x^2<2", r"(-\sqrt2,\sqrt2)", True),
        ("x^2<2", r"(-1.41,1.41)", False),
        (r"[1,2]\cup[2,3]", "[1,3]", True),
        (r"[1,2)\cup(2,3]", "[1,3]", False),
        (r"\mathbb{R}\setminus\{1\}", r"x \neq 1", True),
        (r"\{x \mid x > 1\}", r"(1,\infty)", True),
        (r"x<-1 \text{ or } x>1", r"|x|>1", True),
        (r"x<-1 \text{ and } x>1", r"|x|>1", False),
        (r"1 \le |z| \le \frac32", r"[-\frac32,-1]\cup[1,\frac32]", True),
    ],
)
def test_pairs(a: str, b: str, expected: bool) -> None:
    assert same(a, b) is expected
    assert same(b, a) is expected


@given(st.integers(-30, 30), st.integers(-30, 30), st.integers(-30, 30))
def test_an_interval_is_its_inequality_and_no_other(low: int, high: int, other: int) -> None:
    if low < high:
        assert same(f"({low}, {high})", f"{low} < x < {high}")
        assert same(f"({low}, {high})", f"({low}, {other})") is (high == other)


@pytest.mark.parametrize("text", ["x+1", "(a, b)", "x < y", "", r"\{a\}", "(1,2,3)"])
def test_what_is_no_set_of_numbers(text: str) -> None:
    assert read_set(text) is None
