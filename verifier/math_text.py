r"""Mathematical answers as text: where they stand, what they are made of. No mathematics yet.

    completion ──extract──▶ answer ──normalise──▶ LaTeX of one spelling ──split──▶ parts

Everything here is linear in the text, but for what a bounded prefix limits, and imports nothing
that evaluates: hostile text costs nothing until `verifier.math_answer` hands parts of it to sympy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from services.trajectory import Verdict
from verifier.config import AnswerFrom

NO_ANSWER = Verdict("incorrect", "no answer found")
MAX_CHARS = 2_000
"""A longer answer is none. DeepMath's longest has 150 characters; sympy takes seconds for more."""

# ------------------------------------------------------------------------------- extraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITERS = re.compile(r"\\[()\[\]]|[\s$]")  # math mode opens and closes between two boxes
_JOINS = frozenset({",", ";", "and", "or", ",and", ",or"})
_ANNOUNCED = re.compile(r".*\banswer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)


def extract(completion: str, answer_from: AnswerFrom) -> str | None:
    r"""The answer as it was written; None if there is none, empty if it was not finished.

    `boxed` is the last `\boxed{}`, `hashes` what follows the last `####` on its line, and
    `final_line` the last line with anything on it, from after the words "answer is".
    """
    if answer_from == "boxed":
        return last_boxed(completion)
    if answer_from == "hashes":
        _, found, rest = completion.rpartition("####")
        return rest.lstrip("#").split("\n", 1)[0].strip() if found else None
    lines = completion.strip().splitlines()
    if not lines:
        return None
    line = lines[-1][-MAX_CHARS:]
    return last_boxed(line) or _ANNOUNCED.sub("", line, count=1).strip(" *:")


def last_boxed(text: str) -> str | None:
    r"""What the last filled `\boxed{}` (or `\fbox{}`) holds.

    Boxes joined by a comma, "and" or "or" are one answer of several parts, so they come back
    together, joined by commas. Without any box the result is None; it is empty when every box
    is empty, or when the last one is never closed (the answer was not finished).
    """
    openings = list(_BOX.finditer(text))
    if not openings:
        return None
    closing = _closing_braces(text)
    spans: list[tuple[int, int, str]] = []  # start, end, content
    for opening in openings:
        end = closing.get(opening.end() - 1)
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


def _closing_braces(text: str) -> dict[int, int]:
    """Where each group closes, by where it opens; escaped braces don't count.

    One pass for all: ten thousand nested boxes shall not cost ten thousand scans.
    """
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


# ------------------------------------------------------------------------------ normal form

_SPELLINGS: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\]]*\])?", r" \\newline "),  # between two rows; see the end of this table
        (r"\\[()\[\]]|(?<!\\)\$", ""),  # math mode on and off
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])", ""),
        (r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])|\s", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mathbf|mathit|boldsymbol|bm)\s*(?=\{)", ""),
        (r"\\(?:textbf|textit|textrm|textsf|mathrm|mbox|operatorname)\s*(?=\{)", r"\\text"),
        (r"\\text\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\text\{\s*[iI]nfinity\s*\}|^[iI]nfinity$", r"\\infty"),
        (r"[−–]", "-"),
        (r"\\le(?![a-zA-Z])|≤", r"\\leq"),
        (r"\\ge(?![a-zA-Z])|≥", r"\\geq"),
        (r"°|\\degree(?![a-zA-Z])|\^\s*\{?\s*\\circ\s*\}?", r"^\\circ"),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\newline(?![a-zA-Z])", r"\\\\"),
    )
]
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}([ ,])\d{3}(?:\1\d{3})*(?:\.\d+)?(?![\d,])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")


def normalise(answer: str) -> str:
    """The same answer with one spelling for what LaTeX can spell in many ways."""
    text = answer
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".").strip()
    while text.startswith("{") and _closing_braces(text).get(0) == len(text) - 1:
        text = text[1:-1].strip()
    if not re.search(r"[(\[]|\\\{", text):  # in (1,200) the comma separates
        text = _GROUPED.sub(lambda digits: re.sub("[ ,]", "", digits[0]), text)
    text = _REPEATING.sub(lambda found: _fraction(*found.groups()), text)
    return re.sub(r"\s+", " ", text)


