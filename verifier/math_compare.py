r"""Whether two formulas are worth the same.

Whether a difference is zero shows in two precisions: a true zero shrinks with the second. Formulas
with variables are compared at points; a formula of the reals is compared where it has real values.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp, mpf

from verifier.math_formula import Node, symbols, walk
from verifier.math_modular import same_residues
from verifier.math_value import Beyond, Evaluator, Point, Undefined, as_float

_PRECISION, _SECOND, _MOST = 128, 320, 1 << 15  # bits
_INTEGERS = frozenset("nmkjlNMKp")
_SIGNIFICANT = 6  # digits that a rounded number must have
_DOUBLE = 15  # digits from which on noise of double precision may be in them


def _odd(r: random.Random, low: int, high: int) -> Fraction:
    """In hundredths, roughly: an even denominator, so that as an exponent it has no odd root."""
    return Fraction(2 * r.randrange(low, high) + 1, 192)


_POINTS: tuple[tuple[str, Callable[[random.Random], Fraction]], ...] = (
    ("0 to 1", lambda r: _odd(r, 10, 90)),
    ("negative", lambda r: -_odd(r, 10, 390)),
    ("odd", lambda r: Fraction(2 * r.randrange(2, 8) + 1)),
    ("even", lambda r: Fraction(2 * r.randrange(2, 8))),
    ("1 to 4", lambda r: _odd(r, 100, 390)),
    ("mixed", lambda r: Fraction(r.choice((-1, 1))) * _odd(r, 10, 390)),
    ("whole", lambda r: Fraction(r.randrange(2, 20))),
    ("to 40", lambda r: _odd(r, 400, 3_900)),
    ("below 1", lambda r: _odd(r, 10, 90)),
)
_ENOUGH = 4  # points at which two formulas agree, or all where they can be compared, two at least


@lru_cache(maxsize=4096)
def _coordinate(kind: int, name: str) -> Fraction:
    label, draw = _POINTS[kind]
    return draw(random.Random(f"{label}: {name}"))


def points(names: set[str], *, whole: bool) -> Iterator[Point]:
    """Where formulas are compared; once, where they have no variables."""

    def point(kind: int) -> Point:
        return lambda name: _coordinate(kind, name)

    for kind, (label, _) in enumerate(_POINTS):
        if not whole or label in ("even", "odd", "whole"):
            yield point(kind)
        if not names:
            return


def same_value(a: Node, b: Node) -> bool | None:
    """Whether two formulas are worth the same wherever they are compared; None if that cannot be
    told. The second is the reference: what it is worth must be worth the work, and the first is
    different if it takes more."""
    bare = any(part[:2] == ("call", "log") and len(part) == 3 for part in (*walk(a), *walk(b)))
    if not bare:
        known = _same(a, b, None)
        return known if known is not None else same_residues(a, b)
    results = [_same(a, b, base) for base in (None, 10)]
    return True if True in results else results[0]


def _same(a: Node, b: Node, log_base: int | None) -> bool | None:
    names = symbols(a, b) | {part[1] for part in (*walk(a), *walk(b)) if part[0] == "apply"}
    parts = [*walk(a), *walk(b)]
    rounds = any(part[0] == "call" and part[1] in ("floor", "ceil", "gcd", "lcm") for part in parts)
    whole = rounds and bool(names) and names <= _INTEGERS
    for real in (True, False) if names else (False,):
        compared = 0
        for point in points(names, whole=whole):
            same = _same_at(a, b, point, real=real, log_base=log_base)
            if same is False:
                return False
            compared += same is True
            if compared == _ENOUGH:
                return True
        if compared >= (2 if names else 1):
            return True
    return None


def _same_at(a: Node, b: Node, point: Point, *, real: bool, log_base: int | None) -> bool | None:
    """At one point; None where either is undefined or cannot be told."""
    precision, last = _PRECISION, None
    while precision <= _MOST:
        with mp.workprec(precision):
            evaluator = Evaluator(point, real=real, log_base=log_base)
            try:
                y = evaluator.of(b)
            except Undefined:
                return None
            except Beyond:
                return False if _affordable(a, point) else None
            try:
                x = evaluator.of(a)
            except Undefined:
                domain = any(part[:2] == ("call", "abs") for part in walk(b))
                return False if not real or (domain and symbols(b)) else None
            except Beyond:
                return False
            verdict, last = _compared(x, y, last, rough=evaluator.rough)
        if verdict is False or (verdict is True and evaluator.needed <= precision):
            return verdict
        precision = max(_SECOND if precision == _PRECISION else 4 * precision, evaluator.needed)
    return None


def _affordable(a: Node, point: Point) -> bool:
    try:
        Evaluator(point).of(a)
    except (Beyond, Undefined):
        return False
    return True


def _compared(x: Any, y: Any, last: Any, *, rough: bool) -> tuple[bool | None, Any]:
    """Whether two values are one, or None if that takes more digits, and their difference."""
    if isinstance(x, tuple) or isinstance(y, tuple):
        return _compared_matrices(x, y, rough=rough), None
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y, None
    u, v = as_float(x), as_float(y)
    if not (mp.isfinite(u) and mp.isfinite(v)):
        return bool(u == v), None
    difference, size = abs(u - v), max(abs(u), abs(v))
    if rough:
        return bool(difference <= mpf(10) ** -12 * max(size, 1)), None
    if difference > mpf(2) ** -20 * size and last is None:
        return False, None
    if last is None:
        return None, difference
    bits = mp.prec - 70
    if difference <= mpf(2) ** -bits * size or difference <= last * mpf(2) ** -(bits - _PRECISION):
        return True, None
    return (False, None) if difference > last / 2 else (None, difference)


def _compared_matrices(x: Any, y: Any, *, rough: bool) -> bool | None:
    if not (isinstance(x, tuple) and isinstance(y, tuple)) or [*map(len, x)] != [*map(len, y)]:
        return False
    pairs = [(u, v) for p, q in zip(x, y, strict=True) for u, v in zip(p, q, strict=True)]
    return all(_compared(u, v, mpf(1), rough=rough)[0] is not False for u, v in pairs) and all(
        abs(as_float(u) - as_float(v)) <= mpf(10) ** -20 * max(1, abs(as_float(v)))
        for u, v in pairs
    )


def factor(a: Node, b: Node) -> Any:
    """The constant that one formula is the multiple of another by; None if there is none."""
    ratios: list[Any] = []
    with mp.workprec(128):
        for point in points(symbols(a, b) or {"x"}, whole=False):
            try:
                x, y = (as_float(Evaluator(point).of(node)) for node in (a, b))
            except (Beyond, Undefined):
                continue
            if not x or not y:
                if bool(x) != bool(y) and abs(x - y) > mpf(2) ** -80:
                    return None
                continue
            ratios.append(x / y)
    if len(ratios) < 3 or any(abs(f - ratios[0]) > mpf(2) ** -80 * abs(ratios[0]) for f in ratios):
        return None
    return mp.re(ratios[0])


def numerator(node: Node) -> Node:
    """The numerator of a formula over one denominator."""
    return _over(node)[0]


def _over(node: Node) -> tuple[Node, Node]:
    one: Node = ("num", Fraction(1))
    match node:
        case ("add", a, b):
            (p, q), (r, s) = _over(a), _over(b)
            return ("add", ("mul", p, s), ("mul", r, q)), ("mul", q, s)
        case ("neg", a):
            p, q = _over(a)
            return ("neg", p), q
        case ("mul", a, b):
            (p, q), (r, s) = _over(a), _over(b)
            return ("mul", p, r), ("mul", q, s)
        case ("div", a, b):
            (p, q), (r, s) = _over(a), _over(b)
            return ("mul", p, s), ("mul", q, r)
    return node, one


DECIMAL = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d*)\.(?P<rest>\d+)(?:\\(?:times|cdot)10\^\{?(?P<e>-?\d{1,3})\}?)?"
)


def rounds(match: re.Match[str], value: Any, *, digits: int = _SIGNIFICANT) -> bool:
    """Whether a decimal is `value` as far as its digits go, rounded or cut off there."""
    written_digits = (match["whole"] + match["rest"]).lstrip("0")
    if len(written_digits) < digits or not mp.isfinite(as_float(value)):
        return False
    scale = Fraction(10) ** (int(match["e"] or 0) - len(match["rest"]))
    written = Fraction(int(match["whole"] + match["rest"])) * (-1 if match["sign"] == "-" else 1)
    with mp.workprec(400):
        exact = as_float(value) / as_float(scale)
        if isinstance(value, Fraction) and (value / scale).denominator == 1:
            return bool(
                len(written_digits) > _DOUBLE
                and abs(written - value / scale) <= 4 * abs(written) / 10**_DOUBLE
            )
        off = abs(as_float(written) - exact)
        cut = mp.floor(abs(exact)) == abs(written)
        noise = (
            len(written_digits) > _DOUBLE and off <= 4 * abs(as_float(written)) / mpf(10) ** _DOUBLE
        )
        return bool(off <= mpf("0.5") or (cut and exact * written > 0) or noise)


_CONSTANTS = {"c", "C", "K", "k", "D"}


def renamed_constant(ours: Node, theirs: Node) -> Node:
    """Constants of integration have no names of their own."""
    indexed = [{p[1] for p in walk(node) if p[0] == "apply"} for node in (ours, theirs)]
    if indexed in ([{"c_"}, {"C_"}], [{"C_"}, {"c_"}]):  # c_1 and C_1
        ours = _substituted(ours, ("apply", *indexed[0]), ("apply", *indexed[1]))
    mine, their = symbols(ours) - symbols(theirs), symbols(theirs) - symbols(ours)
    if len(mine) != 1 or len(their) != 1 or not mine | their <= _CONSTANTS:
        return ours
    (old,), (new,) = mine, their
    added = [part for node in (ours, theirs) for part in _terms(node)]
    if ("sym", old) not in added or ("sym", new) not in added:
        return ours
    return _substituted(ours, ("sym", old), ("sym", new))


def _terms(node: Node) -> list[Node]:
    return [*_terms(node[1]), *_terms(node[2])] if node[0] == "add" else [node]


def _substituted(node: Node, old: Node, new: Node) -> Node:
    node = (*new, *node[2:]) if node[:2] == old else node
    return tuple(_substituted(p, old, new) if isinstance(p, tuple) else p for p in node)
