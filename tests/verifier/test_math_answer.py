"""Mathematical answers: a table of right and wrong ones, and the real rows of DeepMath."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from services.trajectory import Verdict
from verifier.math_answer import judge, last_boxed

RIGHT = [  # (answer in the box, reference)
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac{2}{4}", r"\frac12"),
    ("1/2", r"\frac{1}{2}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("1,728", "1728"),
    ("x = 5", "5"),
    ("5", "x=5"),
    (r"5 \text{ cm}", "5"),
    (r"50\%", r"50\%"),
    (r"50\%", "0.5"),
    ("(1, 2)", r"\left(1,2\right)"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    ("[0, 1)", "[0,1)"),
    ("1728 and 1331", "1331 and 1728"),
    ("Yes", r"\text{Yes}"),
    ("B", r"\textbf{B}"),
    (r"\aleph_0", r"\aleph_0"),  # the library cannot parse it, but it is the same text
    ("$7$.", "7"),
    ("7", r"\boxed{7}"),
]
WRONG = [
    ("0.33", r"\frac{1}{3}"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    ("(2, 1)", "(1,2)"),
    ("(3, 1)", "(2,1)"),  # both are empty when they are read as intervals
    (r"\{1, 2\}", r"\{1,2,3\}"),
    ("[0, 1]", "[0,1)"),
    ("1728", "1331 and 1728"),
    ("1331 and 1728", "1728"),
    ("No", "Yes"),
    (r"x > 10", r"x \ge 10"),
    (".5", "5"),
    ("-3", "3"),
    (r"\frac{1}{", "1"),
    (r"\aleph_0", "0"),
    ("5 [[ garbage", "5"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_equal_answers_are_correct(answer: str, reference: str) -> None:
    assert judge(rf"So it is \boxed{{{answer}}}.", reference).outcome == "correct"


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_other_answers_are_incorrect(answer: str, reference: str) -> None:
    assert judge(rf"So it is \boxed{{{answer}}}.", reference).outcome == "incorrect"


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


def test_an_answer_without_a_box_is_found() -> None:
    assert judge("Hence the final answer is $42$.", "42").outcome == "correct"
    assert judge("Hence the final answer is 41.", "42").outcome == "incorrect"


def test_an_unparsable_reference_leaves_other_answers_unknown() -> None:
    verdict = judge(r"\boxed{5}", r"2^{\aleph_0}")
    assert verdict == Verdict("unknown", "the reference cannot be parsed")


def test_the_references_of_deepmath(deepmath: Path) -> None:
    """Each reference verifies against itself, and never against the next row's other one."""
    rows = pq.read_table(deepmath, columns=["reward_model"]).to_pylist()[::10]
    references = [row["reward_model"]["ground_truth"] for row in rows]
    assert len(references) == 100
    verbatim = [judge(rf"\boxed{{{reference}}}", reference) for reference in references]
    assert sum(verdict.outcome == "correct" for verdict in verbatim) >= 99
    # `\displaystyle` changes the text alone, so that the two must be parsed to be found equal.
    rewritten = [judge(rf"\boxed{{\displaystyle {text}}}", text) for text in references]
    assert sum(verdict.outcome == "correct" for verdict in rewritten) >= 97
    assert {verdict.outcome for verdict in rewritten} <= {"correct", "unknown"}
    different = [(a, b) for a, b in pairwise(references) if a != b]
    confused = [
        (reference, other)
        for reference, other in different
        if judge(rf"\boxed{{{other}}}", reference).outcome == "correct"
    ]
    assert confused == []
