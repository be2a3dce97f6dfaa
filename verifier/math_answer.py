r"""Is the answer mathematically equal to the reference? Structure by us, formulas by math-verify.

    list, set ── as a whole, in any order ─┐
    tuple, interval ── in order ───────────┼─▶ leaf: word, choice, unit, number ─▶ math-verify
    union ── as a whole, in any order ─────┘

math-verify compares formulas well, and structure loosely: to it (1, 2) is 1, 2 and {1, 2}, the
list 1, 1, 2 is 1, 2, 2, "on" is "No", and 5 cm is 5 m. So only what has no structure left gets
there. Plain numbers do not, nor formulas that a look at their values tells apart
(`verifier.math_value`), because sympy takes milliseconds for what that does at once.

For judge processes only (`verifier.judge`). The library imports sympy, and both evaluate what
the student wrote: `9^{9^{9}}` takes all the time or memory there is. Its own time-outs are
switched off, because they need SIGALRM and cannot interrupt a long multiplication anyway; the
sandbox's deadline can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from typing import Any

from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Derivative, Expr, I, Integral, Limit, Product, Rational, Sum

from services.trajectory import Verdict
from verifier import math_text, math_value
from verifier.config import AnswerFrom
from verifier.math_text import LIST, MAX_CHARS, UNION, Group, Measure

# What sympy raises on operands that it cannot compare. Not MemoryError: that ends the judge.
_INCOMPARABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
_LATEX = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        # Units are ours: the library's take the variable off 4t.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        ),
    ),
)
_LAZY = (Sum, Product, Integral, Limit, Derivative)  # to evaluate one may take for ever
_INFINITE = {r"\infty", r"+\infty", r"-\infty"}
_MARGIN = 1e-4  # relative
_ROUNDING = Fraction(1, 10**6)  # relative; what a decimal may lack against an exact reference


class Undecided(ValueError):
    """The reference cannot be read, or sympy cannot compare it. The message says which."""


def judge(completion: str, reference: str, answer_from: AnswerFrom = "boxed") -> Verdict:
    """Compares the completion's answer with `reference` (LaTeX or plain, boxed or not)."""
    answer = math_text.extract(completion, answer_from)
    return compare(answer, reference) if answer else math_text.NO_ANSWER


def compare(written: str, reference: str) -> Verdict:
    """Compares an answer that was taken from its completion with `reference`.

    An answer that cannot be read is incorrect. A reference that cannot be read leaves every
    answer but its own text `unknown`, as does a comparison that sympy cannot finish.
    """
    if len(written) > MAX_CHARS:
        return Verdict("incorrect", "the answer is too long")
    answer, expected = map(math_text.normalise, (written, _reference(reference)))
    if not expected:
        return Verdict("unknown", "the reference is empty")
    try:
        same = _same_answer(answer, expected)
    except Undecided as reason:
        return Verdict("unknown", str(reason))
    if same:
        return Verdict("correct", "equals the reference")
    return Verdict("incorrect", "differs from the reference")


def _reference(reference: str) -> str:
    return (
        math_text.extract(reference, "boxed") or math_text.extract(reference, "hashes") or reference
    )


def _same_answer(answer: str, gold: str) -> bool:
    if math_text.plain(answer) == math_text.plain(gold):
        return True
    if (
        len(gold_choice := re.sub(r"\\text|[{}(). ]", "", gold)) == 1
        and gold_choice in "ABCDEFGHIJ"
    ):
        return math_text.choice(answer) == gold_choice
    golds, answers = _members(gold), _members(answer)
    if len(golds) == len(answers) == 1:
        return _same_part(answers[0], golds[0])
    return _matched(answers, golds, _same_part)


def _members(text: str) -> list[str]:
    r"""The members of a list or a set; `\pm` stands for two of them."""
    found = math_text.group(text)
    if found and (found.opening, found.closing) == (r"\{", r"\}"):
        parts: Sequence[str] = found.parts
    else:
        parts = math_text.split(text, LIST) or [text]
    members: list[str] = []
    for part in parts:
        if r"\pm" in part:
            members.append(part.replace(r"\pm", "+").replace(r"\mp", "-"))
            members.append(part.replace(r"\pm", "-").replace(r"\mp", "+"))
        else:
            members.append(part)
    return members


def _matched(
    answers: Sequence[str], golds: Sequence[str], same: Callable[[str, str], bool]
) -> bool:
    """Whether each of `golds` has an answer of its own, whatever the order, and none is left."""
    if len(answers) != len(golds):
        return False
    left = list(answers)
    undecided: Undecided | None = None
    for gold in golds:
        for place, answer in enumerate(left):
            try:
                if same(answer, gold):
                    del left[place]
                    break
            except Undecided as reason:
                undecided = reason
        else:
            if undecided is None:
                return False
    if undecided is not None and left:
        raise undecided
    return True


def _same_part(answer: str, gold: str) -> bool:
    """One member of a list against another: anything but a list."""
    if math_text.plain(answer) == math_text.plain(gold):
        return True
    gold_word, word = math_text.word(gold), math_text.word(answer)
    if gold_word is not None:
        return word == gold_word
    answer, gold = _unlabelled(answer, gold)
    answer_group, gold_group = math_text.group(answer), math_text.group(gold)
    if gold_group and answer_group and max(len(gold_group.parts), len(answer_group.parts)) > 1:
        return _same_group(answer_group, gold_group)
    for several, one in ((answer_group, gold), (gold_group, answer)):
        if several and len(several.parts) > 1 and not _SET.search(one):
            return False
    unions = math_text.split(answer, UNION), math_text.split(gold, UNION)
    if len(unions[0]) == len(unions[1]) > 1:
        return _matched(*unions, _same_part)
    return _same_measure(math_text.measure(answer), math_text.measure(gold), answer, gold)


