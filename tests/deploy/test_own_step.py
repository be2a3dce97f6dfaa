"""A stage that is defined in a test alone runs in the demo's topology: ledger, scale, status,
metrics."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest

from deploy.config import ConfigError, load
from deploy.roles import own_settings, roles, settings
from deploy.scale import scale
from deploy.status import open_streams, read_status, render
from rollout.own_weights import OwnWeights
from services.metrics import read
from tests.deploy import filters
from tests.deploy.conftest import ROOT
from tests.deploy.driver import Driver
from tests.deploy.filters import FilterSettings

DEMO = ROOT / "deploy/runs/demo.yaml"
STEP = (
    "{name: filter, after: verifier, worker: 'tests.deploy.filters:Filter', settings: {every: 3}, "
    "resources: {cpus: 0.1}}"
)
PROMPTS = 4 * 16
FILTERED = len(range(0, PROMPTS, 3))


@pytest.mark.slow
def test_it_runs_and_scales_in_the_demo_s_topology_with_an_exact_ledger(tmp_path: Path) -> None:
    run, gate = tmp_path / "demo", tmp_path / "open"
    driver = Driver(
        tmp_path / "log", "run", DEMO, f"steps=[{gated(gate)}]", f"runs_dir={tmp_path}",
        "trainer.max_steps=4", "evaluation=null", "max_dead_fraction=0.5", "ray.dashboard=false",
        "scoring.port=0", "trainer.groups_per_step=16", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    address = run / "redis/url"
    try:
        driver.wait_for(lambda: address.exists() and address.read_text())
        driver.wait_for(lambda: at_work(run) == ["demo-filter-0"])
        asyncio.run(scale(run, ["filter=2"]))
        driver.wait_for(lambda: at_work(run) == ["demo-filter-0", "demo-filter-1"])
        shown = render(asyncio.run(read_status(run)))
    finally:
        gate.touch()  # whatever was found, the run ends
        ended = driver.end()
    assert ended == 0, driver.said
    lines = re.findall(r"(demo-filter-\d)-\w+: 0 done, [1-9]\d* in work, passed 0", shown)
    assert lines == ["demo-filter-0", "demo-filter-1"]
    assert "filter: 1 → 2 workers" in driver.said
    check_ledger(run)
    check_metrics(run)


def gated(gate: Path) -> str:
    """The row of a filter that holds what it has until `gate` exists."""
    return STEP.replace("every: 3", f"every: 3, gate: '{gate}'")


def at_work(run: Path) -> list[str]:
    """The filters that report, from within the run, that they hold items."""
    reports = asyncio.run(read_status(run))["workers"]
    return sorted(
        name.rpartition("-")[0]
        for name, report in reports.items()
        if report["stage"] == "filter" and report["active"]
    )


def check_ledger(run: Path) -> None:
    status = asyncio.run(read_status(run))
    assert (status["fed"], status["dead"]) == (PROMPTS, FILTERED)
    assert (status["trained"], status["in_flight"]) == (PROMPTS - FILTERED, 0)
    assert [*status["streams"]] == ["prompts", "rollouts", "verified", "filter_out", "scored"]
    assert "filter_out" in render(status)

    async def reasons() -> set[str]:
        async with open_streams(run) as streams:
            return {item.reason for item in await streams.dead()}

    assert asyncio.run(reasons()) == {"filter: filtered"}


def check_metrics(run: Path) -> None:
    last = read(run)[-1]
    assert last["queue/filter_out"] == 0
    assert last["filter/workers"] == 2
    # As last reported, up to two seconds before: the ledger has the exact number.
    assert last["filter/passed"] in range(PROMPTS - FILTERED + 1)
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