def plain(text: str) -> str:
    """A normalised text without spaces and needless braces: equal ones mean the same."""
    return re.sub(r"([_^])\{([a-zA-Z0-9])\}", r"\1\2", re.sub(r"\s", "", text))


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} is (16 - 1) / 90."""
    denominator = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    value = Fraction(int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0"), denominator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


# ---------------------------------------------------------------------------------- numbers

_INTEGER = r"\d{1,300}"
_DECIMAL = r"(?:\d{1,300}\.\d{0,300}|\.\d{1,300})"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<decimal>{_DECIMAL})|"
    rf"(?P<a>-?{_INTEGER})/(?P<b>{_INTEGER})|"
    rf"\\frac\{{(?P<c>-?{_INTEGER})\}}\{{(?P<d>-?{_INTEGER})\}}|"
    rf"(?P<integer>{_INTEGER}))"
)


class Number(NamedTuple):
    """A rational number. A decimal one may have been rounded by who wrote it."""

    value: Fraction
    decimal: bool


def number(text: str) -> Number | None:
    """The number that all of `text` is, if it is an integer, a decimal or a fraction of two."""
    found = _NUMBER.fullmatch(plain(text))
    if found is None:
        return None
    if found["decimal"] or found["integer"]:
        value = Fraction(found["decimal"] or found["integer"])
    else:
        denominator = int(found["b"] or found["d"])
        if denominator == 0:
            return None
        value = Fraction(int(found["a"] or found["c"]), denominator)
    return Number(-value if found["sign"] == "-" else value, bool(found["decimal"]))


# -------------------------------------------------------------------------------- structure

_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z]*\*?\}|\\[a-zA-Z]+|\\.|[a-zA-Z]+|.", re.DOTALL)
_OPENING, _CLOSING = frozenset({"(", "[", "{", r"\{"}), frozenset({")", "]", "}", r"\}"})
LIST = frozenset({",", ";", "and", "or"})
UNION = frozenset({r"\cup"})


class Group(NamedTuple):
    r"""A bracketed answer: one of ( [ \{, the parts between commas, one of ) ] \}."""

    opening: str
    parts: tuple[str, ...]
    closing: str


def split(text: str, separators: frozenset[str]) -> list[str]:
    """The parts between separators that stand in no bracket; empty parts are left out."""
    parts: list[list[str]] = [[]]
    for token, depth in _tokens(text):
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for tokens in parts if (part := "".join(tokens).strip())]


def group(text: str) -> Group | None:
    """The group that all of `text` is, if it is one."""
    tokens = list(_tokens(text.strip()))
    if len(tokens) < 2:
        return None
    (opening, _), (closing, _) = tokens[0], tokens[-1]
    if opening not in _OPENING - {"{"} or closing not in _CLOSING - {"}"}:
        return None
    if any(depth == 0 for _, depth in tokens[1:-1]):
        return None
    inside = "".join(token for token, _ in tokens[1:-1])
    return Group(opening, tuple(split(inside, frozenset({",", ";"}))), closing)


def _tokens(text: str) -> list[tuple[str, int]]:
    """Each token with how many brackets are open around it; a bracket stands in itself, but for
    the first and the last, which stand in nothing."""
    found: list[tuple[str, int]] = []
    depth = 0
    for token in _TOKEN.findall(text):
        if token in _CLOSING or token.startswith(r"\end{"):
            depth -= 1
        found.append((token, depth))
        if token in _OPENING or token.startswith(r"\begin{"):
            depth += 1
    return found


# ------------------------------------------------------------------------- words and choices

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '-]+")
_SAME_WORD = {"true": "yes", "false": "no", "dne": "does not exist", "infinite": "infinity"}
_CHOICE = re.compile(
    r"(?:option|choice|answer)?\s*(?:\(([A-Ja-j])\)|([A-J])\)?)\s*(?:$|[.:]|(?<=\)))", re.IGNORECASE
)


def word(text: str) -> str | None:
    """The word or words that all of `text` is, in lower case; None for a formula.

    Up to three letters in a row may be a product of variables, unless they stand in `\\text`.
    """
    bare = _TEXT.sub(r"\1", text).strip().rstrip(".")
    if _WORDS.fullmatch(bare) is None:
        return None
    found = re.sub(r"^(?:the|an?) ", "", " ".join(bare.lower().split()))
    found = _SAME_WORD.get(found, found)
    formula = len(bare) <= 3 and bare == text and found not in ("yes", "no", "does not exist")
    return None if formula else found


def choice(text: str) -> str | None:
    """The letter of a multiple choice, from A to J: B, (b), B) or "B. what it says"."""
    bare = _TEXT.sub(r"\1", text).strip()
    found = _CHOICE.match(bare)
    if found is None or (found[2] and not found[2].isupper()):
        return None
    return str(found[1] or found[2]).upper()


# ------------------------------------------------------------------------------------ units

_LENGTH = {"mm": "1/1000", "cm": "1/100", "m": "1", "km": "1000"}
_LENGTH |= {"inch": "0.0254", "ft": "0.3048", "yard": "0.9144", "mile": "1609.344"}
_SCALES: dict[str, dict[str, str]] = {
    "length": _LENGTH,
    "mass": {"mg": "1/1000", "g": "1", "kg": "1000"},
    "time": {"s": "1", "min": "60", "h": "3600", "day": "86400"},
    "volume": {"ml": "1/1000", "l": "1"},
    "money": {"cent": "1/100", "dollar": "1"},
}
_KNOWN = {
    name: (dimension, Fraction(factor))
    for dimension, scale in _SCALES.items()
    for name, factor in scale.items()
}
_NAMES = {
    **{"millimeter": "mm", "centimeter": "cm", "meter": "m", "kilometer": "km"},
    **{"millimetre": "mm", "centimetre": "cm", "metre": "m", "kilometre": "km"},
    **{"inches": "inch", "in": "inch", "foot": "ft", "feet": "ft", "yd": "yard", "mi": "mile"},
    **{"milligram": "mg", "gram": "g", "kilogram": "kg", "hour": "h", "hr": "h"},
    **{"second": "s", "sec": "s", "minute": "min", "milliliter": "ml", "liter": "l"},
    **{"litre": "l", "mL": "ml", "L": "l", r"\$": "dollar", "percent": "%", r"\%": "%"},
    **{"degree": "degrees", r"^\circ": "degrees"},
}
_POWER = {"": 1, "square ": 2, "cubic ": 3, "^2": 2, "^3": 3}
# A unit without \text has two letters at least: a single one is a variable.
_BARE = "|".join(
    sorted({name for name in [*_KNOWN, *_NAMES] if name.isalpha() and len(name) > 1}, key=len)[::-1]
)
_MEASURE = re.compile(
    r"(?P<value>.*[\w)}\]!])\s*(?:"
    r"\\text\s*\{(?P<text>[^{}]+)\}|(?P<sign>\\?%|\^\\circ)"
    rf"|(?<![a-zA-Z\\])(?P<bare>(?:square |cubic )?(?:{_BARE})s?)"
    r")\s*(?P<power>\^(?:[23]|\{[23]\}))?"
)
_BASED = re.compile(r"(?P<value>[0-9A-F]+)_\{?(?:\\text\{)?(?P<base>\d+|two|eight|ten)\}*")


class Measure(NamedTuple):
    """A value (text) with its unit: of what dimension, and how many of the dimension's own.

    A unit that the table does not know is a dimension of its own.
    """

    value: str
    dimension: str
    factor: Fraction


def measure(text: str) -> Measure | None:
    """A number or formula that ends in a unit, a percent sign, a degree sign or a base."""
    if text.startswith(r"\$"):
        return Measure(text[2:].strip(), "money^1", Fraction(1))
    if based := _BASED.fullmatch(plain(text)):
        return Measure(based["value"], f"base {based['base']}", Fraction(1))
    found = _MEASURE.fullmatch(text)
    if found is None or _TEXT.search(found["value"]):
        return None
    unit = " ".join((found["text"] or found["sign"] or found["bare"]).split())
    prefix = next((p for p in ("square ", "cubic ") if unit.startswith(p)), "")
    unit = unit.removeprefix(prefix)
    name = _NAMES.get(unit) or _NAMES.get(unit.removesuffix("s")) or unit
    dimension, factor = (
        _KNOWN.get(name) or _KNOWN.get(name.removesuffix("s")) or (name, Fraction(1))
    )
    power = max(_POWER[prefix], _POWER[plain(found["power"] or "")])
    return Measure(found["value"].strip(), f"{dimension}^{power}", factor**power)
