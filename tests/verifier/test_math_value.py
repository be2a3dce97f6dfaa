"""Values at a point: exact where they are rational, of any magnitude, and never endless work."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from verifier.math_formula import parse
from verifier.math_value import Beyond, Evaluator, Undefined, as_float, constant


def value(formula: str, **variables: Fraction) -> object:
    return Evaluator(lambda name: variables.get(name, Fraction(0))).of(parse(formula))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (r"\frac12 + \frac13", Fraction(5, 6)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("-2^2", Fraction(-4)),
        ("2^{-3}", Fraction(1, 8)),
        ("2^3^2", Fraction(512)),
        ("5!", Fraction(120)),
        (r"\binom{10}{3}", Fraction(120)),
        (r"\lfloor -3.5 \rfloor", Fraction(-4)),
        (r"\sum_{k=1}^{100} k", Fraction(5050)),
        (r"\prod_{k=1}^{5} k", Fraction(120)),
        (r"\sqrt[3]{-8}", Fraction(-2)),
        (r"\sqrt{\frac{9}{4}}", Fraction(3, 2)),
        (r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", Fraction(-2)),
        ("10^{400}", Fraction(10**400)),
    ],
)
def test_rational_values_are_exact(formula: str, expected: Fraction) -> None:
    assert value(formula) == expected


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 30))
def test_polynomials_are_exact_at_fractions(a: int, b: int, q: int) -> None:
    x = Fraction(a, q)
    assert value(f"x^3 + {abs(b)}x - 7", x=x) == x**3 + abs(b) * x - 7


@pytest.mark.parametrize(
    ("formula", "function"),
    [
        (r"\sin 1", mp.sin), (r"\ln 1", mp.log), (r"e^1", mp.exp), (r"\arctan 1", mp.atan),
        (r"\cosh(1)", mp.cosh),
    ],
)  # fmt: skip
def test_functions_are_those_of_mpmath(formula: str, function: object) -> None:
    assert abs(as_float(value(formula)) - function(1)) < mpf(10) ** -14  # type: ignore[operator]


def test_nothing_underflows_and_nothing_overflows() -> None:
    logarithm = mp.log(as_float(value(r"e^{-10^{9}}")))
    assert abs(logarithm + 10**9) < 1
    assert as_float(value("10^{10^{10}}")) > mpf(10) ** 1000


@pytest.mark.parametrize(
    "formula",
    ["9^{9^{9^{9}}}", r"\sin 10^{10^{10}}", r"\sum_{k=1}^{10^9} k", r"\frac{1}{9^{9^{9^9}}}"],
)
def test_what_is_beyond_bounds_is_refused_and_not_tried(formula: str) -> None:
    with pytest.raises(Beyond):
        value(formula)


@pytest.mark.parametrize("formula", [r"\frac{1}{0}", r"\ln 0", r"\infty - \infty"])
def test_what_has_no_value_says_so(formula: str) -> None:
    with pytest.raises(Undefined):
        value(formula)


def test_roots_of_negative_numbers_are_refused_where_reals_are_wanted() -> None:
    with pytest.raises(Undefined):
        Evaluator(lambda name: Fraction(0), real=True).of(parse(r"\sqrt{-4}"))
    assert value(r"\sqrt{-4}") == 2j


def test_a_constant_has_no_variables() -> None:
    assert constant(parse("2^{10}")) == 1024
    assert constant(parse("2x")) is None
    assert constant(parse(r"\frac{1}{0}")) is None
