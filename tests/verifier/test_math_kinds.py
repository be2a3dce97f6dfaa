"""Right and wrong answers of every kind, from `math_kinds.txt`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from verifier.math_answer import judge

Case = tuple[str, str, str]  # completion, reference, outcome


def read_kinds() -> dict[str, list[Case]]:
    r"""Each kind's cases. A line is `R answer ~ reference` (right) or `W …` (wrong); `r` and `w`
    have a whole completion instead of what stands in its box, with `⏎` for a new line."""
    kinds: dict[str, list[Case]] = defaultdict(list)
    kind = ""
    text = Path(__file__).with_name("math_kinds.txt").read_text(encoding="utf-8")
    for line in filter(None, text.splitlines()):
        if line.startswith("# "):
            kind = line[2:]
            continue
        answer, reference = line[2:].split(" ~ ", 1)
        completion = answer.replace("⏎", "\n") if line[0].islower() else rf"So \boxed{{{answer}}}."
        kinds[kind].append((completion, reference, "correct" if line[0] in "Rr" else "incorrect"))
    return kinds


KINDS = read_kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_kind(kind: str) -> None:
    wrong = [case for case in KINDS[kind] if judge(case[0], case[1]).outcome != case[2]]
    assert not wrong
    assert {outcome for _, _, outcome in KINDS[kind]} == {"correct", "incorrect"}  # both ways
