r"""What a formula is worth at a point.

Rational numbers are exact up to a hundred thousand bits, all others are floating-point numbers
of any precision and magnitude, so nothing underflows, and 2^{2024} is not 2^{2025}.

Work is counted, not timed: a formula that needs more steps, or numbers larger than e^{2^{4096}}, is
`Beyond` what is compared here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp, mpc, mpf

from verifier.math_formula import TRIG, Node, symbols, walk

_BITS = 1 << 17  # of an exact number
_PRECISION = 128  # bits
_MAGNITUDE = 4096  # bits of an exponent
_STEPS = 20_000  # nodes that one evaluation may visit
_TRUNCATED = mpf(2) ** -90


class Beyond(ArithmeticError):
    """The value needs more work or memory than comparing answers is worth."""


class Undefined(ArithmeticError):
    """The formula has no value at this point, or none that is real where one is wanted."""


# A point: what the variable of a name is worth.
Point = Callable[[str], Fraction]


class Evaluator:
    """The value of trees at one point: Fraction, mpf, mpc or a matrix (tuple of rows).

    `real` refuses roots and logarithms of negative numbers. `log_base` is what a logarithm without
    a base has. After `of`, `needed` says how many bits would have kept all terms.
    """

    def __init__(self, point: Point, *, real: bool = False, log_base: int | None = None) -> None:
        self._point, self._real, self._log_base = point, real, log_base
        self._bound: dict[str, Fraction] = {}
        self._steps = 0
        self.needed = 0
        self.rough = False  # whether a limit process took part, which is exact to some digits only

    def of(self, node: Node) -> Any:
        """Raises Beyond or Undefined."""
        self._steps += 1
        if self._steps > _STEPS:
            raise Beyond("it takes too many steps")
        match node:
            case ("num", number):
                return number
            case ("sym", name):
                return self._symbol(name)
            case ("neg", a):
                return self._times(Fraction(-1), self.of(a))
            case ("add", a, b):
                return self._plus(self.of(a), self.of(b))
            case ("mul", a, b):
                return self._times(self.of(a), self.of(b))
            case ("div", a, b):
                return self._times(self.of(a), self._power(self.of(b), Fraction(-1)))
            case ("pow", a, b):
                return self._power(self.of(a), self.of(b))
            case ("matrix", rows):
                return tuple(tuple(self.of(item) for item in row) for row in rows)
            case ("apply", name, *arguments):
                values = [_digits(self.of(argument)) for argument in arguments]
                return _hashed(f"{name}({self._point('')}, {values})")
            case ("call", name, *arguments):
                return self._call(name, [self.of(argument) for argument in arguments])
            case (("sum" | "prod") as kind, name, lower, upper, body):
                return self._series(kind, name, self.of(lower), self.of(upper), body)
            case ("int", name, lower, upper, body):
                return self._integral(name, self.of(lower), self.of(upper), body)
        raise AssertionError(node)

    def _symbol(self, name: str) -> Any:
        if name in self._bound:
            return self._bound[name]
        match name:
            case "e":
                return mp.e + 0
            case r"\pi":
                return mp.pi + 0
            case "i":
                if self._real:
                    raise Undefined("i")
                return mpc(0, 1)
            case r"\infty":
                return mp.inf
        return self._point(name)

    # -------------------------------------------------------------------------- arithmetic

    def _plus(self, a: Any, b: Any) -> Any:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return _bounded(a + b)
        if isinstance(a, tuple) or isinstance(b, tuple):
            return _elementwise(self._plus, a, b)
        x, y = as_float(a), as_float(b)
        if x and y and mp.isfinite(x) and mp.isfinite(y):
            gap = abs(_magnitude(x) - _magnitude(y))
            if gap > mp.prec - 8:
                self.needed = max(self.needed, gap + 64)
        result = x + y
        if mp.isnan(result):
            raise Undefined("infinity minus infinity")
        return result

    def _times(self, a: Any, b: Any) -> Any:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return self._matrix_product(a, b)
        for one, other in ((a, b), (b, a)):
            if isinstance(one, tuple):
                return tuple(tuple(self._times(other, item) for item in row) for row in one)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return _bounded(a * b)
        if a == 0 or b == 0:
            return Fraction(0)
        return _sized(as_float(a) * as_float(b))

    def _matrix_product(self, a: Any, b: Any) -> Any:
        if len(a[0]) != len(b):
            raise Undefined("matrices do not fit")
        columns = list(zip(*b, strict=True))
        return tuple(tuple(self._dot(row, column) for column in columns) for row in a)

    def _dot(self, row: Any, column: Any) -> Any:
        total: Any = Fraction(0)
        for x, y in zip(row, column, strict=True):
            total = self._plus(total, self._times(x, y))
        return total

    def _power(self, base: Any, exponent: Any) -> Any:
        if isinstance(base, tuple):
            return self._matrix_power(base, exponent)
        if isinstance(exponent, tuple):
            raise Undefined("a matrix as exponent")
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            if base == 0 and exponent <= 0:
                raise Undefined("a power of zero")
            whole = exponent.denominator == 1
            if whole and _size(base) * abs(exponent) <= _BITS:
                return base ** int(exponent)
        x = as_float(base)
        if x == 0 and mp.re(as_float(exponent)) <= 0:
            raise Undefined("a power of zero")
        if isinstance(exponent, Fraction) and exponent.denominator > 1 and _negative(x):
            if exponent.denominator % 2:
                return _sign(exponent) * self._float_power(-x, exponent)
            if self._real:
                raise Undefined("an even root of a negative number")
        integral = isinstance(exponent, Fraction) and exponent.denominator == 1
        if self._real and _negative(x) and not integral:
            raise Undefined("a power of a negative number")
        if integral and _negative(x):
            return _sign(exponent) * self._float_power(-x, exponent)
        return self._float_power(x, exponent)

    def _float_power(self, x: Any, exponent: Any) -> Any:
        y = as_float(exponent)
        if x and mp.isfinite(x) and _magnitude(y) + max(0, _magnitude(mp.log(x))) > _MAGNITUDE:
            raise Beyond("it is too large")
        with mp.extraprec(max(0, min(_magnitude(y), _MAGNITUDE)) if y else 0):
            result = mp.power(as_float(x), y)
        return _sized(+result)

    def _matrix_power(self, base: Any, exponent: Any) -> Any:
        if exponent == -1:
            inverse = mp.inverse(mp.matrix([[as_float(x) for x in row] for row in base]))
            return tuple(
                tuple(inverse[r, c] for c in range(inverse.cols)) for r in range(inverse.rows)
            )
        if not isinstance(exponent, Fraction) or exponent.denominator > 1 or not 0 < exponent < 50:
            raise Undefined("a power of a matrix")
        result = base
        for _ in range(int(exponent) - 1):
            result = self._matrix_product(result, base)
        return result

    # --------------------------------------------------------------------------- functions

    def _call(self, name: str, values: list[Any]) -> Any:
        if name == "root":
            return self._root(*values)
        if name in _OF_MATRICES:
            return _OF_MATRICES[name](self, *values)
        if any(isinstance(value, tuple) for value in values):
            raise Undefined(f"{name} of a matrix")
        if name in _EXACT and all(isinstance(value, Fraction) for value in values):
            exact = _EXACT[name](*values)
            if exact is not None:
                return exact
        if name in ("ln", "log", "lg"):
            return self._log(name, *values)
        function = _FLOAT.get(name)
        if function is None or any(v and _magnitude(as_float(v)) > _MAGNITUDE for v in values):
            raise Beyond(f"{name} of such a number is not computed")
        try:
            result = function(*map(as_float, values))
        except (ValueError, TypeError, ZeroDivisionError, NotImplementedError):
            raise Undefined(name) from None
        if self._real and isinstance(result, mpc) and result.imag:
            raise Undefined(name)
        return result if isinstance(result, Fraction) else _sized(result)

    def _root(self, x: Any, degree: Any) -> Any:
        if not isinstance(degree, Fraction) or degree == 0:
            return self._power(x, self._power(degree, Fraction(-1)))
        if isinstance(x, Fraction) and degree.denominator == 1 and 0 <= degree <= 64:
            exact = _exact_root(x, int(degree))
            if exact is not None:
                return exact
        return self._power(x, 1 / degree)

    def _log(self, name: str, x: Any, base: Any = None) -> Any:
        value = as_float(x)
        if not value:
            raise Undefined("the logarithm of zero")
        if self._real and _negative(value):
            raise Undefined("the logarithm of a negative number")
        if base is None:
            base = {"ln": None, "lg": 10, "log": self._log_base}[name]
        result = mp.log(value)
        if base is None:
            return result
        divisor = mp.log(as_float(base)) if base else Fraction(0)
        if not divisor:
            raise Undefined("the base of a logarithm")
        return result / divisor

    def _series(self, kind: str, name: str, lower: Any, upper: Any, body: Node) -> Any:
        join = self._plus if kind == "sum" else self._times
        if not isinstance(lower, Fraction) or lower.denominator > 1:
            raise Undefined("a bound that is no integer")
        if upper == mp.inf and kind == "sum":
            self.rough = True
            return mp.nsum(
                lambda k: as_float(self._with(name, Fraction(int(k)), body)), [int(lower), mp.inf]
            )
        if not isinstance(upper, Fraction) or upper.denominator > 1:
            raise Undefined("a bound that is no integer")
        total: Any = Fraction(kind == "prod")
        if upper - lower > _STEPS:
            raise Beyond("too many terms")
        for k in range(int(lower), int(upper) + 1):
            total = join(total, self._with(name, Fraction(k), body))
        return total

    def _integral(self, name: str, lower: Any, upper: Any, body: Node) -> Any:
        self.rough = True
        with mp.workprec(64):
            return mp.quad(
                lambda x: as_float(self._with(name, _exact(x), body)),
                [as_float(lower), as_float(upper)],
            )

    def _with(self, name: str, value: Any, body: Node) -> Any:
        before = self._bound.get(name)
        self._bound[name] = value
        try:
            return self.of(body)
        finally:
            if before is None:
                del self._bound[name]
            else:
                self._bound[name] = before


def _exact(x: Any) -> Fraction:
    sign, mantissa, exponent, _ = x._mpf_
    signed = Fraction(-int(mantissa) if sign else int(mantissa))
    return signed * Fraction(2 ** max(0, int(exponent)), 2 ** max(0, -int(exponent)))


def _exact_root(x: Fraction, degree: int) -> Fraction | None:
    """The rational root, if there is one; odd roots of negative numbers are negative."""
    if degree < 1 or (x < 0 and degree % 2 == 0):
        return None
    parts = []
    for part in (abs(x.numerator), x.denominator):
        with mp.workprec(part.bit_length() // degree + 32):
            root = int(mp.nint(mp.root(part, degree)))
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(-parts[0] if x < 0 else parts[0], parts[1])


def _size(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _bounded(x: Fraction) -> Any:
    return x if _size(x) <= _BITS else as_float(x)


def as_float(x: Any) -> Any:
    """The number as mpmath has it, in the precision of now."""
    return mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def _negative(x: Any) -> bool:
    return not isinstance(x, mpc) and bool(x < 0)


def _sign(exponent: Fraction) -> int:
    return -1 if exponent.numerator % 2 else 1


def _magnitude(x: Any) -> int:
    """The exponent of 2 just above `x`, which is not zero."""
    if isinstance(x, mpc):
        return max(_magnitude(part) for part in (x.real, x.imag) if part) if x else 0
    if not x or not mp.isfinite(x):
        return 0
    return int(x._mpf_[2] + x._mpf_[3])


def _sized(x: Any) -> Any:
    if _magnitude(x).bit_length() > _MAGNITUDE:
        raise Beyond("it is too large")
    return x


def _elementwise(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or [*map(len, a)] != [*map(len, b)]:
        raise Undefined("matrices of different shapes")
    return tuple(tuple(map(function, x, y)) for x, y in zip(a, b, strict=True))


def _digits(x: Any) -> str:
    return str(x) if isinstance(x, Fraction) else str(mp.nstr(x, 20))


@lru_cache(maxsize=4096)
def _hashed(key: str) -> Fraction:
    """A number that depends on all of `key` and on nothing else."""
    return Fraction(2 * random.Random(key).randrange(10**6, 10**7) + 1, 2**22)


def _factorial(n: Fraction) -> Fraction | None:
    if n.denominator > 1 or not 0 <= n < 8_000:
        return None
    return Fraction(math.factorial(int(n)))


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator > 1 or k.denominator > 1 or not 0 <= n < 8_000:
        return None
    return Fraction(math.comb(int(n), int(k)) if k >= 0 else 0)


def _whole(function: Callable[..., int]) -> Callable[..., Fraction | None]:
    def apply(*values: Fraction) -> Fraction | None:
        if any(value.denominator > 1 for value in values):
            raise Undefined("a divisor of a fraction")
        return Fraction(function(*map(int, values)))

    return apply


def _rounded(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        if isinstance(x, mpc) or _magnitude(x) > _MAGNITUDE:
            raise Undefined("rounding")
        near = mp.nint(x)
        return Fraction(int(near if abs(x - near) < _TRUNCATED else function(x)))

    return apply


def _transposed(_: Evaluator, x: Any) -> Any:
    return tuple(zip(*x, strict=True)) if isinstance(x, tuple) else x


def _determinant(evaluator: Evaluator, x: Any) -> Any:
    if not isinstance(x, tuple) or len(x) != len(x[0]) or len(x) > 8:
        raise Undefined("a determinant")
    if len(x) == 1:
        return x[0][0]
    total: Any = Fraction(0)
    for index, item in enumerate(x[0]):
        minor = tuple(row[:index] + row[index + 1 :] for row in x[1:])
        part = evaluator._times(item, _determinant(evaluator, minor))
        total = evaluator._plus(total, evaluator._times(Fraction((-1) ** index), part))
    return total


_OF_MATRICES: dict[str, Callable[..., Any]] = {"transpose": _transposed, "det": _determinant}
_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "abs": abs,
    "norm": abs,
    "floor": lambda x: Fraction(x.__floor__()),
    "ceil": lambda x: Fraction(x.__ceil__()),
    "factorial": _factorial,
    "binomial": _binomial,
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
    "max": max,
    "min": min,
    "sgn": lambda x: Fraction((x > 0) - (x < 0)),
}
_FLOAT: dict[str, Callable[..., Any]] = {
    **{name: getattr(mp, name) for name in TRIG},
    **{f"{name}h": getattr(mp, f"{name}h") for name in TRIG},
    **{f"arc{name}": getattr(mp, f"a{name}") for name in TRIG},
    **{f"ar{name}h": getattr(mp, f"a{name}h") for name in ("sin", "cos", "tan")},
    **{f"arc{name}h": getattr(mp, f"a{name}h") for name in ("sin", "cos", "tan")},
    **{"exp": mp.exp, "abs": abs, "norm": abs, "erf": mp.erf, "gamma": mp.gamma, "zeta": mp.zeta},
    **{"factorial": mp.factorial, "double factorial": mp.fac2, "binomial": mp.binomial},
    **{"floor": _rounded(mp.floor), "ceil": _rounded(mp.ceil), "max": max, "min": min},
    **{"arg": mp.arg, "Re": mp.re, "Im": mp.im, "cis": mp.expj, "sgn": mp.sign},
}


def constant(node: Node) -> Any:
    """The real value of a formula without variables, or None.

    Fractions are exact, all else has 128 bits.
    """
    if symbols(node) - {r"\infty"} or any(part[0] == "apply" for part in walk(node)):
        return None
    with mp.workprec(_PRECISION):
        try:
            result = Evaluator(lambda name: Fraction(0)).of(node)
        except (Beyond, Undefined):
            return None
    return None if isinstance(result, mpc | tuple) else result
