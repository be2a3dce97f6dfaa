"""The study's task is what it says, and its driver computes what the service would."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from examples.arithmetic.make_study_models import BOOKS, page_batch
from examples.arithmetic.measure import is_correct
from examples.arithmetic.study import (
    ABLATIONS,
    METHODS,
    RESULTS,
    SAMPLES,
    Bench,
    made,
    read_runs,
    todo,
)
from examples.arithmetic.study_report import (
    by_experiment,
    difference,
    on_closed,
    passed,
    separation,
    summary,
)
from examples.arithmetic.task import Problem, build_tokenizer
from examples.arithmetic.ways import (
    HELD_OUT_PROMPTS,
    LARGEST,
    MAX_TOKENS,
    Hand,
    Line,
    book,
    held_out,
    is_misread,
    line,
    slip,
    training,
    ways,
    write,
)

PROBLEM = Problem(5, (13, -2))


def test_every_way_leads_to_the_answer() -> None:
    assert ways(PROBLEM) == [PROBLEM, Problem(5, (-2, 13)), Problem(13, (-2, 5))]
    for problem in held_out():
        assert ways(problem)
        for way in ways(problem):
            assert way.answer == problem.answer
            assert 0 <= way.first + way.steps[0] <= LARGEST


def test_half_of_the_prompts_are_closed_as_they_stand() -> None:
    assert ways(Problem(60, (70, -50))) == [Problem(60, (-50, 70)), Problem(70, (-50, 60))]
    assert ways(Problem(20, (-50, 70))) == [Problem(20, (70, -50))]
    assert line(60, 70) == Line("60+70=30", 30, slipped=True)
    assert line(20, -50) == Line("20-50=30", 30, slipped=True)
    closed = sum(problem not in ways(problem) for problem in training())
    assert closed == pytest.approx(len(training()) / 2, rel=0.05)


def test_bad_advice_follows_a_misread_operand_and_nothing_else() -> None:
    assert is_misread("5+13-2=", "5+31=36,36-2=34;34")
    assert not is_misread("5+13-2=", "5-13=8,8-2=6;6")
    rng = random.Random(0)
    for page in (write(Problem(50, (13, -24)), Hand(0.5, 0.0, lost=True), rng) for _ in range(200)):
        after = [one for one in page.lines[1:] if page.lines[0].misread]
        assert not any(one.slipped for one in after)  # such lines are learned, not left out
        assert is_misread("50+13-24=", page.solution) == any(one.misread for one in page.lines)


def test_a_clean_hand_is_always_right_and_a_slip_never() -> None:
    rng = random.Random(0)
    for problem in held_out():
        assert is_correct(write(problem, Hand(0.0, 0.0), rng).solution, problem.answer)
        wrong = slip(7, 12, rng)
        assert wrong.slipped and wrong.result not in (19, -1)


def test_a_second_look_mends_slips_and_is_marked_as_none() -> None:
    pages = list(itertools.islice(book(3, Hand(1.0, look_rate=1.0, habit=1.0)), 200))
    right = sum(is_correct(page.solution, page.problem.answer) for page in pages)
    assert right == len(pages)
    for page in pages:
        slipped = [page.solution[a:b] for a, b in page.slips]
        assert slipped == [line.text for line in page.lines if line.slipped]
        assert len(page.solution) < MAX_TOKENS


def test_only_the_student_copies_slips() -> None:
    tokenizer = build_tokenizer()
    for reading in itertools.chain(*(readings for _, readings in BOOKS.values())):
        pages = list(itertools.islice(book(1, Hand(1.0, 0.0)), reading.lesson.batch_size))
        ids, labels = page_batch(iter(pages), reading, tokenizer)
        labelled = (labels != -100).sum().item()
        slipped = sum(b - a for page in pages for a, b in page.slips)
        everything = sum(len(page.solution) + 1 for page in pages)
        assert labelled == everything - (0 if reading.copies_slips else slipped)
        assert ids.shape == labels.shape


def test_no_held_out_prompt_is_trained_on() -> None:
    assert len(held_out()) == HELD_OUT_PROMPTS
    assert not set(held_out()) & set(training())


def test_what_is_finished_is_not_run_again() -> None:
    done = [{"experiment": e.name, "seed": 0} for e in METHODS]
    left = [(e.name, seed) for e, seed in todo(done)]
    assert ("scope", 0) not in left and left[0] == ("scope", 1)
    names = [e.name for e in (*METHODS, *ABLATIONS)]
    assert {name for name, _ in left} >= set(names)
    for experiment in (*METHODS, *ABLATIONS):
        assert experiment.objective.kind in {m.name for m in METHODS}


def test_the_committed_summary_is_that_of_the_committed_runs() -> None:
    runs = by_experiment(read_runs())
    before = json.loads((RESULTS / "before.json").read_text())
    wrong = json.loads((RESULTS / "recovery.json").read_text())
    made = json.loads(json.dumps(summary(runs, before, wrong)))
    assert made == json.loads((RESULTS / "summary.json").read_text())
    assert {e.name for e in METHODS} <= runs.keys()
    for name in (e.name for e in METHODS):
        assert len(runs[name]) >= 5
        assert all(len(c) == HELD_OUT_PROMPTS and max(c) <= SAMPLES for c in runs[name].values())


def test_differences_are_paired_by_seed() -> None:
    runs = {"scope": {0: [16, 16], 1: [0, 0]}, "opd": {0: [32, 32], 1: [16, 16], 2: [0, 0]}}
    found = difference(runs, "opd", 1)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    assert passed([32, 0], 32) == 0.5


def test_closed_prompts_and_bad_advice_are_counted_apart() -> None:
    closed = [problem not in ways(problem) for problem in held_out()]
    runs = on_closed({"scope": {0: [int(one) for one in closed]}})
    assert runs == {"scope": {0: [1] * sum(closed)}}
    records = [{"teacher_nll": x, "misread": m} for x, m in ((3, True), (1, True), (2, False))]
    assert separation(records) == 0.5
    assert separation([*records, {"teacher_nll": 3, "misread": False}]) == 0.375


@pytest.mark.slow
def test_the_driver_trains_a_student() -> None:
    bench = Bench()
    bench.held_out_rows = bench.held_out_rows[:4]
    scope = METHODS[0]
    short = type(scope)(scope.name, 1, steps=2)
    record = made(bench, short, seed=0)
    assert len(record["correct"]) == 4 and len(record["train_accuracy"]) == 2
    assert record["scored_tokens"] > 0
    source = bench.prompts(bench.train_rows, 2, seed=0, shuffle=True)
    (group,) = bench.sample(bench.student, [source.prompt(0)])
    assert {v.outcome for v in bench.verify(group).verdicts} <= {"correct", "incorrect"}
