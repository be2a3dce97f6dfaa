r"""Sets of real numbers, told apart by which numbers are in them.

x < 3, (-\infty, 3), \{x \mid x < 3\}, |x| < 2 and [1,2]\cup[2,3]: each is a rule that says whether
a number belongs to it, and a list of numbers where that may change. Two sets are the same if they
agree there and between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from mpmath import mp, mpf

from verifier.math_formula import Node, Unreadable, parse, symbols
from verifier.math_text import chain, group, plain, split
from verifier.math_value import Beyond, Evaluator, Undefined, as_float, constant

_CLOSE = mpf(2) ** -80
_GRID = [Fraction(n, 2) for n in range(-41, 42)] + [Fraction(n) for n in (-1000, -100, 100, 1000)]
_BISECTIONS = 70
_NAMED = {
    **dict.fromkeys((r"\mathbb{R}", "R", "real number", "real"), r"(-\infty,\infty)"),
    **dict.fromkeys((r"\mathbb{R}^+", r"\mathbb{R}_{>0}", "positive real number"), r"(0,\infty)"),
    **dict.fromkeys((r"\mathbb{R}^-", r"\mathbb{R}_{<0}", "negative real number"), r"(-\infty,0)"),
    **dict.fromkeys((r"\mathbb{R}_{\geq0}", "nonnegative real number"), r"[0,\infty)"),
    r"\mathbb{R}^*": r"(-\infty,0)\cup(0,\infty)",
}


_WITHOUT = frozenset({r"\setminus", r"\backslash", "except"})


@dataclass(frozen=True)
class RealSet:
    """`variable` is the name that was used for its numbers, if one was."""

    contains: Callable[[Any], bool]
    borders: tuple[Any, ...]
    variable: str | None = None


def same_set(a: RealSet, b: RealSet) -> bool:
    """Whether both have the same numbers."""
    if a.variable and b.variable and a.variable != b.variable:
        return False
    with mp.workprec(128):
        borders: list[Any] = []
        for border in sorted([*a.borders, *b.borders]):
            if not borders or border - borders[-1] > _CLOSE * max(1, abs(border)):
                borders.append(border)
        between = [(x + y) / 2 for x, y in pairwise(borders)]
        outside = [borders[0] - 1, borders[-1] + 1, borders[0] - 999] if borders else [mpf(0)]
        return all(a.contains(x) == b.contains(x) for x in (*borders, *between, *outside))


def read_set(text: str) -> RealSet | None:
    """The set that a text describes: None if it describes none, or not one of real numbers."""
    with mp.workprec(128):
        return _read(text, 0)


def _read(text: str, depth: int) -> RealSet | None:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    if depth > 8 or not text:
        return None
    for separator, join in (("or", any), (r"\cup", any), ("and", all), (",", all), (r"\cap", all)):
        parts = split(text, frozenset({separator}))
        if len(parts) > 1:
            left = chain(parts[0])[0][0]
            if separator == "," and chain(parts[0])[1] == [r"\neq"]:  # x \neq 0, 1
                parts = [part if chain(part)[1] else rf"{left}\neq {part}" for part in parts]
            if separator == "," and not all(chain(part)[1] for part in parts):
                return _read(rf"\{{{text}\}}", depth + 1)
            return _joined([_read(part, depth + 1) for part in parts], join)
    if len(parts := split(re.sub(r"-(?=\s*\\\{)", r"\\setminus", text), _WITHOUT)) == 2:
        first, second = _read(parts[0], depth + 1), _read(parts[1], depth + 1)
        second = second or _read(rf"\{{{parts[1]}\}}", depth + 1)
        return _joined([first, _complement(second)], all)
    parts, relations = chain(text)
    if relations in ([r"\in"], [r"\notin"]):
        return _member(parts, relations[0], depth)
    if relations:
        return _related(parts, relations)
    if text == r"\emptyset":
        return RealSet(lambda x: False, ())
    bare = re.sub(r"^all\s+|(?<=non)-|s$", "", text.lower())
    named = _NAMED.get(plain(text)) or _NAMED.get(re.sub(r"\s+", " ", bare))
    return _read(named, depth + 1) if named else _grouped(text, depth)


def _member(parts: Sequence[str], relation: str, depth: int) -> RealSet | None:
    real_set = _read(parts[1], depth + 1)
    if real_set is None or not re.fullmatch(r"\\?[a-zA-Z]+(?:_\w)?", plain(parts[0])):
        return None
    named = RealSet(real_set.contains, real_set.borders, plain(parts[0]))
    return named if relation == r"\in" else _complement(named)


def _complement(real_set: RealSet | None) -> RealSet | None:
    if real_set is None:
        return None
    return RealSet(lambda x: not real_set.contains(x), real_set.borders, real_set.variable)


def _joined(parts: Sequence[RealSet | None], join: Callable[..., bool]) -> RealSet | None:
    sets = [part for part in parts if part is not None]
    names = {part.variable for part in sets if part.variable}
    if len(sets) < len(parts) or len(names) > 1:
        return None
    borders = tuple(border for part in sets for border in part.borders)
    return RealSet(
        lambda x: join(part.contains(x) for part in sets), borders, next(iter(names), None)
    )


def _number(text: str) -> Any:
    """The value of a text without variables; None if it is none."""
    try:
        number = constant(parse(text.strip()))
    except Unreadable:
        return None
    return None if number is None else as_float(number)


def _grouped(text: str, depth: int) -> RealSet | None:
    grouped = group(text)
    if grouped is None:
        return None
    inside = text[len(grouped.opening) : -len(grouped.closing)]
    if grouped.opening == r"\{":
        builder = re.split(r"\\mid(?![a-zA-Z])|\||:", inside, maxsplit=1)
        if len(builder) == 2 and not _number(inside):
            return _read(builder[1], depth + 1)
        numbers = [_number(part) for part in grouped.parts]
        if not numbers or any(number is None for number in numbers):
            return None
        return RealSet(lambda x: any(_equal(x, number) for number in numbers), tuple(numbers))
    if len(grouped.parts) != 2 or grouped.closing not in (")", "]"):
        return None
    low, high = map(_number, grouped.parts)
    if low is None or high is None:
        return None
    open_low, open_high = grouped.opening == "(", grouped.closing == ")"

    def contains(x: Any) -> bool:
        above = (x > low and not _equal(x, low)) or (not open_low and _equal(x, low))
        return above and ((x < high and not _equal(x, high)) or (not open_high and _equal(x, high)))

    return RealSet(contains, tuple(end for end in (low, high) if mp.isfinite(end)))


def _equal(x: Any, y: Any) -> bool:
    return bool(x == y) or bool(mp.isfinite(y) and abs(x - y) <= _CLOSE * max(1, abs(y)))


_HOLDS: dict[str, Callable[[int], bool]] = {
    "<": lambda sign: sign < 0,
    ">": lambda sign: sign > 0,
    r"\leq": lambda sign: sign <= 0,
    r"\geq": lambda sign: sign >= 0,
    r"\neq": lambda sign: sign != 0,
    "=": lambda sign: sign == 0,
}


def _related(parts: Sequence[str], relations: Sequence[str]) -> RealSet | None:
    """The solutions of a chain of relations in one variable. Where they change is found by
    looking for changes of sign, exactly for linear ones."""
    try:
        nodes = [parse(part) for part in parts]
    except Unreadable:
        return None
    names = symbols(*nodes) - {r"\infty"}
    if len(names) != 1 or not set(relations) <= _HOLDS.keys():
        return None
    (name,) = names
    signs = [_sign_of(a, b) for a, b in pairwise(nodes)]

    def contains(x: Any) -> bool:
        try:
            return all(
                _HOLDS[relation](sign(x)) for sign, relation in zip(signs, relations, strict=True)
            )
        except (Beyond, Undefined):
            return False

    borders = tuple(root for a, b in pairwise(nodes) for root in _roots(a, b))
    if relations == ["="] and len(borders) > 20:
        return None
    return RealSet(contains, borders, name)


def _difference(a: Node, b: Node, x: Any) -> Any:
    evaluator = Evaluator(lambda name: x, real=True)
    left, right = evaluator.of(a), evaluator.of(b)
    if isinstance(left, tuple) or isinstance(right, tuple):
        raise Undefined("a matrix")
    difference = (
        left - right
        if isinstance(left, Fraction) == isinstance(right, Fraction)
        else (as_float(left) - as_float(right))
    )
    if mp.isinf(as_float(left)) or mp.isinf(as_float(right)):
        return difference
    small = abs(as_float(difference)) <= _CLOSE * max(1, abs(as_float(left)), abs(as_float(right)))
    return mpf(0) if small else as_float(difference)


def _sign_of(a: Node, b: Node) -> Callable[[Any], int]:
    return lambda x: int(mp.sign(_difference(a, b, x)))


def _roots(a: Node, b: Node) -> list[Any]:
    values: list[tuple[Any, Any]] = []
    for x in _GRID:
        try:
            values.append((as_float(x), _difference(a, b, as_float(x))))
        except (Beyond, Undefined):
            continue
    if len(values) < 3 or any(mp.isinf(y) for _, y in values):
        return []
    (x0, y0), (x1, y1), (x2, y2) = values[0], values[len(values) // 2], values[-1]
    if y0 != y1 and _equal((y1 - y0) * (x2 - x1), (y2 - y1) * (x1 - x0)):
        return [x0 - y0 * (x1 - x0) / (y1 - y0)]
    roots = [x for x, y in values if y == 0]
    for (x, y), (z, w) in pairwise(values):
        if y * w < 0:
            roots.append(_bisected(a, b, x, y, z))
    return roots


def _bisected(a: Node, b: Node, low: Any, value: Any, high: Any) -> Any:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            here = _difference(a, b, middle)
        except (Beyond, Undefined):
            break
        if here == 0:
            return middle
        low, high = (low, middle) if here * value < 0 else (middle, high)
    return (low + high) / 2
