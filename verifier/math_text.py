r"""Mathematical answers as text: where they stand, what they are made of. No mathematics yet.

    completion ──extract──▶ answer ──normalise──▶ LaTeX of one spelling ──split──▶ parts

Extraction is linear in the completion; all else reads an answer, of `MAX_CHARS` at most. Nothing
here evaluates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from services.trajectory import Verdict
from verifier.config import AnswerFrom

NO_ANSWER = Verdict("incorrect", "no answer found")
MAX_CHARS = 2_000
"""A longer answer is none. DeepMath's longest has 150 characters."""

# ------------------------------------------------------------------------------- extraction

_BOX = re.compile(
    r"\\(?:boxed|fbox)(?:\s{0,9}(?:(?P<brace>\{)|(?P<bare>-?\d+(?:\.\d+)?|[a-zA-Z]))|(?![a-zA-Z]))"
)
_DELIMITERS = re.compile(r"\\[()\[\]]|[\s$]|\\q?quad|\\text|[{}]|\\[,;! ]")  # between two boxes
_NAMED = re.compile(r"[a-zA-Z](?:_\d)?=$")  # x = \boxed{3} or x = \boxed{4}
_MAX_BETWEEN = 100
_BLANK = re.compile(r"\s*\Z")
_JOINS = frozenset({",", ";", "and", "or", ",and", ",or"})
_ANNOUNCED = re.compile(r".*\banswer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)


def extract(completion: str, answer_from: AnswerFrom, *, thinking: bool = False) -> str | None:
    r"""The answer as it was written; None if there is none, empty if it was not finished.

    `boxed` is the last `\boxed{}`, `hashes` what follows the last `####` on its line, and
    `final_line` the last line with anything on it, from after the words "answer is". What stands
    before the last `</think>` or after an open `<think>` is no answer, unless `thinking` counts.
    """
    if not thinking:
        completion = after_thinking(completion)
    if answer_from == "boxed":
        return last_boxed(completion)
    if answer_from == "hashes":
        _, mark, rest = completion.rpartition("####")
        return rest.lstrip("#").split("\n", 1)[0].strip() if mark else None
    lines = completion.strip().splitlines()
    if not lines:
        return None
    line = lines[-1][-MAX_CHARS:]
    return last_boxed(line) or _ANNOUNCED.sub("", line, count=1).strip(" *:")


def after_thinking(completion: str) -> str:
    """What a reasoning model says after it has thought; nothing if it has not ended."""
    _, ended, said = completion.rpartition("</think>")
    said, began, _ = (said if ended else completion).partition("<think>")
    return said if not began else ""


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
    spans: list[tuple[int, int, int, int]] = []  # the box, and what it holds
    for opening in openings:
        if not opening["brace"]:  # \boxed 5
            if opening["bare"]:
                spans.append((*opening.span(), *opening.span("bare")))
            continue
        end = closing.get(opening.end() - 1)
        if end is None:
            spans.clear()  # whatever was boxed before, it is not the last answer
        elif _BLANK.match(text, opening.end(), end) is None:
            spans.append((opening.start(), end + 1, opening.end(), end))
    parts: list[str] = []
    next_start: int | None = None
    for start, end, content_start, content_end in reversed(spans):  # cut out only what is used
        if next_start is not None:
            if end > next_start or next_start - end > _MAX_BETWEEN:
                break
            raw = text[end:next_start]
            between = _NAMED.sub("", _DELIMITERS.sub("", raw))
            said_twice = "\n" in raw or text[content_start:content_end].strip() == parts[-1]
            if between not in _JOINS and (between or said_twice):
                break
        parts.append(text[content_start:content_end].strip())
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

_LATEX_OF_SIGNS = r"""
√\sqrt ∛\sqrt[3] ∜\sqrt[4]
∞\infty ≤\leq ≥\geq ≠\neq ×\times ⋅\cdot ·\cdot ∙\cdot ÷\div −- –- —- ∪\cup ∩\cap ∈\in
∉\notin ∅\emptyset ±\pm ∓\mp ≈\approx ≡\equiv ∠\angle △\triangle →\to ∖\setminus ⩽\leq ⩾\geq ′'
°^\circ ℝ\mathbb{R} ℤ\mathbb{Z} ℕ\mathbb{N}
"""
_SIGNS = {sign_and_latex[0]: sign_and_latex[1:] for sign_and_latex in _LATEX_OF_SIGNS.split()}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|sqrt|log|ln|exp|pi|theta|gcd"
_NAMES += "|asin|acos|atan"
_OTHER_NAMES = "tg|ctg|arctg|arcctg|cis"  # where they are marked as names
_UNIT = r"\\(?:text|mathrm)\{[^{}]*\}"
_LOOKS = (
    "displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|boldsymbol|bm|mathit|mathsf"
    "|mathnormal|ensuremath|underline|emph|[lL]arge|LARGE|small|normalsize|hfill|strut|noindent"
)


def _primes(match: re.Match[str]) -> str:
    return "'" * match[0].count("prime")


_SPELLINGS: Sequence[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\]]{0,20}\])?", r" \\newline "),  # between two rows; see below
        (r"\\[()\[\]]", " "),  # math mode on and off
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (rf"\\(?:{_LOOKS})(?![a-zA-Z])|\\mathbf\s*(?=\{{[^{{}}]*[\\\d(])", ""),
        (r"\\(?:hspace\*?|vspace|[hv]?phantom|tag\*?|label)\s*\{[^{}]*\}", " "),
        (r"\\mathcal\s*\{?\s*O\s*\}?", "O"),
        (r"\\var(?=epsilon|phi|theta|rho|sigma)", r"\\"),
        (r"\^\s*\{((?:\s*\\prime)+)\s*\}|\^?\s*\\prime(?![a-zA-Z])", _primes),
        (r"(?<![\\a-zA-Z}\]])\{\s*([a-zA-Z])\s*\}(?=\s*_)", r"\1"),
        (r"(?<=\d)\s*\^\s*\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}", ""),
        (r"(?<=\d)\s*\^?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}", ""),
        (r"\\text\s*\{\s*(\d+)\s*(?:st|nd|rd|th)\s*\}", r"\1"),  # 2nd may be a product
        (r"^([(\[][^()\[\]]*,[^()\[\]]*[)\]])\s*\^\s*\{?\s*(?:T|\\top)\s*\}?$", r"\1"),
        (r"(?<=\d)\s*\\text\s*\{\s*to\s*\}\s*(?=\d)", ":"),
        (r"(?:,|\{,\})\\!\s*(?=\d{3})", ""),  # MATH's thousands
        (r"\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\s", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:text)?color\s*\{[a-z]*\}", ""),
        (
            r"\\(?:textbf|textit|textrm|textsf|textnormal|mathrm|mathbf|mbox|operatorname\*?)\s*(?=\{)",
            r"\\text",
        ),
        (r"\\text\s*\{\s*([A-Za-z])\s*\}", r"\\mathrm{\1}"),
        (r"\\text\s*\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
        (r"\\mathrm\s*\{([eid])\}", r" \1"),
        (r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![a-zA-Z])|\\Re(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\text\{\s*[iI]nfinity\s*\}|^[iI]nfinity$", r"\\infty"),
        (r"\\le(?:qslant)?(?![a-zA-Z])|<=", r"\\leq"),
        (r"\\ge(?:qslant)?(?![a-zA-Z])|>=", r"\\geq"),
        (r"\\ne(?![a-zA-Z])|\\not\s*=|!=", r"\\neq"),
        (r"\\(?:doteq|simeq)(?![a-zA-Z])", r"\\approx"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:ldots|cdots|dotsc|dots)(?![a-zA-Z])|\.\.\.|…", r"\\dots"),
        (
            r"\\degree(?![a-zA-Z])|\^\s*(?:\{\s*(?:\\circ|o)\s*\}|(?:\\circ|o)(?![a-zA-Z]))",
            r"^\\circ ",
        ),
        (r"(?<=\d)\{([,:])\}(?=\d)", r"\1"),
        (rf"(?<![\\a-zA-Z])({_NAMES})(?![a-zA-Z])", r"\\\1 "),
        (rf"\\(?:text|mathrm)\s*\{{\s*\\?({_NAMES}|{_OTHER_NAMES})\s*\}}", r"\\\1 "),
        (r"\\root\s*\{?\s*(\w+)\s*\}?\s*\\of(?![a-zA-Z])", r"\\sqrt[\1]"),
        (r"^\\(?:therefore|implies|Rightarrow)(?![a-zA-Z])", ""),
        (r"\\(?:newline|cr)(?![a-zA-Z])", r"\\\\"),
        (r"((?:^|=|\\in|\\c[ua]p)\s*)\](?=[^\[\]]*+[,;\[])", r"\1("),  # ]0,1[ is (0,1)
        (r"([,;][^\[\],;]*+)\[(?=\s*(?:$|\\c[ua]p|\\setminus))", r"\1)"),
        (rf"\\frac\s*\{{\s*({_UNIT})\s*\}}\s*\{{\s*({_UNIT}[\^\d]*)\s*\}}", r"\1/\2"),
        (r"(?<=\d)\s*x\s*(?=10\^)", r"\\times "),
        (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<=\.)(\d{0,9}?)(\d{1,6}?)\2{2,}+\s*\\dots", r"\1\\overline{\2}"),
        (r"(\.\d++)\s*\\dots", r"\1"),
    )
]
_DECIMAL_COMMA = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+|0(?=,)|\d++(?!,\d{3}(?!\d))),(\d++)(?![\d,.])"
)
_LINES = re.compile(
    r"\\begin\{(aligned|align|gathered|gather|split|cases)\*?\}(.*?)\\end\{\1\*?\}", re.DOTALL
)
_AROUND = re.compile(
    r'^(?:[*`"“”]|__|\\\\|&\s*=?|\s)+|(?:[*`"“”]|__|\\\\|(?<![\\a-zA-Z])\{\s*\}|\s)+$'
)
_GROUPED = re.compile(
    r"(?<![\d.,])(?:\d{1,3}([ ,])\d{3}(?:\1\d{3})*(?:\.\d+)?|\d{1,2}(?:,\d\d)+,\d{3}"
    r"|\d{1,3}(?:\.\d{3}){2,})(?![\d,]| \d)"
)
_NESTED = re.compile(r"\[\s*((?:\[[^\[\]]*\][\s,]*){1,50})\]")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d{1,200})\}?|\((\d{1,200})\)(?![\w^(]))"
)


