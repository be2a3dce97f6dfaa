"""Residues against Python's own integers, and the answers that only they decide."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from verifier.math_answer import judge
from verifier.math_formula import Node
from verifier.math_modular import _is_prime, same_residues

numbers: st.SearchStrategy[Node] = st.fractions(-50, 50, max_denominator=9).map(
    lambda f: ("num", f)
)
naturals: st.SearchStrategy[Node] = st.integers(0, 9).map(lambda n: ("num", Fraction(n)))
formulas: st.SearchStrategy[Node] = st.recursive(
    numbers,
    lambda part: st.one_of(
        st.tuples(st.sampled_from(["add", "mul", "div"]), part, part),
        st.tuples(st.just("neg"), part),
        st.tuples(st.just("pow"), part, naturals),
    ),
    max_leaves=6,
)


def value(node: Node) -> Fraction:
    match node:
        case ("num", number):
            return Fraction(number)
        case ("neg", a):
            return -value(a)
        case ("add", a, b):
            return value(a) + value(b)
        case ("mul", a, b):
            return value(a) * value(b)
        case ("div", a, b):
            return value(a) / value(b)
        case ("pow", a, b):
            return value(a) ** int(value(b))
    raise AssertionError(node)


@given(formulas, formulas)
def test_residues_say_what_exact_arithmetic_says(a: Node, b: Node) -> None:
    try:
        expected = value(a) == value(b)
    except ZeroDivisionError:
        assume(False)
    assert same_residues(a, b) in (expected, None)
    try:
        same = same_residues(a, ("num", value(a)))
    except ZeroDivisionError:
        assume(False)
    assert same in (True, None)


def test_primes_are_primes() -> None:
    small = [n for n in range(41, 5_000) if all(n % d for d in range(2, n))]
    assert [n for n in range(41, 5_000) if _is_prime(n)] == small
    assert _is_prime(2**61 - 1)


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        (r"2^{10^9}+1", r"2^{10^9}", "incorrect"),
        (r"1+2^{10^9}", r"2^{10^9}+1", "correct"),
        (r"4^{5\cdot10^8}-1", r"2^{10^9}-1", "correct"),
        (r"3^{2^{100}}+2", r"3^{2^{100}}+1", "incorrect"),
        (r"3^{2^{100}}+1", r"9^{2^{99}}+1", "correct"),
        (r"\frac{2^{10^9}+1}{3}", r"\frac{2^{10^9}+4}{3}", "incorrect"),
    ],
)
def test_numbers_that_nobody_writes_out_are_told_apart(
    answer: str, reference: str, outcome: str
) -> None:
    assert judge(rf"\boxed{{{answer}}}", reference).outcome == outcome
