"""A stage that is defined in a test alone runs in the demo's topology: ledger, scale, metrics."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import ConfigError, load
from deploy.roles import own_settings, roles, settings
from deploy.scale import scale
from deploy.status import open_streams, read_status, render
from rollout.own_weights import OwnWeights
from tests.deploy.conftest import ROOT
from tests.deploy.filters import FilterSettings

DEMO = ROOT / "deploy/runs/demo.yaml"
STEP = (
    "{name: filter, after: verifier, worker: 'tests.deploy.filters:Filter', settings: {every: 3}}"
)
PROMPTS = 4 * 16


@pytest.mark.slow
def test_it_runs_in_the_demo_s_topology_with_an_exact_ledger(tmp_path: Path) -> None:
    settings = [
        f"steps=[{STEP}]", f"runs_dir={tmp_path}", "trainer.max_steps=4", "evaluation=null",
        "max_dead_fraction=0.5", "ray.dashboard=false", "scoring.port=0",
        "trainer.groups_per_step=16",
    ]  # fmt: skip
    scope = Path(sys.executable).parent / "scope"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [scope, "run", DEMO, *settings], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "demo"
    status = asyncio.run(read_status(run))
    filtered = len(range(0, PROMPTS, 3))
    assert (status["fed"], status["dead"]) == (PROMPTS, filtered)
    assert (status["trained"], status["in_flight"]) == (PROMPTS - filtered, 0)
    assert [*status["streams"]] == ["prompts", "rollouts", "verified", "filter_out", "scored"]
    assert "filter_out" in render(status)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["queue/filter_out"] == 0
    assert records[-1]["filter/workers"] == 1
    # As last reported, up to two seconds before: the ledger above has the exact number.
    assert records[-1]["filter/passed"] in range(PROMPTS - filtered + 1)
    assert records[-1]["cpu_s/filter"] > 0

    async def dead_and_wanted() -> tuple[set[str], dict[str, int]]:
        await scale(run, ["filter=2"])
        async with open_streams(run) as streams:
            dead = await streams.dead()
            return {item.reason for item in dead}, await streams.wanted()

    assert asyncio.run(dead_and_wanted()) == ({"filter: filtered"}, {"filter": 2})


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
