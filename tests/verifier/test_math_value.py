"""Formulas told apart by their values; what can be read in two ways is not read at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy

from tests.verifier.math_pairs import RIGHT
from tests.verifier.test_math_answer import flat, references
from verifier.math_answer import _parse
from verifier.math_text import normalise
from verifier.math_value import differ


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("e^z", "e^{-42}"),
        (r"x^2 e^{-2y}", "0"),
        (r"\frac{x + 1}{2}", r"\frac{x}{2} + 1"),
        (r"2\pi r h", r"\pi r^2 h"),
        (r"-\ln(2)", r"\ln(2)"),
        (r"\sqrt{n^2 + 1}", "n + 1"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"),
        ("xy/2", "xy"),
        ("3 - 2 - 1", "3 - (2 - 1)"),
        ("-2^2", "4"),
        ("6i", "6"),
    ],
)
def test_different_values_differ(a: str, b: str) -> None:
    assert differ(a, b)
    assert differ(b, a)
    assert not differ(a, a)


@pytest.mark.parametrize(
    "formula",
    [
        *("f(x)", "x(x + 1)", "x_1", "x'", "n!", "|x|", "1/2x", "x^10", "x^{2}^{3}", "2 3", "x2"),
        *(r"1\frac{2}{3}", r"\sin 2x", "sin(x)", "2pi", r"x \pm 1", "1, 2", "x = 1", "A^T"),
        *(r"\sqrt{-2}", r"\sqrt[3]{-8}", r"\ln(-1)", r"\frac{1}{0}", "9^{9^{9}}", "", "(", "x +"),
        *(r"\text{a}", r"\infty", "50%", "(" * 150, "x" * 300),
    ],
)
def test_what_is_not_clear_is_left_to_the_library(formula: str) -> None:
    assert not differ(formula, "0.123")
    assert not differ("0.123", formula)


def test_no_right_answer_is_told_apart() -> None:
    assert [pair for pair in flat(RIGHT) if differ(*map(normalise, pair))] == []


@pytest.mark.slow
def test_what_sympy_rewrites_keeps_its_value(deepmath: Path) -> None:
    """The references of DeepMath against their expanded, factored and joined forms."""
    rewritten = 0
    for gold in sorted({normalise(reference) for reference in references(deepmath)}):
        if differ(gold, "0.123"):  # it can be read
            (expression,) = _parse(gold)[:1] or (None,)
            if isinstance(expression, sympy.Expr):
                for rewrite in (sympy.expand, sympy.factor, sympy.together, sympy.powsimp):
                    other = normalise(sympy.latex(rewrite(expression)))
                    assert not differ(gold, other), (gold, other)
                    rewritten += 1
    assert rewritten > 500
