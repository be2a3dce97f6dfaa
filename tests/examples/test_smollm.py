"""The example with a real language model: its stories, and what is counted."""

from __future__ import annotations

import itertools
import json
import re
import shlex

from deploy.config import load
from examples.smollm.distil import CONFIG, ROOT
from examples.smollm.measure import Tally, row
from examples.smollm.study import COLD, EXPERIMENTS, WARM, settings, table, todo
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
        load(ROOT / path, shlex.split(overrides.replace("\\\n", " ")))
    assert len(commands) == 2


def test_a_study_run_has_run_yamls_settings_and_another_objective() -> None:
    shipped = load(CONFIG).trainer
    assert settings("scope") == shipped
    assert settings("no weights").objective != shipped.objective
    for name in EXPERIMENTS:
        changed = settings(name)
        assert changed.model_copy(update={"objective": shipped.objective}) == shipped
        assert getattr(changed.objective, "log_ratio_bound", 5.0) == 5.0
    assert settings("rft").objective.kind == "rft"


def test_no_study_run_is_made_twice() -> None:
    done = [{"experiment": "scope", "seed": 0}, {"experiment": "rft", "seed": 1}]
    left = [*todo(done, ["scope", "rft"], 2)]
    assert left == [("rft", 0), ("scope", 1)]


def test_the_studys_differences_are_paired_by_seed() -> None:
    def run(name: str, seed: int, right: int) -> dict[str, object]:
        figures = {"correct": [right, 0], "formed": [8, 8], "asked": [right, 0]}
        return {"experiment": name, "seed": seed, WARM: figures, COLD: figures}

    runs = [run("scope", 0, 4), run("scope", 1, 8), run("rft", 0, 6), run("opd", 3, 0)]
    rows = table(runs).splitlines()[2:]
    half = "37.5 ± 158.8"  # 25% and 50%, with one degree of freedom
    assert rows[0] == f"| scope | 2 | {half} | {half} | 100.0 ± 0.0 | 50.0 ± 0.0 | – |"
    assert rows[1] == "| opd | 1 | 0.0 | 0.0 | 100.0 | 0.0 | – |"  # of no common seed
    assert rows[2] == "| rft | 1 | 37.5 | 37.5 | 100.0 | 50.0 | +12.5 |"