def normalise(answer: str) -> str:
    """The same answer with one spelling for what can be spelled in many ways."""
    text = _ascii(answer)
    if text.count("$") - text.count(r"\$") == 1:  # alone, it is money
        text = re.sub(r"(?<!\\)\$(?=\s*\d)", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _LINES.sub(_lines, text)
    text = _AROUND.sub("", re.sub(r"\\$", "", text.strip())).rstrip(".").strip()
    while text.startswith("{") and _closing_braces(text).get(0) == len(text) - 1:
        text = text[1:-1].strip()
    text = _NESTED.sub(_matrix, text)
    text = _REPEATING.sub(lambda match: _fraction(*match.groups()), text)
    return re.sub(r"\s+", " ", text)


def _lines(lines: re.Match[str]) -> str:
    """Equations one below the other as a list; cases that name their conditions stay."""
    if lines[1] == "cases" and "&" in lines[2]:
        return lines[0]
    listed = ", ".join(filter(str.strip, lines[2].replace("&", "").split(r"\\")))
    return re.sub(r",\s*(?==)", " ", listed)  # the next step of a calculation


def _matrix(nested: re.Match[str]) -> str:
    """[[1, 2], [3, 4]] as LaTeX has it."""
    rows = [row.replace(",", "&") for row in re.findall(r"\[([^\[\]]*)\]", nested[1])]
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"


def _ascii(text: str) -> str:
    """LaTeX for the signs of Unicode: ½ and １, superscripts, Greek letters, roots."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = "".join(_sign(sign) for sign in text)
    return re.sub(r"(\d+)\s?⁄(\d+)", r"\\frac{\1}{\2}", text)


def _sign(sign: str) -> str:
    if sign in _SIGNS:
        return f"{_SIGNS[sign]} "
    kind, _, name = unicodedata.name(sign, "").partition(" LETTER ")
    if kind.startswith("GREEK") and name.isalpha():
        name = {"LAMDA": "lambda"}.get(name, name.lower())
        return f"\\{name.title() if 'CAPITAL' in kind else name} "
    plain_sign = unicodedata.normalize("NFKC", sign)
    return f" {plain_sign}" if "⁄" in plain_sign else plain_sign  # 2½ is not 21/2


def readings(text: str, *, decimal_comma: bool) -> list[str]:
    """What a normalised text may be: 1,728 is a number, or a list of two, and so is 1,7."""
    if re.search(r"[(\[]|\\\{", text):  # in (1,200) the comma separates
        return [text]
    joined = _GROUPED.sub(_ungrouped, text)
    forms = [joined, text]
    if decimal_comma:
        forms.append(_DECIMAL_COMMA.sub(lambda m: m[1].replace(".", "") + "." + m[2], text))
    return list(dict.fromkeys(forms))


def _ungrouped(digits: re.Match[str]) -> str:
    points = digits[0].count(".") > 1
    return re.sub("[ ,.]" if points else "[ ,]", "", digits[0])


def plain(text: str) -> str:
    """A normalised text without spaces and needless braces: equal ones mean the same."""
    return re.sub(r"([_^])\{([a-zA-Z0-9])\}", r"\1\2", re.sub(r"\s", "", text))


def _fraction(whole: str, fixed: str, marked: str | None, bracketed: str | None) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} is (16 - 1) / 90."""
    if len(whole) + len(fixed) > 300:
        return ""
    repeated = marked or bracketed or ""
    denominator = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    value = Fraction(int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0"), denominator)
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


# -------------------------------------------------------------------------------- structure

_TOKEN = re.compile(r"\\(?:begin|end)\{[a-zA-Z]*\*?\}|\\[a-zA-Z]+|\\.|[a-zA-Z]+|.", re.DOTALL)
_OPENING, _CLOSING = frozenset({"(", "[", "{", r"\{"}), frozenset({")", "]", "}", r"\}"})
LIST = frozenset({",", ";", "and", "or"})
RELATIONS = frozenset(
    ["=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\in", r"\notin", r"\equiv"]
)


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
    tokens: list[tuple[str, int]] = []
    depth = 0
    for token in _TOKEN.findall(text):
        if token in _CLOSING or token.startswith(r"\end{"):
            depth -= 1
        tokens.append((token, depth))
        if token in _OPENING or token.startswith(r"\begin{"):
            depth += 1
    return tokens


def chain(text: str) -> tuple[list[str], list[str]]:
    """The parts of a chain of relations, and the relations between them."""
    parts: list[str] = [""]
    relations: list[str] = []
    for token, depth in _tokens(text):
        if depth == 0 and token in RELATIONS:
            relations.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts], relations
