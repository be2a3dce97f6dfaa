r"""Is the answer mathematically equal to the reference? By the math-verify library.

The answer is the last `\boxed{}`; a text without a box is searched by math-verify itself. An
answer counts as a whole: one part of an answer with several is incorrect.

For judge processes only (`verifier.judge`). The library imports sympy, and both evaluate what
the student wrote: `9^{9^{9}}` takes all the time or memory there is. Its own time-outs are
switched off, because they need SIGALRM and cannot interrupt a long multiplication anyway; the
sandbox's deadline can.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from services.trajectory import Verdict

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
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITERS = re.compile(r"\\[()\[\]]|[\s$]")  # math mode opens and closes between two boxes
_JOINS = frozenset({",", ";", "and", "or", ",and", ",or"})
_BOXED_ONLY = (LatexExtractionConfig(boxed_match_priority=0),)
_ANYWHERE = (LatexExtractionConfig(), ExprExtractionConfig())
# An unboxed answer stands at the end. The library's regular expressions are quadratic in
# unclosed brackets: 6,000 characters of them take 0.6 s.
_TAIL_CHARS = 2_000


def judge(completion: str, reference: str) -> Verdict:
    r"""Compares the completion's answer with `reference` (LaTeX or plain, boxed or not).

    An answer that cannot be read is incorrect. A reference that cannot be read leaves every
    answer but its own text `unknown`, as does a comparison that sympy cannot finish.
    """
    answer = last_boxed(completion)
    expected = last_boxed(reference) or reference
    if answer and _plain(answer) == _plain(expected):
        return Verdict("correct", "equals the reference")
    gold = _parse_whole(expected)
    if not gold:
        return Verdict("unknown", "the reference cannot be parsed")
    if answer is None:
        predicted = parse(
            completion[-_TAIL_CHARS:], _ANYWHERE, fallback_mode="no_fallback", parsing_timeout=None
        )
    else:
        predicted = _parse_whole(answer)
    if not predicted:
        return Verdict("incorrect", "no answer found")
    try:
        equal = verify(gold, predicted, timeout_seconds=None, raise_on_error=True)
    except _INCOMPARABLE as error:
        return Verdict("unknown", f"the comparison failed: {type(error).__name__}")
    if equal:
        return Verdict("correct", "equals the reference")
    return Verdict("incorrect", "differs from the reference")


def last_boxed(text: str) -> str | None:
    r"""What the last filled `\boxed{}` (or `\fbox{}`) holds.

    Boxes joined by a comma, "and" or "or" are one answer of several parts, so they come back
    together, joined by commas. Without any box the result is None; it is empty when every box
    is empty, or when the last one is never closed (the answer was not finished).
    """
    openings = list(_BOX.finditer(text))
    if not openings:
        return None
    spans: list[tuple[int, int, str]] = []  # start, end, content
    for opening in openings:
        end = _closing_brace(text, opening.end())
        if end is None:
            spans.clear()  # whatever was boxed before, it is not the last answer
            continue
        if content := text[opening.end() : end].strip():
            spans.append((opening.start(), end + 1, content))
    parts: list[str] = []
    next_start: int | None = None
    for start, end, content in reversed(spans):
        if next_start is not None:
            between = _DELIMITERS.sub("", text[end:next_start])
            if end > next_start or between not in _JOINS:
                break
        parts.append(content)
        next_start = start
    return ", ".join(reversed(parts))


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group that was opened just before `start` closes; escaped braces don't count."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
    return None


def _parse_whole(answer: str) -> list[Any]:
    """The sympy form of all of `answer`; empty if any of it cannot be read."""
    # The library's last resorts are wrong here: the first number that it finds somewhere in the
    # text (`first_match` stops that), or the text without what it takes for units.
    parsed: list[Any] = parse(
        rf"\boxed{{{answer}}}",
        _BOXED_ONLY,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return parsed


def _plain(answer: str) -> str:
    """The text without what means nothing in mathematics: space, dollar signs, a full stop."""
    return re.sub(r"\s", "", answer).lstrip("$").rstrip("$.")
