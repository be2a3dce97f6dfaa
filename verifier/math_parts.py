"""One member of an answer against one of the reference: words, groups, relations, measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

from verifier import math_text, math_words
from verifier.math_compare import DECIMAL, factor, numerator, renamed_constant, rounds, same_value
from verifier.math_formula import Node, Unreadable, parse, symbols
from verifier.math_sets import read_set, same_set
from verifier.math_text import Group, plain
from verifier.math_value import constant
from verifier.math_words import Measure


class Undecided(ValueError):
    """The reference cannot be read, or the comparison is beyond us. The message says which."""


def matched(answers: Sequence[str], golds: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    """Whether each of `golds` has an answer of its own, whatever the order, and none is left."""
    if len(answers) != len(golds):
        return False
    left = list(answers)
    undecided: Undecided | None = None
    for gold in golds:
        for index, answer in enumerate(left):
            try:
                if same(answer, gold):
                    del left[index]
                    break
            except Undecided as reason:
                undecided = reason
        else:
            if undecided is None:
                return False
    if undecided is not None and left:
        raise undecided
    return True


def same_sets(answer: str, gold: str) -> bool | None:
    """Whether two sets of numbers are one; None unless one of them is described by a rule."""
    if not describes(answer, gold):
        return None
    ours, theirs = read_set(answer), read_set(gold)
    return same_set(ours, theirs) if ours and theirs else None


def describes(*texts: str) -> bool:
    """Whether one of them says by a rule which numbers are in a set."""
    return any(
        re.search(
            r"[<>]|\\(?:leq|geq|neq|in|notin|cup|cap|setminus|mathbb|emptyset)(?![a-zA-Z])|real|\\\{[^,]*(?:\\mid|[|:])",
            t,
        )
        for t in texts
    )


# ------------------------------------------------------------------------------------ parts

_QUALIFIED = re.compile(
    r"(.+?)[\s,]*(?:\\text\s*\{[\s,(]*(?:for (?:all|any|every|each|some|integers?)|where|with)\b.*"
    r"|\\(?:forall|quad)(?![a-zA-Z]).*|\bfor (?:all|any|every|each|some|integers?)\b.*)",
    re.DOTALL,
)
_MODULO = re.compile(
    r"(?P<rest>.+?)\s*\(?\s*(?:\\pmod|\\bmod|\\mod|\\text\s*\{\s*\(?\s*mod\s*\}|\bmod\b)\s*\{?\s*(?P<m>[^{}()]+?)\s*\}?\s*\)?",
    re.DOTALL,
)


def same_part(answer: str, gold: str) -> bool:
    """One member of a list against another: anything but a list."""
    if plain(answer) == plain(gold):
        return True
    answer, gold = (math_words.in_digits(text) or text for text in (answer, gold))
    literals = math_words.literal(answer), math_words.literal(gold)
    if literals[1] or (literals[0] and literals[0][0] in ("date", "time")):
        return _same_literal(*literals, answer, gold)
    if (same := _same_word(answer, gold)) is not None:
        return same
    answer, gold = (match[1] if (match := _QUALIFIED.fullmatch(t)) else t for t in (answer, gold))
    moduli = _MODULO.fullmatch(answer), _MODULO.fullmatch(gold)
    if any(moduli):
        return _same_residue(moduli, answer, gold)
    if r"\begin{cases}" in gold:
        return matched(_cases(answer), _cases(gold), _same_case)
    relations = math_text.chain(answer)[1], math_text.chain(gold)[1]
    if any(relations):
        stated = [*product(_stated(answer), _stated(gold))]
        return _same_related(answer, gold) or (
            len(stated) > 1 and any(same_part(*pair) for pair in stated)
        )
    answer_group, gold_group = math_text.group(answer), math_text.group(gold)
    if gold_group and answer_group and max(len(gold_group.parts), len(answer_group.parts)) > 1:
        return _same_group(answer_group, gold_group)
    for several, one, other in ((gold_group, answer, gold), (answer_group, gold, answer)):
        if several and len(several.parts) > 1 and r"\cup" not in one:
            return _same_vector(one, several) or (
                bool(named := re.fullmatch(r"[A-Z]'?(\(.*\))", one)) and same_part(named[1], other)  # type: ignore[index]
            )
    ratios = math_text.split(answer, frozenset(":")), math_text.split(gold, frozenset(":"))
    if len(ratios[0]) > 1 or len(ratios[1]) > 1:
        return _same_ratio(*ratios)
    return _same_measure(_measure(answer, gold), _measure(gold, answer), answer, gold)


def _same_literal(
    a: math_words.Literal | None, b: math_words.Literal | None, answer: str, gold: str
) -> bool:
    """Dates, times and names; half past three is either, without a.m. or p.m."""
    if a and b:
        return a == b
    time, text = (a or b), (gold if a else answer)
    clock = re.fullmatch(r"(\d+):(\d\d)", plain(text))
    if not time or time[0] != "time" or not clock:
        return False
    hours = {int(clock[1])} | (
        {int(clock[1]) % 12, int(clock[1]) % 12 + 12} if 0 < int(clock[1]) < 13 else set()
    )
    return time[1] in hours and time[2] == int(clock[2])


def _same_word(answer: str, gold: str) -> bool | None:
    """Whether two words are one; None if the reference is none, or a product may be meant."""
    said, expected = math_words.word(answer), math_words.word(gold)
    if expected is None:
        return False if said and said.certain and said.spelling in ("yes", "no") else None
    if said is None:
        return False if expected.certain and not _phrase(gold, answer) else None
    if (
        expected.certain
        or said.certain
        or (math_words.letters(answer) and math_words.letters(gold))
    ):
        return said.spelling.lower() == expected.spelling.lower()
    return None


def _phrase(*texts: str) -> bool:
    """Whether words stand for a set, such as all real numbers."""
    return all(read_set(text) is not None for text in texts)


def _same_residue(
    moduli: tuple[re.Match[str] | None, re.Match[str] | None], answer: str, gold: str
) -> bool:
    a, b = moduli
    rests = [labelled(m["rest"] if m else t)[1] for m, t in ((a, answer), (b, gold))]
    if same_part(*rests) and (not (a and b) or same_part(a["m"], b["m"])):
        return True
    numbers = [_constant(text) for text in (*rests, a["m"] if a else "", b["m"] if b else "")]
    x, y, m, n = numbers
    whole = all(isinstance(number, Fraction) for number in numbers)
    return bool(whole and m == n and m and (x - y) % m == 0)


def _cases(text: str) -> list[str]:
    match = re.search(r"\\begin\{cases\}(.*)\\end\{cases\}", text, re.DOTALL)
    return [row for row in re.split(r"\\\\", match[1]) if row.strip()] if match else []


def _same_case(answer: str, gold: str) -> bool:
    a, b = ([*text.split("&", 1), ""] for text in (answer, gold))
    if not same_part(a[0].strip(" ,"), b[0].strip(" ,")):
        return False
    conditions = [
        re.sub(r"\\text\s*\{\s*(?:if|for|when|where)?\s*\}|^\s*(?:if|for|when)\b", "", c[1]).strip(
            " ,"
        )
        for c in (a, b)
    ]
    return plain(conditions[0]) == plain(conditions[1]) or same_part(*conditions)


def _same_group(answer: Group, gold: Group) -> bool:
    """A tuple or an interval: the same brackets, the same parts in the same order."""
    if (answer.opening, answer.closing) != (gold.opening, gold.closing):
        return False
    if gold.opening == r"\{":
        return matched(answer.parts, gold.parts, same_part)
    if len(answer.parts) != len(gold.parts):
        return False
    return all(map(same_part, answer.parts, gold.parts))


def _same_vector(text: str, group: Group) -> bool:
    """Whether a matrix of one row or column has the coordinates of a point."""
    try:
        matrix = parse(text)
    except Unreadable:
        return False
    if (
        matrix[0] != "matrix"
        or min(len(matrix[1]), len(matrix[1][0])) != 1
        or group.opening == r"\{"
    ):
        return False
    try:
        coordinates = ("matrix", (tuple(parse(part) for part in group.parts),))
    except Unreadable:
        return False
    return _same_nodes(("matrix", (tuple(item for row in matrix[1] for item in row),)), coordinates)


def _same_ratio(answer: Sequence[str], gold: Sequence[str]) -> bool:
    """3:4 is 6:8 and 3/4; a time of day has no multiples."""
    if len(gold) == len(answer) and not _clock(gold):
        try:
            return all(
                _same_nodes(("mul", parse(a), parse(h)), ("mul", parse(b), parse(g)))
                for (a, b), (g, h) in zip(pairwise(answer), pairwise(gold), strict=True)
            )
        except Unreadable:
            return False
    if len(gold) == len(answer):
        return all(map(same_part, answer, gold))
    short, pair = (answer, gold) if len(answer) == 1 else (gold, answer)
    return (
        len(short) == 1 and len(pair) == 2 and _same_formula(short[0], f"({pair[0]})/({pair[1]})")
    )


def _clock(parts: Sequence[str]) -> bool:
    return any(re.fullmatch(r"0\d|\d0", part.strip()) for part in parts)


# --------------------------------------------------------------------------------- relations

_ATOM = (
    r"(?:\\?[a-zA-Z]+'*(?:\s*\{[^{}=]*\})?(?:\s*[_^]\s*(?:\w|\{[^{}=]*\}))*'*\s*(?:\([^()]*\)|\[[^\[\]]*\])?"
    r"|\([^()=]*\)(?:\s*\([^()]*\))?|\|[^|=]*\||\\\|[^|=]*\\\||\\text\s*\{[^{}]*\})"
)
_LABEL = re.compile(
    rf"\s*(?:(?:m\s*)?\\(?:angle|triangle)\s*{_ATOM}|\\frac\s*\{{\s*{_ATOM}\s*\}}\s*\{{\s*{_ATOM}\s*\}}(?:{_ATOM})?"
    rf"|\\(?:sin|cos|tan|cot|log|ln)(?:_(?:\w|\{{\w+\}}))?\s*{_ATOM}"
    rf"|{_ATOM}(?:\s*[:/]\s*{_ATOM})*|\\(?:lim|sum|int|prod|max|min)(?![a-zA-Z]).*)\s*"
)
_SUM_OF_NAMES = re.compile(r"[a-zA-Z_'+\-*\s{}]+(?:\^\{?\d\}?[a-zA-Z_'+\-*\s{}]*)*")


def labelled(text: str) -> tuple[str | None, str]:
    """The name and the value of an equation that names a value, or of a membership."""
    parts, relations = math_text.chain(text)
    if not relations or not set(relations) <= {"=", r"\approx", r"\in", r"\equiv"}:
        return None, text
    if not parts[0]:
        parts = parts[1:] or [""]
        return None, parts[-1]
    if _LABEL.fullmatch(parts[0]) and _agree(parts[1:]):
        return parts[0], parts[-1]
    if len(parts) == 2 and _LABEL.fullmatch(parts[1]) and relations == ["="]:
        return parts[1], parts[0]
    return None, text


def _agree(parts: Sequence[str]) -> bool:
    """Whether a chain of values is one value."""
    return all(_LABEL.fullmatch(p) or _same_formula(p, parts[-1]) for p in parts[:-1])


def _same_related(answer: str, gold: str) -> bool:
    """Equations, inequalities and labelled values."""
    (name, value), (gold_name, gold_value) = labelled(answer), labelled(gold)
    (parts, relations), (gold_parts, gold_relations) = map(math_text.chain, (answer, gold))
    if name and gold_name and (plain(name) == plain(gold_name) or not gold_relations):
        return same_part(value, gold_value)
    if name is None and gold_name is None and value != answer:  # "= 5", "\approx 5"
        return same_part(value, gold_value)
    if gold_name and not relations:
        return _plain_label(gold_name) and same_part(answer, gold_value)
    if name and not gold_relations:
        return same_part(value, gold)
    if not gold_relations:
        return _states(parts, relations, gold)
    same = same_sets(answer, gold)
    if same is not None or not relations:
        return bool(same)
    return _same_chain(parts, relations, gold_parts, gold_relations)


def _stated(text: str) -> list[str]:
    r"""Both values of `\frac13 \approx 0.33`, if the second is the first one, rounded."""
    parts, relations = math_text.chain(text)
    match = DECIMAL.fullmatch(plain(parts[-1])) if relations[-1:] == [r"\approx"] else None
    value = _constant(parts[-2]) if match else None
    if not match or value is None or not rounds(match, value, digits=2):
        return [text]
    return [text[: text.rindex(r"\approx")].strip(), parts[-1]]


def _plain_label(name: str) -> bool:
    return not re.search(r"\\(?:sum|lim|int|prod|max|min)(?![a-zA-Z])", name)


def _states(parts: Sequence[str], relations: Sequence[str], gold: str) -> bool:
    """2^{10} = 1024 states a value, so does a + b = 17; 3 = 5 is wrong, 2x = 10 another task."""
    if set(relations) - {"=", r"\approx"} or not same_part(parts[-1], gold):
        return False
    if _SUM_OF_NAMES.fullmatch(parts[0]) and not any(map(str.isdigit, parts[0][:1])):
        return len(parts) == 2 or _agree(parts[1:])
    return all(_constant(part) is not None for part in parts) and _agree(parts)


_MIRRORED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


def _same_chain(
    parts: Sequence[str], relations: Sequence[str], gold_parts: Sequence[str], golds: Sequence[str]
) -> bool:
    """Each relation of one chain is one of the other: the same up to a factor, sides and order."""
    links = [(a, r, b) for (a, b), r in zip(pairwise(parts), relations, strict=True)]
    gold_links = [(a, r, b) for (a, b), r in zip(pairwise(gold_parts), golds, strict=True)]
    if len(links) != len(gold_links):
        return False
    left = list(gold_links)
    for link in links:
        same = next((other for other in left if _same_link(link, other)), None)
        if same is None:
            return False
        left.remove(same)
    return True


def _same_link(a: tuple[str, str, str], b: tuple[str, str, str]) -> bool:
    if a[1] in (r"\in", r"\notin", r"\equiv") or b[1] in (r"\in", r"\notin", r"\equiv"):
        return a[1] == b[1] and same_part(a[0], b[0]) and same_part(a[2], b[2])
    try:
        ours, theirs = (("add", parse(x), ("neg", parse(y))) for x, _, y in (a, b))
    except Unreadable:
        return a[1] == b[1] and same_part(a[0], b[0]) and same_part(a[2], b[2])
    if symbols(ours) != symbols(theirs):
        return False
    sign = factor(ours, theirs) or factor(numerator(ours), numerator(theirs))
    if not sign:
        return False
    return a[1] == b[1] if sign > 0 or a[1] not in _MIRRORED else _MIRRORED[a[1]] == b[1]


# ------------------------------------------------------------------------------------ leaves


def _measure(text: str, other: str) -> Measure | None:
    """The measure that a text is. A letter alone is a unit only beside another unit."""
    measure = math_words.measure(text)
    bare = re.fullmatch(r"([-\d./ ]*\d)\s?([a-zA-Z])(\^\{?\d\}?)?", text)
    if measure or not bare or not math_words.measure(other):
        return measure
    return math_words.measure(rf"{bare[1]}\text{{{bare[2]}}}{bare[3] or ''}")


def _same_measure(a: Measure | None, b: Measure | None, answer: str, gold: str) -> bool:
    """A unit that only one names is taken for granted; two that differ must convert."""
    ours, theirs = a or Measure(answer, (), Fraction(1)), b or Measure(gold, (), Fraction(1))
    if bool(ours.dimensions) != bool(theirs.dimensions):
        scale = [
            m.factor if not m.dimensions or _scaled(m) else Fraction(1) for m in (ours, theirs)
        ]
        if _same_scaled(ours.value, theirs.value, scale):
            return True
        units = {name for m in (ours, theirs) for name, _ in m.dimensions}
        if units == {"%"}:
            return _same_scaled(ours.value, theirs.value, [_hundredth(m) for m in (ours, theirs)])
        if units == {"degree"}:
            values = [f"({m.value})\\pi/180" if m.dimensions else m.value for m in (ours, theirs)]
            return _same_formula(*values)
        return False
    kinds = [{name for name, _ in m.dimensions} for m in (ours, theirs)]
    if kinds in ([{"degree"}, {"radian"}], [{"radian"}, {"degree"}]):
        values = [
            f"({m.value})\\pi/180" if kind == {"degree"} else m.value
            for m, kind in zip((ours, theirs), kinds, strict=True)
        ]
        return _same_formula(*values)
    if ours.dimensions != theirs.dimensions:
        return False
    return _same_scaled(ours.value, theirs.value, [ours.factor, theirs.factor])


def _scaled(measure: Measure) -> bool:
    """Whether its factor is that of a number, such as a million, and not of a unit."""
    return (
        len(measure.dimensions) == 1
        and measure.dimensions[0][0] in ("money", "%")
        and measure.factor > 1
    )


def _hundredth(measure: Measure) -> Fraction:
    return measure.factor / 100 if measure.dimensions else measure.factor


def _same_scaled(a: str, b: str, factors: Sequence[Fraction]) -> bool:
    if factors[0] == factors[1]:
        return _same_formula(a, b)
    try:
        ours, theirs = (("mul", parse(t), ("num", f)) for t, f in zip((a, b), factors, strict=True))
    except Unreadable:
        return False
    return _same_nodes(ours, theirs)


def _constant(text: str) -> Any:
    try:
        return constant(parse(text))
    except Unreadable:
        return None


def _same_formula(answer: str, gold: str) -> bool:
    if plain(answer) == plain(gold):
        return True
    decimals = DECIMAL.fullmatch(plain(answer)), DECIMAL.fullmatch(plain(gold))
    try:
        theirs = parse(gold)
    except Unreadable:
        if _names_only(answer, gold):
            return False
        raise Undecided("the reference cannot be parsed") from None
    try:
        ours = parse(answer)
    except Unreadable:
        return False
    if any(decimals) and (x := constant(ours)) is not None and (y := constant(theirs)) is not None:
        if x == y:
            return True
        pairs = zip(decimals, (y, x), strict=True)
        if any(rounds(match, number) for match, number in pairs if match):
            return True
    return _same_nodes(ours, theirs)


def _names_only(answer: str, gold: str) -> bool:
    """Whether both are texts that say something, and not the same."""
    if r"\text" in gold and math_words.word(answer) is not None:
        return True
    return all(re.fullmatch(r"(?=.*[a-zA-Z]{3})[\w\s.,'-]+|[\d.]+", t) for t in (answer, gold))


def _same_nodes(ours: Node, theirs: Node) -> bool:
    ours = renamed_constant(ours, theirs)
    equal = same_value(ours, theirs)
    if equal is None:
        if ours == theirs:
            return True
        raise Undecided("the comparison is beyond what is computed here")
    return equal
