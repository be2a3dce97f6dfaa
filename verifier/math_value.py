r"""What a formula is worth at a point, straight from its text: enough to tell two formulas apart.

Formulas with different values somewhere are not equal, whatever their letters stand for, and most
wrong answers show it. The grammar is small and leaves out all that can be read in two ways, such as
f(x), x_1, 1/2x, 2\frac{1}{3}, x^10 or \sin 2x: those are left to the parser of the library, which
takes twenty milliseconds where this takes a twentieth of one.
"""

from __future__ import annotations

import cmath
import re
from math import isfinite

_TOKEN = re.compile(
    r"\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]|[-+/^(){}\[\]]|\s+|(?P<other>.)", re.DOTALL
)
_NAME = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|pi|ln)")  # sin x without its backslash
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "nu", "rho", "sigma", "tau")
_LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"\\{name}" for name in _GREEK)]
_FUNCTIONS = {
    r"\sin": cmath.sin,
    r"\cos": cmath.cos,
    r"\tan": cmath.tan,
    r"\sinh": cmath.sinh,
    r"\cosh": cmath.cosh,
    r"\exp": cmath.exp,
}
_TIMES = (r"\cdot", r"\times")
_CONSTANTS = {"e": cmath.e, "i": 1j, r"\pi": cmath.pi}
_MAX_CHARS = 200
_MARGIN = 1e-4  # relative; far above rounding, and above what a rounded decimal lacks
# Two points, so that no chance makes the difference.
_POINTS = ((0.23, 0.0137), (1.31, 0.217))  # (value of the first letter, step to the next)


def differ(a: str, b: str) -> bool:
    """Whether two formulas have different values at each of two points."""
    if max(len(a), len(b)) > _MAX_CHARS or _NAME.search(a) or _NAME.search(b):
        return False
    for first, step in _POINTS:
        try:
            x, y = (_Reader(formula, first, step).value() for formula in (a, b))
        except (ValueError, ArithmeticError, RecursionError):
            return False
        if not isfinite(abs(x - y)) or abs(x - y) <= _MARGIN * max(abs(x), abs(y)):
            return False
    return True


class _Reader:
    """Reads one formula from left to right; a ValueError is what it does not understand."""

    def __init__(self, formula: str, first: float, step: float) -> None:
        self._first, self._step = first, step
        self._tokens: list[str] = []
        for found in _TOKEN.finditer(formula):
            if found["other"]:
                raise ValueError(found["other"])
            if not found[0].isspace():
                self._tokens.append(found[0])
        self._tokens.append("")
        self._place = 0

    def value(self) -> complex:
        found = self._sum()
        self._expect("")
        return found

    @property
    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next
        self._place += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise ValueError(token)

    def _sum(self) -> complex:
        sign = -1 if self._next == "-" else 1
        if self._next in ("+", "-"):
            self._take()
        total = sign * self._product()
        while self._next in ("+", "-"):
            sign = -1 if self._take() == "-" else 1
            total += sign * self._product()
        return total

    def _product(self) -> complex:
        product = self._power()
        while self._next not in ("", "+", "-", ")", "}", "]"):
            if self._next == "/":
                self._take()
                product /= self._power()
                if self._next not in ("", "+", "-", ")", "}", "]"):
                    raise ValueError("1/2x")
                return product
            if self._next in _TIMES:
                self._take()
            elif self._next[0] in ".0123456789" or (
                self._next == r"\frac" and self._tokens[self._place - 1][-1] in "0123456789"
            ):
                raise ValueError("x2, 2 3 or a mixed fraction")
            product *= self._power()
        return product

    def _power(self) -> complex:
        base = self._atom()
        if self._next != "^":
            return base
        self._take()
        if self._next == "{":
            if self._tokens[self._place + 1] in ("T", "H"):
                raise ValueError("transposed")
            exponent = self._group("{", "}")
        elif len(token := self._take()) == 1 and (token.isdigit() or token.isalpha()):
            if (token.isdigit() and self._next[:1].isdigit()) or token in "TtHc":
                raise ValueError("x^10, or transposed")
            exponent = complex(int(token)) if token.isdigit() else self._letter(token)
        else:
            raise ValueError(token)
        if self._next == "^":
            raise ValueError("a power of a power")
        return _power(base, exponent)

    def _group(self, opening: str, closing: str) -> complex:
        self._expect(opening)
        found = self._sum()
        self._expect(closing)
        return found

    def _atom(self) -> complex:
        token = self._next
        if token in ("(", "{"):
            return self._group(token, ")" if token == "(" else "}")
        self._take()
        if token[:1].isdigit() or token[:1] == ".":
            return complex(float(token))
        if token == r"\frac":
            return self._group("{", "}") / self._group("{", "}")
        if token == r"\sqrt":
            root = self._group("[", "]") if self._next == "[" else complex(2)
            return _power(self._group("{", "}"), 1 / root)
        if token == r"\ln":
            return cmath.log(_positive(self._group("(", ")")))
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self._group("(", ")"))
        if self._next == "(":
            raise ValueError("f(x)")
        return self._letter(token)

    def _letter(self, token: str) -> complex:
        token = token.lower()  # the library does not tell b from B
        if token in _CONSTANTS:
            return complex(_CONSTANTS[token])
        return complex(self._first + self._step * _LETTERS.index(token))


def _power(base: complex, exponent: complex) -> complex:
    whole = exponent.imag == 0 and exponent.real == int(exponent.real)
    return base**exponent if whole else _positive(base) ** exponent


def _positive(value: complex) -> complex:
    """Of anything else roots and logarithms have several values."""
    if value.imag != 0 or value.real <= 0:
        raise ValueError("a root or logarithm with several values")
    return value
