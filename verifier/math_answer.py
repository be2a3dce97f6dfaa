r"""Is the answer mathematically equal to the reference?

    list, set ── as a whole, in any order ─┐
    tuple, interval ── in order ───────────┤
    word, choice, date, name ── as such ───┼─▶ leaf: value with a unit ─▶ formulas (`math_value`)
    equation, inequality ── both sides ────┤
    sets of numbers ── (`math_sets`) ──────┘

docs/equality.md has the decisions in a table. For judge processes only (`verifier.judge`): work is
counted, but memory and time are theirs to keep.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

from services.trajectory import Verdict
from verifier import math_text, math_words
from verifier.config import AnswerFrom
from verifier.math_parts import Undecided, labelled, matched, same_part, same_sets
from verifier.math_text import LIST, MAX_CHARS, plain

_TASKS = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim|limsup|liminf|gcd|lcm|max|min|det|sup|inf)(?![a-zA-Z])"
    r"|\\text\s*\{\s*(?:gcd|lcm|max|min)\s*\}\s*[({\\]|\\begin\{vmatrix\}"
)


def judge(
    completion: str,
    reference: str,
    answer_from: AnswerFrom = "boxed",
    *,
    require_evaluated: bool = True,
    answer_in_thinking: bool = False,
) -> Verdict:
    """Compares the completion's answer with `reference` (LaTeX or plain, boxed or not)."""
    answer = math_text.extract(completion, answer_from, thinking=answer_in_thinking)
    if not answer:
        return math_text.NO_ANSWER
    return compare(answer, reference, require_evaluated=require_evaluated)


