"""Programs as text: where they stand in a completion, and whether what they say is right.

Linear in the text: the patterns that could try a run of blanks or digits in two ways are
possessive (`*+`). Nothing here runs or parses a program.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from verifier.math_text import after_thinking

_FENCE = re.compile(
    r"(?P<indent>[ \t]*+(?:>[ \t]?+)?+)[^`\n]*?(?P<fence>`{3,}|~{3,})"
    r"[ \t]*[{.]*(?P<tag>[\w+#-]*)[^`\n]*"
)
_PYTHON = frozenset({"py", "python", "python2", "python3", "py2", "py3", "ipython", "ipython3"})
_CODE = re.compile(
    r"^[^\S\n]*+(?:def|class|import|from|for|while|if|print|return|with|try|@|\w+\s*=)", re.M
)


_SAYS_ANYTHING = re.compile(r"^[^\S\n]*+[^#\s]", re.M)
_MARKED = re.compile(
    r"(?:<code>|\[(?:PYTHON|BEGIN)\])\n?([^\[<]*+(?:(?!</code>|\[/PYTHON\]|\[DONE\])[\[<][^\[<]*+)*+)"
    r"(?:</code>|\[/PYTHON\]|\[DONE\])"
)


def program(completion: str, *, thinking: bool = False) -> str:
    """The last fenced block of Python in `completion`; without one the last block without a tag
    that looks like a program, and without any fence an indented block, or all of it.

    What stands before `</think>` is no program, unless `thinking` counts.
    """
    said = completion if thinking else after_thinking(completion)
    said = said.replace("\ufeff", "")
    blocks = list(_blocks(said))
    if not blocks:
        marked = _MARKED.findall(said)
        return marked[-1] if marked else "" if "```" in said else _indented(said)
    tagged = [code for tag, code in blocks if tag in _PYTHON]
    tagged = [code for code in tagged if _SAYS_ANYTHING.search(code)] or tagged
    untagged = [code for tag, code in blocks if not tag]
    likely = tagged or [code for code in untagged if _CODE.search(code)] or untagged
    return likely[-1] if likely else ""


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each fenced block's tag and code. One that is still open ends where the next one begins,
    and is none if nothing follows: it was not finished."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line) if "```" in line or "~~~" in line else None
        if fence is None or (opened and not fence["tag"] and line.strip() != fence["fence"]):
            lines.append(line)
            continue
        if opened:
            yield opened["tag"].lower(), _without(opened["indent"], lines)
        ends = opened is not None and not fence["tag"]
        opened, lines = None if ends else fence, []
    last = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].strip()), -1)
    if opened and last >= 0 and opened["fence"] in lines[last]:  # code``` or ```<|im_end|>
        lines[last:] = [lines[last].partition(opened["fence"])[0]]
        yield opened["tag"].lower(), _without(opened["indent"], lines)


def _without(indent: str, lines: Sequence[str]) -> str:
    return "".join(line.removeprefix(indent) for line in lines)


def _indented(text: str) -> str:
    """The last block that is indented as Markdown's code is, below prose; else all of the text."""
    lines = text.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    if first[:1].isspace() or _CODE.match(first) or not re.search(r"[.:!]\s*$", first):
        return text
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(("    ", "\t")) or (not line.strip() and blocks[-1]):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    kept = [block for block in blocks if "".join(block).strip()]
    return textwrap.dedent("".join(kept[-1])) if kept else text


_DECIMAL = re.compile(r"[-+]?(?:\d++(?:\.(\d*+))?|\.(\d++))(?:[eE]([-+]?\d{1,4}))?")
_LEETCODE, _DECIMALS, _MANY_DECIMALS = 5, 6, 9
_NOISE = 1e-9  # relative
_ZERO = 1e-12


def same_output(printed: str, expected: str) -> bool:
    """Line by line, as LiveCodeBench does: equal text, or numbers that are equal one by one."""
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(
        a == b or _same_tokens(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _same_tokens(a: str, b: str) -> bool:
    ours, theirs = a.split(), b.split()
    return len(ours) == len(theirs) and all(
        x == y or _same_number(x, y) for x, y in zip(ours, theirs, strict=True)
    )


def _same_number(x: str, expected: str) -> bool:
    """Equal in value; or, where six decimals at least are expected and printed, as far as the
    fewer of them go, and where nine are, up to rounding."""
    ours, theirs = _DECIMAL.fullmatch(x), _DECIMAL.fullmatch(expected)
    if not ours or not theirs:
        return False
    a, b = Decimal(x), Decimal(expected)
    if a == b:
        return True
    decimals = [len(m[1] or m[2] or "") - int(m[3] or 0) for m in (ours, theirs)]
    if decimals[1] < _DECIMALS or not (a.is_finite() and b.is_finite()):
        return False
    off, fewer = abs(a - b), min(decimals)
    noise = decimals[1] >= _MANY_DECIMALS and off <= abs(b) * Decimal(_NOISE)
    return noise or (fewer >= _DECIMALS and off <= Decimal(1).scaleb(-fewer) * Decimal("0.51"))


def same_value(value: Any, expected: Any) -> bool:
    """Equal as JSON is, floats up to rounding: a tuple is a list, but True is not 1."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool) != isinstance(expected, bool):
        return False
    if isinstance(expected, float) and isinstance(value, int | float):
        decimals = len(repr(expected).partition(".")[2])  # LeetCode's expected values have five
        rounded = _LEETCODE <= decimals < _MANY_DECIMALS and "e" not in repr(expected)
        return (
            value == expected
            or math.isclose(value, expected, rel_tol=_NOISE, abs_tol=_ZERO)
            or (rounded and math.isfinite(value) and round(value, decimals) == expected)
        )
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        keyed = {str(key): item for key, item in value.items()}  # JSON has no other keys
        return keyed.keys() == expected.keys() and all(
            same_value(item, expected[key]) for key, item in keyed.items()
        )
    return bool(value == expected)