# What an interval may be written as, other than in brackets.
_SET = re.compile(r"[<>=]|\\(?:leq|geq|lt|gt|neq?|in|cup|cap|setminus|mathbb|R|text)(?![a-zA-Z])")


def _same_group(answer: Group, gold: Group) -> bool:
    """A tuple or an interval: the same brackets, the same parts in the same order."""
    if (answer.opening, answer.closing) != (gold.opening, gold.closing):
        return False
    if gold.opening == r"\{":
        return _matched(answer.parts, gold.parts, _same_part)
    if len(answer.parts) != len(gold.parts):
        return False
    return all(map(_same_part, answer.parts, gold.parts))


_LABEL = re.compile(
    r"(?P<label>\\?[a-zA-Z]+(?:\s*\{[^{}=]*\})?(?:_\w|_\{[^{}=]*\}|')*\s*(?:\([^()=]*\))?|\([^()=]*\))"
    r"\s*(?:=|\\in(?![a-z]))(?P<rest>[^=<>]+)"
)


def _unlabelled(answer: str, gold: str) -> tuple[str, str]:
    """Both without "x =" in front, or as they are if they name different things."""
    labels = _LABEL.fullmatch(answer), _LABEL.fullmatch(gold)
    names = {math_text.plain(found["label"]) for found in labels if found}
    if len(names) != 1:
        return answer, gold
    a, b = (
        found["rest"].strip() if found else text
        for found, text in zip(labels, (answer, gold), strict=True)
    )
    return a, b


def _same_measure(a: Measure | None, b: Measure | None, answer: str, gold: str) -> bool:
    """A unit that only one names is taken for granted; two that differ must convert."""
    if a is None or b is None:
        value, other = (a.value if a else answer), (b.value if b else gold)
        if _same_formula(value, other):
            return True
        dimensions = {m.dimension for m in (a, b) if m}
        if "%^1" in dimensions:
            hundredth = r"\frac{{{}}}{{100}}"
        elif "degrees^1" in dimensions and r"\pi" in answer + gold:
            hundredth = r"\frac{{({})\pi}}{{180}}"
        else:
            return False
        value = hundredth.format(value) if a else value
        return _same_formula(value, hundredth.format(other) if b else other)
    if a.dimension != b.dimension:
        return False
    if a.factor == b.factor:
        return _same_formula(a.value, b.value)
    ours, theirs = math_text.number(a.value), math_text.number(b.value)
    return bool(ours and theirs and ours.value * a.factor == theirs.value * b.factor)


def _same_formula(answer: str, gold: str) -> bool:
    if math_text.plain(answer) == math_text.plain(gold):
        return True
    a, b = math_text.number(answer), math_text.number(gold)
    if a and b:
        if not (a.decimal or b.decimal):
            return a.value == b.value
        return abs(a.value - b.value) <= _ROUNDING * abs(b.value)
    for one, other in ((answer, gold), (gold, answer)):
        if math_text.plain(one) in _INFINITE and r"\infty" not in other:
            return False
    if len(answer) == len(gold) == 1:
        return False  # two variables; the library does not tell b from B
    if math_value.differ(answer, gold):
        return False
    parsed = _parse(gold)
    if not parsed:
        raise Undecided("the reference cannot be parsed")
    predicted = () if math_text.word(answer) in ("yes", "no") else _parse(answer)
    if not predicted:
        return False  # it cannot be read, or answers another question
    if _differ(parsed[0], predicted[0]):
        return False
    try:
        return bool(
            verify(
                list(parsed),
                list(predicted),
                timeout_seconds=None,
                raise_on_error=True,
                allow_set_relation_comp=True,
            )
        )
    except _INCOMPARABLE as error:
        raise Undecided(f"the comparison failed: {type(error).__name__}") from None


def _differ(a: Any, b: Any) -> bool:
    """Whether two formulas have different values at some point of their variables.

    Then they are not equal, and sympy need not search a tenth of a second for a proof that they
    are. The margin is far above rounding; whatever cannot be evaluated is left to the library.
    """
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or a.has(*_LAZY) or b.has(*_LAZY):
        return False
    symbols = a.free_symbols | b.free_symbols
    names = sorted({symbol.name for symbol in symbols})
    if any(len(name) > 1 or name in "eE" for name in names):
        return False  # the library knows when a name is a product of letters, or Euler's number
    point = {symbol: Rational(10 + 3 * names.index(symbol.name), 7) for symbol in symbols}
    try:
        x, y = complex(a.subs(point).evalf()), complex(b.subs(point).evalf())
    except _INCOMPARABLE:
        return False
    return isfinite(abs(x - y)) and abs(x - y) > _MARGIN * max(abs(x), abs(y))


@lru_cache(maxsize=256)  # a group's completions share their reference, often their answers
def _parse(formula: str) -> tuple[Any, ...]:
    """The sympy form of all of `formula`; empty if any of it cannot be read."""
    rational = math_text.number(formula)
    if rational is not None and not rational.decimal:  # its grammar takes 10 ms for an integer
        return (Rational(rational.value.numerator, rational.value.denominator),)
    # The library's last resort is wrong here: the first number that it finds somewhere in the
    # text (`first_match` stops that).
    parsed = parse(
        rf"\boxed{{{formula}}}",
        _LATEX,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return tuple(_with_imaginary_unit(expression) for expression in parsed)


def _with_imaginary_unit(expression: Any) -> Any:
    """The library reads the i of 6i\\pi as a real variable, and that of 6\\pi i as another."""
    free = getattr(expression, "free_symbols", ())
    return expression.xreplace({symbol: I for symbol in free if symbol.name == "i"})