@lru_cache(maxsize=4096)  # students repeat themselves: most of a group's answers are the same
def compare(written: str, reference: str, *, require_evaluated: bool = True) -> Verdict:
    """Compares an answer that was taken from its completion with `reference`.

    An answer that cannot be read is incorrect. A reference that cannot be read leaves every
    answer but its own text `unknown`. With `require_evaluated`, an integral, a sum or the like is
    incorrect where the reference has none: it is the task, handed back.
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
    except _BEYOND as error:
        return _at_fault(expected, type(error).__name__)
    if not same:
        return Verdict("incorrect", "differs from the reference")
    if require_evaluated and _hands_back(answer, expected):
        return Verdict("incorrect", "is not evaluated")
    return Verdict("correct", "equals the reference")


# What odd formulas bring about by arithmetic or depth. Not MemoryError: that ends the judge.
_BEYOND = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _at_fault(expected: str, error: str) -> Verdict:
    """Whose fault it is that two texts cannot be compared: the reference's if it cannot be compared
    with anything."""
    try:
        _same_answer("0", expected)
    except (Undecided, *_BEYOND):
        return Verdict("unknown", f"the comparison failed: {error}")
    return Verdict("incorrect", f"the answer cannot be compared: {error}")


def _hands_back(answer: str, gold: str) -> bool:
    ends = [math_text.chain(part)[0][-1] for part in math_text.split(answer, LIST)]
    return any(set(_TASKS.findall(end)) - set(_TASKS.findall(gold)) for end in ends)


def _reference(reference: str) -> str:
    reference = reference[: 4 * MAX_CHARS]
    return (
        math_text.extract(reference, "boxed", thinking=True)
        or math_text.extract(reference, "hashes", thinking=True)
        or reference
    )


def _same_answer(answer: str, gold: str) -> bool:
    if plain(answer) == plain(gold):
        return True
    letters = [_choices(text) or _run(text) for text in (answer, gold)]
    if letters[0] and letters[0] == letters[1] and (_choices(answer) or _choices(gold)):
        return True
    if _choices(gold) is not None:
        said = re.sub(r"^\(?[A-J]\)\s*", "", re.sub(r"\\text\{(.*?)\}", r"\1", gold))
        return len(plain(gold)) > 3 and said not in (gold, "") and _same_answer(answer, said)
    undecided: Undecided | None = None
    as_answer = math_text.readings(_opened(answer), decimal_comma=True)
    # A list of two for a reference is no decimal, unless the answer is one with the same digits.
    as_gold = math_text.readings(_opened(gold), decimal_comma=bool(_DECIMAL.search(answer)))
    for a, b in product(as_answer, as_gold):
        try:
            if _same_list(a, b):
                return True
        except Undecided as reason:
            undecided = reason
    if undecided:
        raise undecided
    return False


def _opened(text: str) -> str:
    """Without an introduction, and without the \\text around all of it."""
    inside = math_words.unwrapped(math_words.without_introduction(text))
    return math_text.normalise(math_words.without_introduction(inside))


def _choices(text: str) -> frozenset[str] | None:
    """The letters of one or more choices that all of a text is."""
    if letter := math_words.choice(text):
        return frozenset(letter)
    bare = re.sub(r"\\(?:text|mathrm)|[{}]", "", text)
    parts = math_text.split(bare, frozenset({",", ";", "and"}))
    letters = [math_words.choice(part) for part in parts]
    return frozenset(filter(None, letters)) if len(parts) > 1 and all(letters) else None


def _run(text: str) -> frozenset[str] | None:
    """The letters of BD or (B)(D), in the order of the alphabet; a product may look so."""
    bare = re.sub(r"\\(?:text|mathrm)|[{}()\s]", "", text)
    ordered = re.fullmatch("[A-J]{2,}", bare) and "".join(sorted(set(bare))) == bare
    return frozenset(bare) if ordered else None


def _same_list(answer: str, gold: str) -> bool:
    if (same := same_sets(answer, gold)) is not None:
        return same
    domains = {m[2] for text in (answer, gold) if (m := _WHOLE.search(plain(text)))}
    if len(domains) > 1:
        return False
    golds, answers = _members(gold), _members(_renamed(answer, gold))
    if len(golds) == len(answers) == 1:
        return same_part(answers[0], golds[0])
    if _pointwise(answers, golds) or _pointwise(golds, answers):
        return True
    if len(golds) > 1 and _joined_by(answer, "or") != _joined_by(gold, "or"):
        relations = [math_text.chain(part)[1] for part in (*answers, *golds)]
        if any(relation not in ([], ["="], [r"\approx"], [r"\equiv"]) for relation in relations):
            return False  # x < 1 and x > 3 is not x < 1 or x > 3
        if all(len(part) == 1 and part.isalpha() for part in golds):
            return False  # p and q is not p or q
    return matched(answers, golds, same_part)


def _joined_by(text: str, word: str) -> bool:
    return len(math_text.split(text, frozenset({word}))) > 1


def _pointwise(points: Sequence[str], golds: Sequence[str]) -> bool:
    """Whether the one of `points` is (1, 2), and `golds` are x = 1, y = 2."""
    matched = math_text.group(labelled(points[0])[1]) if len(points) == 1 else None
    named = [labelled(gold) for gold in golds]
    names = [plain(label) for label, _ in named if label]
    if not matched or matched.opening != "(" or len(set(names)) < len(golds) < 2:
        return False
    if names != sorted(names) or len(names) < len(golds) or len(matched.parts) != len(golds):
        return False
    return all(same_part(a, value) for a, (_, value) in zip(matched.parts, named, strict=True))


def _renamed(answer: str, gold: str) -> str:
    r"""The answer with the reference's name for what runs through the whole numbers in both, as n
    does in `n\\pi, n\\in\\mathbb{Z}`: it has no name of its own."""
    ours, theirs = (_WHOLE.search(plain(text)) for text in (answer, gold))
    if not ours or not theirs or re.search(rf"(?<![a-zA-Z\\]){theirs[1]}(?![a-zA-Z])", answer):
        return answer
    return re.sub(rf"(?<![a-zA-Z\\]){ours[1]}(?![a-zA-Z])", theirs[1], answer)


def _members(text: str) -> list[str]:
    r"""The members of a list or a set; \pm stands for two of them."""
    matched = math_text.group(text)
    if matched and matched.opening == r"\{" and matched.parts not in ((), (r"\emptyset",)):
        parts: Sequence[str] = matched.parts
    else:
        text = re.sub(r"^([^=,]*)(?:=|\\in)\s*\\\{(.*)\\\}$", r"\2", text)
        parts = math_text.split(text, LIST) or [text]
    parts = [part for part in parts if not _DOMAIN.fullmatch(plain(part))] or parts
    parts = [_BUILDER.sub("", part) for part in parts]
    label = labelled(parts[0])[0] if len(parts) > 1 else None
    if label and not any(math_text.chain(part)[1] for part in parts[1:]):
        parts = [labelled(parts[0])[1], *parts[1:]]  # n = 1, 2, 3
    return [member for part in parts for member in _signs(part)]


_DECIMAL = re.compile(r"\d\.\d")
_DOMAIN = re.compile(
    r"(?:\\text\{(?:where|for|with)\})?\\?[a-zA-Z](?:_\w)?\\in\\mathbb\{?[A-Z]\}?(?:\^[*+])?"
)
_BUILDER = re.compile(r"(?:\\mid|\||:)\s*[a-zA-Z]\s*\\in\s*\\mathbb\{[A-Z]\}$")
_WHOLE = re.compile(
    r"(?:(?<![a-zA-Z\\])|(?<=\\mid))([a-zA-Z])\\in\\mathbb\{?([NZ]\}?(?:[\^_]\{?\S)?)(?![a-zA-Z])"
)
_SIGNED = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")


def _signs(part: str) -> list[str]:
    """Both values of each sign of two; those of \\pm and \\mp hang together."""
    signs = _SIGNED.findall(part)
    if not signs:
        return [part]
    if len(signs) > 3 or {r"\mp", r"\pm"} <= set(signs):
        ways = [["+" if (sign == r"\pm") == up else "-" for sign in signs] for up in (True, False)]
    else:
        ways = [list(way) for way in product("+-", repeat=len(signs))]
    between = _SIGNED.split(part)
    return [
        between[0] + "".join(s + text for s, text in zip(way, between[1:], strict=True))
        for way in ways
    ]
