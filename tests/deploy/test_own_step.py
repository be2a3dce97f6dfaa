"""A stage that is defined in a test alone runs in the demo's topology: ledger, scale, status,
metrics."""

from __future__ import annotations

import asyncio
import inspect
import re

import pytest

from deploy.config import ConfigError, load
from deploy.roles import own_settings, roles, settings
from deploy.status import open_streams, read_status, render
from rollout.own_weights import OwnWeights
from services.metrics import read
from tests.deploy import filters
from tests.deploy.driver import DEMO
from tests.deploy.extended import FILTERED, PROMPTS, STEP, Extended
from tests.deploy.filters import FilterSettings


@pytest.mark.slow
def test_it_scales_and_reports_in_a_run(extended_run: Extended) -> None:
    shown = extended_run.shown
    lines = re.findall(r"(demo-filter-\d)-\w+: 0 done, [1-9]\d* in work, passed 0", shown)
    assert lines == ["demo-filter-0", "demo-filter-1"]
    assert "filter: 1 → 2 workers" in extended_run.said


@pytest.mark.slow
def test_the_ledger_is_exact(extended_run: Extended) -> None:
    status = asyncio.run(read_status(extended_run.directory))
    assert (status["fed"], status["dead"]) == (PROMPTS, len(FILTERED))
    assert (status["trained"], status["in_flight"]) == (PROMPTS - len(FILTERED), 0)
    assert [*status["streams"]] == ["prompts", "rollouts", "verified", "filter_out", "scored"]
    assert "filter_out" in render(status)

    async def reasons() -> set[str]:
        async with open_streams(extended_run.directory) as streams:
            return {item.reason for item in await streams.dead()}

    assert asyncio.run(reasons()) == {"filter: filtered"}


@pytest.mark.slow
def test_it_has_metrics_like_any_other(extended_run: Extended) -> None:
    last = read(extended_run.directory)[-1]
    assert last["queue/filter_out"] == 0
    assert last["filter/workers"] == 2
    # As last reported, up to two seconds before: the ledger has the exact number.
    assert last["filter/passed"] in range(PROMPTS - len(FILTERED) + 1)
    assert last["cpu_s/filter"] > 0


def test_it_took_a_row_a_worker_and_its_settings() -> None:
    demo, own = load(DEMO).model_dump(), load(DEMO, [f"steps=[{STEP}]"]).model_dump()
    assert [section for section in demo if demo[section] != own[section]] == ["steps"]
    room = [member for member in vars(filters).values() if inspect.isclass(member)]
    written = {one.__name__ for one in room if one.__module__ == filters.__name__}
    assert written == {"Filter", "FilterSettings"}


def test_it_has_a_role_like_any_other() -> None:
    config = load(DEMO, [f"steps=[{STEP}]"])
    (role,) = [role for role in roles(config) if role.name == "filter"]
    assert (role.workers, role.step.reads, role.step.writes) == (1, "verified", "filter_out")
    assert settings(config, role, OwnWeights("nowhere"), {}) == FilterSettings(every=3)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("{name: f, after: verifer, worker: 'a:B'}", "the steps are rollout, verifier, teacher"),
        ("{name: teacher, after: verifier, worker: 'a:B'}", "two stages have one name"),
        ("{name: f, after: verifier, worker: 'nowhere:B'}", "No module named 'nowhere'"),
        ("{name: f, after: verifier, worker: 'json:loads'}", "is no services.worker.StepWorker"),
        (STEP.replace("every", "evry"), "settings of filter: evry"),
    ],
)
def test_a_stage_that_cannot_work_is_one_sentence(step: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config = load(DEMO, [f"steps=[{step}]"])
        for own in config.steps:
            own_settings(own, config.pipeline[own.name])
