"""A rollout worker that plays episodes, on a real Redis: kills, faults and the exact ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rollout.config import EnvironmentConfig, RolloutConfig
from rollout.worker import RolloutSettings, RolloutWorker
from services.pipeline import EVAL
from services.stage import Connection
from services.streams import Streams
from tests.builders import post
from tests.builders import prompt as make_prompt
from tests.rollout import worlds
from tests.rollout.test_episodes import question
from tests.rollout.test_worker import feed, store_with, until_sampled, working
from tests.waiting import until


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.save_student(tmp_path_factory.mktemp("student-of-turns"))


@pytest_asyncio.fixture(autouse=True)
async def evaluation(connection: Connection) -> AsyncIterator[None]:
    async with connection.streams(EVAL) as lane:
        await lane.create()
        yield


async def worker(connection: Connection, student: Path, **settings: Any) -> RolloutWorker:
    config = RolloutConfig.model_validate({"engine": {"device": "cpu"}})
    environment = EnvironmentConfig.model_validate(settings)
    feed = (await store_with(0)).feed()
    made = RolloutSettings(config, str(student), feed, environment)
    return RolloutWorker(post(connection, "rollout"), made)


async def test_an_episode_of_a_killed_worker_starts_again(
    connection: Connection, streams: Streams, student: Path
) -> None:
    worlds.held.clear()
    worlds.waiting.clear()
    kind = "tests.rollout.worlds:holding"
    await feed(streams, *(question(order, n=4) for order in range(3)))
    async with working(await worker(connection, student, kind=kind)):
        await until(lambda: len(worlds.waiting) >= 4)  # it dies in the middle of episodes
    worlds.held.set()
    async with working(await worker(connection, student, kind=kind)):
        groups = await until_sampled(streams, 3)
    assert sorted(g.prompt.order for g in groups) == [0, 1, 2]
    assert any(t.episode and t.episode.turns == 2 for g in groups for t in g.trajectories)
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.depth["rollouts"], ledger.exact) == (3, 3, True)


async def test_faults_of_the_prompt_and_of_the_world_end_it_and_nothing_else(
    connection: Connection, streams: Streams, student: Path
) -> None:
    kinds = {"bad": "tests.rollout.worlds:broken", "worse": "tests.rollout.worlds:broken"}
    made = await worker(connection, student, kinds=kinds)
    await feed(
        streams,
        question(0, n=16, data_source="bad", reference="bad"),
        question(1, n=16, data_source="worse", reference="raise"),
        replace(make_prompt(2), data_source="plain"),
    )
    async with working(made):
        (group,) = await until_sampled(streams, 1)
        await until(lambda: _dead(streams, 2))
    assert group.prompt.order == 2 and all(t.episode is None for t in group.trajectories)
    reasons = sorted(dead.reason for dead in await streams.dead())
    assert reasons == ["rollout: RuntimeError: out of order", "rollout: this riddle has no answer"]
    assert (await streams.ledger()).exact


async def _dead(streams: Streams, count: int) -> bool:
    return len(await streams.dead()) == count
