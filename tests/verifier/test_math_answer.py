"""Mathematical answers: a table of right and wrong ones, and the real rows of DeepMath."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from services.trajectory import Verdict
from tests.verifier.math_pairs import RIGHT, WRONG, Pairs
from verifier.config import AnswerFrom
from verifier.math_answer import judge
from verifier.math_text import extract, last_boxed


def flat(pairs: Pairs) -> list[tuple[str, str]]:
    return [pair for kind in pairs.values() for pair in kind]


def test_the_table_is_long_enough() -> None:
    assert len(flat(RIGHT)) + len(flat(WRONG)) >= 150
    assert not set(flat(RIGHT)) & set(flat(WRONG))


@pytest.mark.parametrize(("answer", "reference"), flat(RIGHT))
def test_equal_answers_are_correct(answer: str, reference: str) -> None:
    assert judge(rf"So it is \boxed{{{answer}}}.", reference).outcome == "correct"


@pytest.mark.parametrize(("answer", "reference"), flat(WRONG))
def test_other_answers_are_incorrect(answer: str, reference: str) -> None:
    assert judge(rf"So it is \boxed{{{answer}}}.", reference).outcome == "incorrect"


@pytest.mark.parametrize(
    ("completion", "answer_from", "answer"),
    [
        ("6 * 7 = 42\n#### 42", "hashes", "42"),
        ("#### 41\nno:\n#### 42 \nthat is all", "hashes", "42"),
        (r"\boxed{42}", "hashes", None),
        ("so\n\n 42 \n\n", "final_line", "42"),
        ("6 * 7:\n**The final answer is: $42$.**", "final_line", "$42$."),
        ("Answer: 42", "final_line", "42"),
        (r"So \(\boxed{42}\).", "final_line", "42"),
        ("42\nI am sure", "final_line", "I am sure"),
        ("", "final_line", None),
        ("the answer is 42", "boxed", None),
    ],
)
def test_where_the_answer_stands_is_configured(
    completion: str, answer_from: AnswerFrom, answer: str | None
) -> None:
    assert extract(completion, answer_from) == answer
    expected = "correct" if answer and "42" in answer else "incorrect"
    assert judge(completion, "#### 42", answer_from).outcome == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"5, which I put \boxed{5} within \boxed{}.", "5"),
        (r"$\boxed{1331}$ and $\boxed{1728}$", "1331, 1728"),
        (r"\(\boxed{a}\), \(\boxed{b}\), and \(\boxed{c}\)", "a, b, c"),
        (r"$$\boxed{5}$$ $$\boxed{5}$$", "5"),
        (r"\boxed{4} or rather \boxed{\frac{1}{2}", ""),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_the_last_box_holds_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_every_part_of_an_answer_in_several_boxes_counts() -> None:
    completion = r"The cubes are $\boxed{1331}$ and $\boxed{1728}$."
    assert judge(completion, "1331, 1728").outcome == "correct"
    assert judge(completion, "1728").outcome == "incorrect"


@pytest.mark.parametrize("text", ["", "   ", r"\boxed{}", r"\boxed{\frac{1}{2}", "I give up."])
def test_no_answer_is_incorrect(text: str) -> None:
    assert judge(text, "42") == Verdict("incorrect", "no answer found")


async def test_no_comparison_needs_a_signal() -> None:
    """SIGALRM, by which the library ends long ones, cannot be had in a thread."""
    for answer, outcome in (("x^2+2x+1", "correct"), (r"\sin^2 x + 2x", "incorrect")):
        verdict = await asyncio.to_thread(judge, rf"\boxed{{{answer}}}", "(x+1)^2")
        assert verdict.outcome == outcome


@pytest.mark.parametrize("brackets", ["{", "}", "(", "\\boxed{", "\\left(", "\\{"])
def test_brackets_without_end_take_no_time(brackets: str) -> None:
    started = time.monotonic()
    assert judge(brackets * 20_000, "42").outcome == "incorrect"
    assert judge(r"\boxed{" + brackets * 20_000 + "}", "42").outcome == "incorrect"
    assert time.monotonic() - started < 1.0


def test_an_unparsable_reference_leaves_other_answers_unknown() -> None:
    verdict = judge(r"\boxed{5}", r"2^{\aleph_0}")
    assert verdict == Verdict("unknown", "the reference cannot be parsed")


def references(deepmath: Path) -> list[str]:
    rows = pq.read_table(deepmath, columns=["reward_model"]).to_pylist()
    return [row["reward_model"]["ground_truth"] for row in rows]


def test_each_reference_of_deepmath_is_its_own_answer(deepmath: Path) -> None:
    golds = references(deepmath)
    assert len(golds) == 1_000
    verdicts = {gold: judge(rf"\boxed{{{gold}}}", gold) for gold in golds}
    assert {gold for gold, verdict in verdicts.items() if verdict.outcome != "correct"} == set()


@pytest.mark.slow
def test_no_reference_of_deepmath_is_another_ones_answer(deepmath: Path) -> None:
    golds = references(deepmath)
    different = {(a, b) for a, b in pairwise([*golds, golds[0]]) if a != b}
    verdicts = {pair: judge(rf"\boxed{{{pair[1]}}}", pair[0]) for pair in different}
    right = {frozenset(pair) for pair, verdict in verdicts.items() if verdict.outcome == "correct"}
    # Neither is a false positive: they say the same in other words.
    assert right <= {frozenset(("Yes", "True")), frozenset(("1", "x = 1"))}
    unknown = {gold: v.reason for (gold, _), v in verdicts.items() if v.outcome == "unknown"}
    assert set(unknown.values()) == {"the reference cannot be parsed"}
    assert set(unknown) <= BEYOND_THE_PARSER


# Only their own text is correct, and whatever else a student answers is `unknown`.
BEYOND_THE_PARSER = {
    r"\aleph_0",
    r"\aleph_3",
    r"\beth_1",
    r"2^{\aleph_0}",
    r"\deg f(x)",
    r"\max\{A, B\}",
    r"\min\{x_1, x_2, \ldots, x_n\}",
    r"\mathbb{Z}_2",
    r"\mathbb{Z}/2\mathbb{Z}",
    r"2 X^\top X \beta",
    r"H_1 \cong H_2",
    r"C([0,1])",
    r"x_t \to z_*",
    r"\alpha \sum_{t=1}^T \frac{1}{t}",
    "e^e",
}
