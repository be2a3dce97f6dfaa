"""The table of stages: what derives from it, and what a stage of one's own changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.pipeline import EVAL, PIPELINE, TRAIN, Pipeline, Step

FILTER = Step("filter", "", "filter_out", "own:Filter")


PAGE = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_picture_in_the_docs_shows_these_streams_and_stages() -> None:
    _, streams, stages, *_ = PAGE.partition("```")[2].splitlines()
    assert streams.split() == [*PIPELINE.streams]
    assert re.findall(r"\w+", stages) == ["feeder", *PIPELINE.names, "trainer"]


def test_the_table_in_the_docs_is_this_table() -> None:
    row = r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \| ([a-z, ]+) \| `(\w+)/worker.py` \|$"
    lanes = {EVAL: "evaluation", TRAIN: "training"}
    assert re.findall(row, PAGE, re.M) == [
        (
            s.name,
            s.reads,
            s.writes,
            ", ".join(lanes[lane] for lane in s.lanes),
            s.worker.partition(".")[0],
        )
        for s in PIPELINE.steps
    ]


def test_every_stage_s_worker_is_there() -> None:
    for step in PIPELINE.steps:
        assert step.worker_class().__name__ == step.worker_name


def test_streams_and_results_of_each_lane() -> None:
    assert PIPELINE.streams == ("prompts", "rollouts", "verified", "scored")
    assert (PIPELINE.source, PIPELINE.results(), PIPELINE.results(EVAL)) == (
        "prompts",
        "scored",
        "verified",
    )


@pytest.mark.parametrize(
    ("after", "streams", "lanes", "evaluated"),
    [
        ("rollout", "prompts rollouts filter_out verified scored", (EVAL, TRAIN), "verified"),
        ("verifier", "prompts rollouts verified filter_out scored", (TRAIN,), "verified"),
        ("teacher", "prompts rollouts verified scored filter_out", (TRAIN,), "verified"),
    ],
)
def test_a_stage_of_one_s_own_goes_between_two(
    after: str, streams: str, lanes: tuple[str, ...], evaluated: str
) -> None:
    made = PIPELINE.with_steps([(after, FILTER)])
    assert made.streams == tuple(streams.split())
    assert made["filter"].lanes == lanes
    assert made.results(EVAL) == evaluated
    assert made.results() == made.streams[-1]


def test_two_behind_the_same_stage_stand_in_the_order_of_the_last_first() -> None:
    made = PIPELINE.with_steps([("verifier", FILTER), ("filter", Step("b", "", "b_out", "own:B"))])
    assert made.names == ("rollout", "verifier", "filter", "b", "teacher")
    assert made.streams == ("prompts", "rollouts", "verified", "filter_out", "b_out", "scored")


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ([("verifer", FILTER)], "comes after 'verifer': the steps are rollout, verifier, teacher"),
        ([("rollout", Step("teacher", "", "x", "own:B"))], "two stages have one name"),
        ([("rollout", Step("b", "", "scored", "own:B"))], "two streams have one name"),
    ],
)
def test_what_does_not_fit_is_one_sentence(own: list[tuple[str, Step]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PIPELINE.with_steps(own)


def test_stages_must_be_joined_and_serve_the_lanes_of_the_next() -> None:
    first, second, _ = PIPELINE.steps
    with pytest.raises(ValueError, match="which nobody reads"):
        Pipeline((second, first))
    only_training = Step("rollout", "prompts", "rollouts", "r:R", lanes=(TRAIN,))
    with pytest.raises(ValueError, match="does not work for every lane of verifier"):
        Pipeline((only_training, second))
