r"""Formulas as trees: LaTeX and plain notation in, nested tuples out. Nothing is evaluated here.

    ("num", Fraction)                   ("sym", "x")               ("neg", a)
    ("add" | "mul" | "div" | "pow", a, b)                          ("call", "sin", a, …)
    ("apply", "f", a, …)  a function or sequence that nobody knows ("matrix", ((a, …), …))
    ("sum" | "prod", "k", lower, upper, body)                      ("int", "x", lower, upper, body)

Case counts: R is not r. `e`, `i` and `\pi` are numbers. A fraction after an integer is a mixed
number, a function without brackets takes the product that follows it, and `1/2x` is read from left
to right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

Node: TypeAlias = tuple[Any, ...]

_TOKEN = re.compile(
    r"\\(?:begin|end)\{[a-zA-Z]*\*?\}|\\[a-zA-Z]+|\\.|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    r"|[a-zA-Z]|\*\*|\s+|.",
    re.DOTALL,
)
_MAX_DIGITS, _MAX_DEPTH = 2_000, 60
TRIG = ("sin", "cos", "tan", "cot", "sec", "csc")
_NAMES_OF_FUNCTIONS = """
ln log lg exp gcd lcm max min sup inf det arg Re Im cis erf deg dim ker sgn operatorname
arsinh arcosh artanh arcsinh arccosh arctanh
"""
_ALIASES = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot"}
_ALIASES |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
FUNCTIONS = frozenset(
    [
        *_ALIASES,
        *TRIG,
        *(f"arc{n}" for n in TRIG),
        *(f"{n}h" for n in TRIG),
        *_NAMES_OF_FUNCTIONS.split(),
    ]
)
_UNKNOWN_FUNCTIONS = frozenset([*"fghFGHO", r"\phi", r"\varphi", r"\psi", r"\Theta", r"\Omega"])
_STYLES = frozenset([r"\mathbf", r"\mathrm"])
_NAMES_OF_ACCENTS = """
vec hat bar overline tilde dot ddot widehat overrightarrow widetilde mathcal mathbb
mathfrak mathscr text angle triangle
"""
_ACCENTS = frozenset(f"\\{name}" for name in _NAMES_OF_ACCENTS.split())
_NAMES_OF_SYMBOLS = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
omicron pi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta
Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar aleph nabla partial infty emptyset dots top
complement dagger
"""
_SYMBOLS = frozenset(f"\\{name}" for name in _NAMES_OF_SYMBOLS.split())
_FENCES = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor"}
_FENCES |= {r"\lceil": r"\rceil", r"\lvert": r"\rvert", "|": "|", r"\|": r"\|"}
_ROUNDINGS = {r"\lfloor": "floor", r"\lceil": "ceil", r"\lvert": "abs", "|": "abs", r"\|": "norm"}
_TIMES = frozenset([r"\cdot", r"\times", "*", r"\ast"])
_OVER = frozenset(["/", r"\div"])
_NAME_OF = re.compile(r"[A-Z]{2,}")


class Unreadable(ValueError):
    """The text is no formula that is known here; the message says where reading ended."""


@lru_cache(maxsize=1024)  # a group's completions share their reference, often their answers
def parse(text: str) -> Node:
    """The tree of all of `text`.

    Raises:
        Unreadable: some of it has no known meaning.
    """
    reader = _Reader(text)
    node = reader.sum()
    if reader.next:
        raise Unreadable(reader.next)
    return node


