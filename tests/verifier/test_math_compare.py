"""Formulas are equal when they are worth the same; a hair's difference and a huge number count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.math_compare import DECIMAL, rounds, same_value
from verifier.math_formula import parse
from verifier.math_value import constant


def same(a: str, b: str) -> bool | None:
    return same_value(parse(a), parse(b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"2\sin x\cos x", r"\sin 2x"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\frac{\sqrt{a}}{\sqrt{b}}", r"\sqrt{\frac ab}"),
        (r"\cos(n\pi)", "(-1)^n"),
        (r"\prod_{k=1}^{n} k", "n!"),
        (r"\int_0^1 x^2 dx", r"\frac13"),
        (r"\sum_{k=0}^{\infty} \frac{1}{2^k}", "2"),
        (r"\sqrt{2}^2 - 2", "0"),
        (r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt6+\sqrt2}{2}"),
        ("f(x+1)", "f(1+x)"),
        ("F_{2n+1}", "F_{n+n+1}"),
    ],
)
def test_the_same_value_in_other_words(a: str, b: str) -> None:
    assert same(a, b) is True
    assert same(b, a) is True


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("x", "|x|"),
        ("R", "r"),
        (r"e^{\pi\sqrt{163}}", "640320^3 + 744"),
        ("1 - 2^{-1000}", "1"),
        (r"\frac{3^{2024}-1}{2}", r"\frac{3^{2024}+1}{2}"),
        ("e^{-10^6}", "0"),
        ("(10^9)!", "5"),
        ("9^{9^{9^9}}", "9"),
        ("(-1)^n", "-1"),
        ("f(x)", "g(x)"),
        ("x_1", "x_2"),
    ],
)
def test_other_values(a: str, b: str) -> None:
    assert same(a, b) is False
    assert same(b, a) is False


def test_what_no_precision_decides_is_left_open() -> None:
    assert same(r"2^{10^{9}}\pi", r"2^{10^{9}}\pi + 1") is None


@given(st.integers(1, 10**30), st.integers(1, 10**30))
def test_integers_are_equal_to_themselves_only(a: int, b: int) -> None:
    assert same(str(a), str(b)) is (a == b)
    assert same(rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}") is True


@pytest.mark.parametrize(
    ("decimal", "exact", "expected"),
    [
        ("0.3333333333", r"\frac13", True),
        ("0.666666", r"\frac23", True),  # cut off
        ("0.666667", r"\frac23", True),
        ("0.66667", r"\frac23", False),  # five digits
        ("0.666668", r"\frac23", False),
        ("12345679.0", "12345678", False),
        ("3.14159265", r"\pi", True),
        ("-3.14159265", r"\pi", False),
        (r"1.414214\times10^3", r"1000\sqrt2", True),
        ("0.30000000000000004", r"\frac{3}{10}", True),  # a double's noise
    ],
)
def test_a_decimal_is_as_exact_as_its_digits(decimal: str, exact: str, expected: bool) -> None:
    found = DECIMAL.fullmatch(decimal)
    assert found is not None
    assert rounds(found, constant(parse(exact))) is expected
