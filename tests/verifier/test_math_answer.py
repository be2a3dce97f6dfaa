"""Mathematical answers: a table of right and wrong ones, and the real rows of DeepMath."""

from __future__ import annotations

import asyncio
import tracemalloc
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


def test_what_is_judged_stands_after_the_thinking() -> None:
    assert judge(r"<think>\boxed{7}</think> It is \boxed{9}.", "9").outcome == "correct"
    assert judge(r"<think>\boxed{9}</think> It is \boxed{7}.", "9").outcome == "incorrect"
    assert judge(r"begun in the prompt \boxed{7}</think> \boxed{9}", "9").outcome == "correct"
    unfinished = r"<think>It is \boxed{9}, or is it"
    assert judge(unfinished, "9") == Verdict("incorrect", "no answer found")
    assert judge(r"<think>\boxed{9}</think> So be it.", "9").outcome == "incorrect"
    assert judge(unfinished, "9", answer_in_thinking=True).outcome == "correct"


@pytest.mark.parametrize(
    "task", [r"\int_0^1 x^2dx", r"\sum_{k=1}^{3} \frac{k}{18}", r"\max(0,1/3)"]
)
def test_a_task_handed_back_is_no_answer_unless_that_is_allowed(task: str) -> None:
    assert judge(rf"\boxed{{{task}}}", r"\frac13") == Verdict("incorrect", "is not evaluated")
    assert judge(rf"\boxed{{{task} = \frac13}}", r"\frac13").outcome == "correct"
    assert judge(rf"\boxed{{{task}}}", task).outcome == "correct"
    allowed = judge(rf"\boxed{{{task}}}", r"\frac13", require_evaluated=False)
    assert allowed.outcome == "correct"


async def test_no_comparison_needs_a_signal() -> None:
    """SIGALRM, by which the library ends long ones, cannot be had in a thread."""
    for answer, outcome in (("x^2+2x+1", "correct"), (r"\sin^2 x + 2x", "incorrect")):
        verdict = await asyncio.to_thread(judge, rf"\boxed{{{answer}}}", "(x+1)^2")
        assert verdict.outcome == outcome


@pytest.mark.parametrize("brackets", ["{", "}", "(", "\\boxed{", "\\left(", "\\{"])
def test_brackets_without_end_are_read_once(brackets: str) -> None:
    """Work that grew with the square of the length would take hours."""
    assert judge(brackets * 1_000_000, "42").outcome == "incorrect"
    assert judge(r"\boxed{" + brackets * 1_000_000 + "}", "42").outcome == "incorrect"


def test_an_unparsable_reference_leaves_other_answers_unknown() -> None:
    verdict = judge(r"\boxed{5}", r"2^{\beth_0}")
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
    assert len(right) <= 0.004 * len(golds)
    unknown = {gold: v.reason for (gold, _), v in verdicts.items() if v.outcome == "unknown"}
    assert set(unknown.values()) == {"the reference cannot be parsed"}
    assert set(unknown) <= BEYOND_THE_PARSER


# Only their own text is correct, and whatever else a student answers is `unknown`.
BEYOND_THE_PARSER = {
    r"\aleph_0",
    r"\aleph_3",
    r"\beth_1",
    r"2^{\aleph_0}",
    r"H_1 \cong H_2",
    r"x_t \to z_*",
}


@pytest.mark.parametrize("answer_from", ["boxed", "hashes", "final_line"])
@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", r"\boxed{1},", r"\boxed ", "<think>", "</think>", "####", "answer is ", "{", "\\",
     "$", " ", "\n", "```", r"\boxed{\boxed{}}"],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_memory_in_proportion(
    piece: str, answer_from: AnswerFrom
) -> None:
    """Twenty thousand nested boxes took 1.6 GB: each was cut out of the text."""
    text = piece * (2**20 // len(piece)) + "1" + "}" * 1000
    tracemalloc.start()
    try:
        judge(text, "42", answer_from)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 400 * len(text)


@pytest.mark.parametrize("piece", ["a b ", "1+", "x", "and ", "|", "9!", r"\pm ", r"\sqrt", "2^"])
@pytest.mark.parametrize("reference", ["5", r"\frac{x}{2}", "x<3", "(1,2)"])
def test_an_endless_answer_is_incorrect_and_ends_no_judge(piece: str, reference: str) -> None:
    text = (piece * 2000)[:1990]
    assert judge(rf"\boxed{{{text}}}", reference).outcome == "incorrect"
