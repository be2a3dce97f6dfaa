"""What the driver's watch ends a run for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.config import load
from deploy.console import Console
from deploy.crew import Crew
from deploy.launch import Run, RunFailed, _without_addresses
from deploy.telemetry import Telemetry
from services.metrics import Recorder
from services.streams import Streams, claim
from tests.deploy.conftest import ROOT


@pytest.mark.parametrize(
    ("settled", "sentence"),
    [
        (False, "no gradient step for .* the slowest stage is the one that reads 'prompts'"),
        (True, "nothing is in flight, and the learner has not ended for"),
    ],
    ids=["a stage that hangs", "a learner that hangs when all is trained"],
)
async def test_a_run_that_hangs_ends_with_a_sentence(
    streams: Streams, tmp_path: Path, settled: bool, sentence: str
) -> None:
    await streams.feed([b"item"], expected_fed=0, max_in_flight=1)
    if settled:
        (item,) = await claim([streams], "prompts", "w", count=1, block_ms=1000)
        await streams.settle("prompts", [item.id])
    config = load(ROOT / "deploy/runs/demo.yaml", ["trainer.stall_timeout_s=0.6"])
    preflight: Any = SimpleNamespace(total_groups=1)
    run = Run(config, tmp_path, Console(), preflight, False, Telemetry(config.name))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with Recorder(tmp_path) as recorder, pytest.raises(RunFailed, match=sentence):
        async with asyncio.timeout(20):
            await run._watch(streams, recorder, learner, Crew("hangs", str))


@pytest.mark.parametrize(("dead", "stops"), [(1, False), (2, True)])
async def test_a_run_with_too_many_dead_prompts_ends_with_a_sentence(
    streams: Streams, tmp_path: Path, dead: int, stops: bool
) -> None:
    await streams.feed([b"item"] * 10, expected_fed=0, max_in_flight=10)
    for item in await claim([streams], "prompts", "w", count=dead, block_ms=1000):
        await streams.bury(item, "poison")
    settings = ["trainer.groups_per_step=1", "max_dead_fraction=0.1"]
    config = load(ROOT / "deploy/runs/demo.yaml", settings)
    preflight: Any = SimpleNamespace(total_groups=10)
    run = Run(config, tmp_path, Console(), preflight, False, Telemetry(config.name))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ending = pytest.raises(RunFailed, match=r"2 of 10 prompts are dead.*scope dead")
    with Recorder(tmp_path) as recorder, ending if stops else pytest.raises(TimeoutError):
        async with asyncio.timeout(20 if stops else 1.5):  # the watch looks every half second
            await run._watch(streams, recorder, learner, Crew("poisoned", str))


def test_no_address_that_may_hold_a_password_goes_to_a_tracker() -> None:
    others = (
        "{a: {model: a, endpoints: ['http://u:hidden@h']}, "
        "b: {model: b, cache: {url: 'redis://u:hidden@h'}}}"
    )
    config = load(
        ROOT / "deploy/runs/demo.yaml",
        [
            "redis.url=redis://u:hidden@h",
            "teacher.cache.url=redis://u:hidden@h",
            "trainer.checkpoint.storage=s3://key:hidden@bucket",
            f"teacher.others={others}",
        ],
    )
    told = _without_addresses(config)
    assert "hidden" not in str(told)
    assert {name: one["model"] for name, one in told["teacher"]["others"].items()} == {
        "a": "a",
        "b": "b",
    }