class _Reader:
    """Reads one formula from left to right."""

    def __init__(self, text: str) -> None:
        self._tokens = [token for token in _TOKEN.findall(text) if not token.isspace()][::-1]
        self._bars: list[str] = []  # brackets of one sign for both sides that are open
        self._depth = 0

    @property
    def next(self) -> str:
        """The token that is read next; empty at the end."""
        return str(self._tokens[-1]) if self._tokens else ""

    def _take(self, *wanted: str) -> str:
        if not self._tokens or (wanted and self._tokens[-1] not in wanted):
            raise Unreadable(self.next or "it ends early")
        return str(self._tokens.pop())

    def sum(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        total = self._signed()
        while self.next in ("+", "-"):
            minus = self._take() == "-"
            term = self._signed()
            total = ("add", total, ("neg", term) if minus else term)
        self._depth -= 1
        return total

    def _signed(self) -> Node:
        if self.next in ("+", "-"):
            return ("neg", self._signed()) if self._take() == "-" else self._signed()
        return self._product()

    def _product(self, *, argument: bool = False) -> Node:
        """Factors; those of an `argument` end before the next function."""
        product = self._power()
        while self._factor_follows():
            if self.next in _TIMES:
                if argument and self._tokens[-2:-1] == ["("]:
                    break
                self._take()
                minus = self.next == "-"
                product = ("mul", product, self._signed() if minus else self._power())
            elif self.next in _OVER:
                self._take()
                product = ("div", product, self._power())
            elif argument and (self.next.lstrip("\\") in FUNCTIONS or self.next == "("):
                break
            else:
                product = self._juxtaposed(product)
        return product

    def _factor_follows(self) -> bool:
        token = self.next
        if not token or token in "+-,;=<>&)]}:" or token in (r"\}", r"\\", r"\rfloor", r"\rceil"):
            return False
        return token not in self._bars and token != r"\rvert" and not token.startswith(r"\end")

    def _juxtaposed(self, product: Node) -> Node:
        digits = self.next[:1].isdigit()
        factor = self._power()
        if product[0] == "num" and product[1].denominator == 1:
            if factor[0] == "num" and self.next == "/":  # 3 1/2
                self._take()
                factor = ("div", factor, self._power())
            if factor[0] == "div" and factor[1][0] == factor[2][0] == "num":
                return ("add", product, factor)
        if digits and factor[0] == "num":
            raise Unreadable("a number after a factor")
        return ("mul", product, factor)

    def _power(self) -> Node:
        return self._postfix(self._atom())

    def _postfix(self, base: Node) -> Node:
        while True:
            if self.next == "!":
                self._take()
                name = "factorial"
                if self.next == "!":
                    self._take()
                    name = "double factorial"
                base = ("call", name, base)
            elif self.next in ("^", "**"):
                self._take()
                base = self._raised(base)
            elif self.next in (r"\%", "%"):
                self._take()
                base = ("div", base, ("num", Fraction(100)))
            else:
                return base

    def _raised(self, base: Node) -> Node:
        if self.next == r"\circ":
            self._take()
            return ("mul", base, ("div", ("sym", r"\pi"), ("num", Fraction(180))))
        transposed = self._tokens[-2:-1] if self.next == "{" else self._tokens[-1:]
        if base[0] in ("matrix", "mul") and transposed in (["T"], [r"\top"], [r"\intercal"]):
            self._argument()
            return ("call", "transpose", base)
        signed = self.next in ("+", "-")
        exponent = self._exponent_signed() if signed else self._argument()
        if self.next in ("^", "**"):  # 2^3^2 is 2^(3^2)
            self._take()
            exponent = self._raised(exponent)
        return ("pow", base, exponent)

    def _exponent_signed(self) -> Node:
        sign = self._take()
        node = self._argument()
        return ("neg", node) if sign == "-" else node

    def _argument(self) -> Node:
        """What a command takes: a group, or one token."""
        return self._group("{") if self.next == "{" else self._atom(bare=True)

    def _digit(self) -> Node:
        r"""What \frac takes: a group, or one digit of a longer number."""
        token = self.next
        if len(token) > 1 and token.isdigit():
            self._tokens[-1:] = [token[1:], token[0]]
        return self._argument()

    def _group(self, opening: str) -> Node:
        self._take(opening)
        closing = _FENCES[opening]
        symmetric = opening == closing
        if symmetric:
            self._bars.append(closing)
        else:
            hidden, self._bars = self._bars, []
        node = self.sum()
        self._take(closing)
        if symmetric:
            self._bars.pop()
        else:
            self._bars = hidden
        return node

    def _atom(self, *, bare: bool = False) -> Node:
        token = self.next
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return _number(self._take())
        if token in ("(", "[", "{"):
            return self._group(token)
        if token in _ROUNDINGS:
            return ("call", _ROUNDINGS[token], self._group(token))
        if token in _READERS:
            self._take()
            return _READERS[token](self)
        if token.startswith(r"\begin"):
            return self._matrix()
        if token.lstrip("\\") in FUNCTIONS and token.startswith("\\"):
            return self._function(self._take()[1:])
        if token in _STYLES or token in _ACCENTS:
            accent = "" if self._take() in _STYLES else token
            name = self._letters()
            function = token in (r"\text", r"\mathrm") and name.strip() in FUNCTIONS
            return self._function(name.strip()) if function else self._named(accent + name)
        if token in _SYMBOLS or (len(token) == 1 and token.isalpha()):
            return self._named(self._take(), bare=bare)
        raise Unreadable(token or "it ends early")

    def _named(self, name: str, *, bare: bool = False) -> Node:
        """A symbol with its primes, its index and, for some, its arguments."""
        while self.next == "'" and not bare:
            name += self._take()
        if self.next == "_" and not bare:
            self._take()
            name, arguments = name + "_", [self._index()]
            if self.next == "(" and name[0] in _UNKNOWN_FUNCTIONS:
                arguments += self._list("(")
            return ("apply", name, *arguments)
        called = name.rstrip("'") in _UNKNOWN_FUNCTIONS or name.endswith("'")
        if self.next == "(" and called and not bare:
            return ("apply", name, *self._list("("))
        if self.next == "(" and name in (r"\Gamma", r"\zeta") and not bare:
            return ("call", name[1:].lower(), *self._list("("))
        return ("sym", name)

    def _index(self) -> Node:
        if self.next != "{":
            return self._argument()
        saved = list(self._tokens)
        try:
            return self._group("{")
        except Unreadable:  # max, or 1,2
            self._tokens = saved
            return ("sym", self._letters())

    def _letters(self) -> str:
        """The text of a group, or of one token."""
        if self.next != "{":
            return self._take()
        depth, text = 0, ""
        while True:
            token = self._take()
            depth += (token == "{") - (token == "}")
            text += token
            if not depth:
                return text[1:-1]

    def _list(self, opening: str) -> list[Node]:
        self._take(opening)
        parts = [self.sum()]
        while self.next in (",", ";"):
            self._take()
            parts.append(self.sum())
        self._take(_FENCES[opening])
        return parts

    def _frac(self) -> Node:
        above = self._digit()
        return ("div", above, self._digit())

    def _binomial(self) -> Node:
        above = self._digit()
        return ("call", "binomial", above, self._digit())

    def _root(self) -> Node:
        degree: Node = ("num", Fraction(2))
        if self.next == "[":
            degree = self._group("[")
        if self.next == "(":
            return ("call", "root", self._group("("), degree)
        return ("call", "root", self._argument(), degree)

    def _function(self, name: str) -> Node:
        if name == "operatorname":
            name = self._letters()
            if name not in FUNCTIONS:
                return self._named(name)
        name = _ALIASES.get(name, name)
        base: list[Node] = []
        if self.next == "_" and name == "log":
            self._take()
            base = [self._argument()]
        exponent: Node | None = None
        if self.next in ("^", "**"):
            self._take()
            exponent = self._exponent_signed() if self.next in "+-" else self._argument()
            if exponent == ("neg", ("num", Fraction(1))) and name in TRIG:
                name, exponent = f"arc{name}", None
        listed = self.next in ("(", r"\{")
        arguments = self._list(self.next) if listed else [self._operand()]
        node: Node = ("call", name, *arguments, *base)
        return node if exponent is None else ("pow", node, exponent)

    def _operand(self) -> Node:
        if self.next in ("+", "-"):
            return ("neg", self._operand()) if self._take() == "-" else self._operand()
        return self._product(argument=True)

    def _big(self, kind: str) -> Node:
        """A sum or product over an index."""
        lower, upper = self._bounds()
        if lower is None or upper is None or lower[0] != "sym" or self._equated is None:
            raise Unreadable(f"the {kind} has no bounds")
        body = self._product() if self.next not in ("+", "-") else self._signed()
        return (kind, lower[1], self._equated, upper, body)

    def _bounds(self) -> tuple[Node | None, Node | None]:
        lower = upper = None
        self._equated: Node | None = None
        while self.next in ("_", "^"):
            if self._take() == "^":
                upper = self._argument()
            elif self.next == "{":
                self._take()
                lower = self.sum()
                if self.next == "=":
                    self._take()
                    self._equated = self.sum()
                self._take("}")
            else:
                lower = self._atom(bare=True)
        return lower, upper

    def _integral(self) -> Node:
        lower, upper = self._bounds()
        indices = [index for index, token in enumerate(self._tokens[1:], 1) if token == "d"]
        if lower is None or upper is None or not indices:
            raise Unreadable("the integral has no bounds")
        # What is integrated ends at the last d before something that is not a factor.
        variable = self._tokens[indices[0] - 1]
        self._tokens[indices[0] - 1 : indices[0] + 1] = ["}"]
        body = ("num", Fraction(1)) if self.next == "}" else self.sum()
        self._take("}")
        return ("int", variable, lower, upper, body)

    def _matrix(self) -> Node:
        kind = self._take()
        ending = kind.replace("begin", "end")
        if "cases" in kind:
            raise Unreadable(kind)
        if "array" in kind and self.next == "{":
            self._letters()
        rows: list[list[Node]] = [[]]
        while self.next != ending:
            if self.next == r"\\":
                self._take()
                rows.append([])
            elif self.next in ("&", r"\hline"):
                self._take()
            else:
                rows[-1].append(self.sum())
        self._take(ending)
        matrix = ("matrix", tuple(tuple(row) for row in rows if row))
        return ("call", "det", matrix) if "vmatrix" in kind else matrix


def _number(text: str) -> Node:
    if len(text) > _MAX_DIGITS:
        raise Unreadable("a number of thousands of digits")
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 4:
        return ("mul", ("num", Fraction(mantissa)), ("pow", _number("10"), _number(exponent)))
    return ("num", Fraction(text))


_READERS: dict[str, Callable[[_Reader], Node]] = {
    r"\frac": _Reader._frac,
    r"\binom": _Reader._binomial,
    r"\sqrt": _Reader._root,
    r"\sum": lambda reader: reader._big("sum"),
    r"\prod": lambda reader: reader._big("prod"),
    r"\int": _Reader._integral,
}


def walk(node: Node) -> list[Node]:
    """The node and all below it."""
    nodes, left = [], [node]
    while left:
        nodes.append(here := left.pop())
        for part in here[1:]:
            if isinstance(part, tuple):
                rows = part if here[0] == "matrix" else (part,)
                left.extend(
                    item for row in rows for item in (row if here[0] == "matrix" else (row,))
                )
    return nodes


def symbols(*nodes: Node) -> set[str]:
    """The names of the variables, bound ones left out."""
    parts = [part for node in nodes for part in walk(node)]
    bound = {part[1] for part in parts if part[0] in ("sum", "prod", "int")}
    names = {part[1] for part in parts if part[0] == "sym"}
    return names - bound - {"e", "i", r"\pi"}
