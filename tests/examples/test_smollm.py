"""The example with a real language model: its stories, and what is counted."""

from __future__ import annotations

import itertools
import json
import re

from deploy.config import load
from examples.smollm.distil import CONFIG, ROOT
from examples.smollm.measure import Tally, row
from examples.smollm.task import (
    HELD_OUT,
    HELD_OUT_SEED,
    SOLVED,
    TRAIN,
    TRAIN_SEED,
    Problem,
    chat,
    distinct,
)
from verifier import math_answer

STORIES = {"train": distinct(TRAIN, TRAIN_SEED, 500), "held out": distinct(HELD_OUT, 2, 64)}


def test_every_solution_is_right_by_the_verifier_and_by_python() -> None:
    for problem in [*SOLVED, *STORIES["train"], *STORIES["held out"]]:
        calculation, _, value = problem.calculation.partition(" = ")
        assert eval(calculation) == int(value) == int(problem.answer) > 0
        assert set(re.findall(r"\d+", calculation)) == set(re.findall(r"\d+", problem.story))
        assert math_answer.judge(problem.solution, problem.answer, "hashes").outcome == "correct"
        wrong = str(int(problem.answer) + 1)
        assert math_answer.judge(problem.solution, wrong, "hashes").outcome == "incorrect"


def test_held_out_stories_share_no_sentence_name_thing_or_numbers_with_the_others() -> None:
    assert not set(TRAIN.names.split()) & set(HELD_OUT.names.split())
    assert not set(TRAIN.things.split()) & set(HELD_OUT.things.split())
    assert not {*itertools.chain(*TRAIN.sentences.values())} & {
        *itertools.chain(*HELD_OUT.sentences.values())
    }
    calculations = {name: {p.calculation for p in some} for name, some in STORIES.items()}
    assert not calculations["train"] & calculations["held out"]
    assert distinct(HELD_OUT, HELD_OUT_SEED, 64) == STORIES["held out"]  # fixed by the seed


def test_only_the_teacher_is_shown_the_solution() -> None:
    problem = STORIES["held out"][0]
    shown = chat(problem)
    assert [m["role"] for m in shown] == ["system", *["user", "assistant"] * len(SOLVED), "user"]
    assert problem.calculation not in json.dumps(shown)
    assert problem.calculation in chat(problem, hints=True)[-1]["content"]
    assert len(chat(problem, hints=True)) == len(shown)


def test_what_is_counted() -> None:
    problem = Problem("Ann has 4 pens and buys 3 more. How many pens now?", "4 + 3 = 7", "7")
    answers = [
        ("4 + 3 = 7\n#### 7", True),  # right
        ("4 + 3 = 8\n#### 8", True),  # what is asked, computed wrong
        ("4 - 3 = 1\n#### 1", True),  # the form alone
        ("4 + 3 = 7\n#### 7", False),  # not ended
        ("7 is the answer. #### 7", True),  # right, in another form
        ("I do not know", True),
    ]
    tally = Tally.of(problem, answers)
    assert tally == Tally(samples=6, correct=2, ended=5, formed=3, asked=2)
    assert row("x", [tally]).startswith("| x | 33.3% [33.3%, 33.3%] | 50.0% [50.0%, 50.0%] |")


def test_the_readmes_teacher_by_reinforcement_is_a_config() -> None:
    page = (CONFIG.parent / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\.venv/bin/scope run (\S+) (.+(?:\\\n.+)*)$", page, re.MULTILINE)
    for path, overrides in commands:
        load(ROOT / path, overrides.replace("\\\n", " ").split())
    assert len(commands) == 2
