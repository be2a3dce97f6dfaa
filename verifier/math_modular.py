r"""Rational numbers too large to be written out, compared by their residues at random primes.

`2^{10^9}` and `2^{10^9}+1` agree in more digits than anybody computes. Their residues differ at
almost every prime, and equal numbers agree at all: a few primes of 61 bits decide (Schwartz and
Zippel), in as many steps as the formulas are long.
"""

from __future__ import annotations

import random
from fractions import Fraction

from verifier.math_formula import Node

_BITS, _PRIMES, _LARGEST_EXPONENT = 61, 4, 1 << 12  # bits of an exponent that is written out
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # exact below 2^64


def same_residues(a: Node, b: Node) -> bool | None:
    """Whether two rational numbers are the same; None where one is no such number, or its
    residues cannot be told."""
    compared = 0
    for prime in _primes():
        x, y = _residue(a, prime), _residue(b, prime)
        if x is None or y is None:
            continue
        if x != y:
            return False
        compared += 1
    return True if compared >= 2 else None


def _residue(node: Node, prime: int) -> int | None:
    match node:
        case ("num", Fraction() as number):
            return _ratio(number.numerator, number.denominator, prime)
        case ("neg", a):
            x = _residue(a, prime)
            return None if x is None else -x % prime
        case (("add" | "mul" | "div") as kind, a, b):
            x, y = _residue(a, prime), _residue(b, prime)
            if x is None or y is None:
                return None
            if kind == "div":
                return _ratio(x, y, prime)
            return (x + y if kind == "add" else x * y) % prime
        case ("pow", a, b):
            x, exponent = _residue(a, prime), _integer(b, prime - 1)
            return pow(x, exponent, prime) if x and exponent is not None else None
    return None


def _ratio(above: int, below: int, prime: int) -> int | None:
    return above * pow(below, -1, prime) % prime if below % prime else None


def _integer(node: Node, modulus: int) -> int | None:
    """An integer's residue at any modulus; None for what is not plainly an integer."""
    match node:
        case ("num", Fraction() as number):
            return number.numerator % modulus if number.denominator == 1 else None
        case ("neg", a):
            x = _integer(a, modulus)
            return None if x is None else -x % modulus
        case (("add" | "mul") as kind, a, b):
            x, y = _integer(a, modulus), _integer(b, modulus)
            if x is None or y is None:
                return None
            return (x + y if kind == "add" else x * y) % modulus
        case ("pow", a, b):
            x, exponent = _integer(a, modulus), _exponent(b)
            return None if x is None or exponent is None else pow(x, exponent, modulus)
    return None


def _exponent(node: Node) -> int | None:
    """A natural number of bounded length, exactly: not every modulus has inverses."""
    match node:
        case ("num", Fraction() as number) if number.denominator == 1 and number >= 0:
            return number.numerator if number.numerator.bit_length() <= _LARGEST_EXPONENT else None
        case (("add" | "mul") as kind, a, b):
            x, y = _exponent(a), _exponent(b)
            if x is None or y is None:
                return None
            result = x + y if kind == "add" else x * y
            return result if result.bit_length() <= _LARGEST_EXPONENT else None
        case ("pow", a, b):
            x, y = _exponent(a), _exponent(b)
            if x is None or y is None or x.bit_length() * y > _LARGEST_EXPONENT:
                return None
            return int(x**y)
    return None


def _primes() -> list[int]:
    """Some that nobody can foresee, so that no answer is made for them."""
    draw, primes = random.SystemRandom(), list[int]()
    while len(primes) < _PRIMES:
        candidate = draw.getrandbits(_BITS) | 1 << (_BITS - 1) | 1
        if _is_prime(candidate):
            primes.append(candidate)
    return primes


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test, which is exact with these witnesses."""
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    for witness in _WITNESSES:
        x = pow(witness, (number - 1) >> twos, number)
        if x in (1, number - 1):
            continue
        if all((x := x * x % number) != number - 1 for _ in range(twos - 1)):
            return False
    return True
