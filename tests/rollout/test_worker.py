"""The worker on a real Redis with a real engine: versions, the probe, and the exact ledger."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytest_asyncio
import torch

from rollout import worker as worker_module
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.worker import NoWeights, RolloutSettings, RolloutWorker
from services.config import StageConfig
from services.errors import PatienceExceeded
from services.pipeline import EVAL
from services.stage import Connection
from services.streams import Streams
from services.trajectory import Prompt, RolloutGroup, Sampling, decode, encode
from services.weights import Weights, WeightsMismatch
from tests.builders import post, tiny_model, tiny_tokenizer
from tests.builders import prompt as make_prompt
from tests.rollout.conftest import full_logprobs, published
from tests.rollout.fakes import FakeWeightStore
from tests.waiting import DEADLINE_S, until


@pytest_asyncio.fixture(autouse=True)
async def evaluation(connection: Connection) -> AsyncIterator[Streams]:
    """The second lane, which every worker reads from first."""
    async with connection.streams(EVAL) as lane:
        await lane.create()
        yield lane


def worker(
    connection: Connection, student: Path, store: FakeWeightStore, **changes: Any
) -> RolloutWorker:
    config = RolloutConfig.model_validate({"engine": {"device": "cpu"}, **changes})
    settings = RolloutSettings(config, str(student), store.feed())
    return RolloutWorker(post(connection, "rollout", capacity=config.capacity), settings)


@asynccontextmanager
async def working(made: RolloutWorker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker runs inside of the block and is cut off after it, as a kill would."""
    running = asyncio.create_task(made.run())
    yield running
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def feed(streams: Streams, *prompts: Prompt) -> None:
    fed = (await streams.ledger()).fed
    await streams.feed([encode(p) for p in prompts], expected_fed=fed, max_in_flight=1_000)


async def sampled(streams: Streams) -> list[RolloutGroup]:
    entries: Any = await streams.redis.xrange(streams.key("rollouts"))
    return [decode(RolloutGroup, fields[b"item"]) for _, fields in entries]


async def until_sampled(streams: Streams, count: int) -> list[RolloutGroup]:
    async def enough() -> bool:
        return len(await sampled(streams)) >= count

    await until(enough)
    return await sampled(streams)


async def store_with(version: int, *, fault: float = 0.0) -> FakeWeightStore:
    """Versions are told apart by their number: version `v` is `tiny_model(v)`."""
    store = FakeWeightStore()
    await store.publish(published(tiny_model(version), version, fault=fault))
    return store


def assert_sampled_by_its_version(group: RolloutGroup) -> None:
    start, model = len(group.prompt.token_ids), tiny_model(group.weight_version)
    for trajectory in group.trajectories:
        ids = [*group.prompt.token_ids.tolist(), *trajectory.token_ids.tolist()]
        expected = full_logprobs(model, ids, group.prompt.sampling.temperature)[start - 1 :]
        np.testing.assert_allclose(trajectory.logprobs, expected, atol=1e-4)


# ------------------------------------------------------------------------------- groups


async def test_prompts_become_groups_of_trajectories(
    connection: Connection, streams: Streams, student: Path
) -> None:
    made = worker(connection, student, await store_with(1))
    await feed(streams, *(make_prompt(order, n=3, ids=[2] * (order + 1)) for order in range(6)))
    async with working(made) as running:
        groups = await until_sampled(streams, 6)
        await made.stop()
        await asyncio.wait_for(running, DEADLINE_S)
    assert sorted(g.prompt.order for g in groups) == list(range(6))
    tokenizer = tiny_tokenizer()
    for group in groups:
        assert group.weight_version == 1
        assert len(group.trajectories) == 3
        assert_sampled_by_its_version(group)
        for t in group.trajectories:
            characters = tokenizer.convert_ids_to_tokens(t.token_ids.tolist())
            assert t.text == "".join(c for c in characters if c not in ("<eos>", "<pad>"))
            assert t.finish == ("stop" if t.token_ids[-1] == 1 else "length")
    assert (await streams.ledger()).exact


async def test_the_same_prompt_gives_the_same_group_wherever_it_is_sampled(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(1)
    again = make_prompt(3, n=2)
    async with working(worker(connection, student, store)):
        await feed(streams, again)
        await until_sampled(streams, 1)
    async with working(worker(connection, student, store)):
        await feed(streams, *(make_prompt(order) for order in range(3)), again)
        groups = await until_sampled(streams, 5)
    first, second = (g for g in groups if g.prompt.order == 3)
    for one, other in zip(first.trajectories, second.trajectories, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()


async def test_evaluation_has_a_lane_of_its_own(
    connection: Connection, streams: Streams, evaluation: Streams, student: Path
) -> None:
    await feed(evaluation, make_prompt(0))
    await feed(streams, make_prompt(1))
    async with working(worker(connection, student, await store_with(0))):
        (evaluated,) = await until_sampled(evaluation, 1)
        (trained,) = await until_sampled(streams, 1)
    assert (evaluated.prompt.order, trained.prompt.order) == (0, 1)


async def test_a_prompt_that_cannot_be_sampled_dies_alone(
    connection: Connection, streams: Streams, student: Path
) -> None:
    broken = replace(make_prompt(0), sampling=Sampling(n=2, max_tokens=4, top_p=0.5))
    async with working(worker(connection, student, await store_with(0))):
        await feed(streams, broken, make_prompt(1))
        (group,) = await until_sampled(streams, 1)
    assert group.prompt.order == 1
    (dead,) = await streams.dead()
    assert "top_p" in dead.reason


async def test_another_worker_takes_over_from_a_killed_one(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(0)
    await feed(streams, replace(make_prompt(0), min_weight_version=2))

    async def held() -> bool:
        summary: Any = await streams.redis.xpending(streams.key("prompts"), "stage")
        return bool(summary["pending"])

    async with working(worker(connection, student, store)):
        await until(held)  # it waits for a version that is not there, and dies waiting
    await store.publish(published(tiny_model(2), 2))
    async with working(worker(connection, student, store)):
        (group,) = await until_sampled(streams, 1)
    assert group.weight_version == 2
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.depth["rollouts"], ledger.exact) == (1, 1, True)


# ------------------------------------------------------------------------------- versions


async def test_newer_weights_are_followed(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(0)
    async with working(worker(connection, student, store)):
        for version in range(3):
            await store.publish(published(tiny_model(version), version))
            await feed(streams, replace(make_prompt(version), min_weight_version=version))
            await until_sampled(streams, version + 1)
    groups = await sampled(streams)
    assert [g.weight_version for g in groups] == [0, 1, 2]
    for group in groups:
        assert_sampled_by_its_version(group)


async def test_a_prompt_waits_for_the_weights_that_it_is_for(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(0)
    async with working(worker(connection, student, store)):
        await feed(streams, replace(make_prompt(0), min_weight_version=1), make_prompt(1))
        (ready,) = await until_sampled(streams, 1)
        assert (ready.prompt.order, ready.weight_version) == (1, 0)
        await store.publish(published(tiny_model(1), 1))
        _, waited = await until_sampled(streams, 2)
    assert (waited.prompt.order, waited.weight_version) == (0, 1)
    assert_sampled_by_its_version(waited)


async def test_a_learner_that_went_back_is_followed_back(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(3)
    async with working(worker(connection, student, store)):
        await feed(streams, make_prompt(0))
        await until_sampled(streams, 1)
        await store.publish(published(tiny_model(1), 1))
        await until(lambda: _reaches(streams, 1))
    for group in await sampled(streams):
        assert_sampled_by_its_version(group)


async def _reaches(streams: Streams, version: int) -> bool:
    """Whether a new group comes out with `version`."""
    await feed(streams, make_prompt((await streams.ledger()).fed))
    return any(g.weight_version == version for g in await sampled(streams))


async def test_weights_that_never_come_end_the_worker(
    connection: Connection, streams: Streams, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SHOW_WAIT_S", 0.05)
    impatient = Connection(connection.redis_url, connection.run, StageConfig(patience_s=0.2))
    await feed(streams, replace(make_prompt(0), min_weight_version=9))
    async with working(worker(impatient, student, await store_with(4))) as running:
        with pytest.raises(PatienceExceeded, match=r"prompt 0-0 .* version 9 .* newest is 4"):
            await asyncio.wait_for(running, DEADLINE_S)
    assert (await streams.ledger()).exact


async def test_a_worker_holds_no_weights_that_its_engine_has_read(
    connection: Connection, student: Path
) -> None:
    """Its engine may wait long for what is in flight, and the object store needs the room."""
    store = await store_with(1)
    made = worker(connection, student, store)
    read, drained = asyncio.Event(), asyncio.Event()
    buffers: list[weakref.ref[Any]] = []

    class Reading:
        async def load_weights(self, weights: Weights) -> None:
            buffers.append(weakref.ref(weights.buffer))
            del weights
            store.weights = None  # as the object store does without its newest
            read.set()
            await drained.wait()

    made._engine = cast(Engine, Reading())
    loading = asyncio.create_task(made._load_newer(DEADLINE_S))
    await asyncio.wait_for(read.wait(), DEADLINE_S)
    assert buffers[0]() is None
    drained.set()
    assert await loading


# ------------------------------------------------------------------------------- failures


async def test_first_weights_that_fail_the_probe_stop_it(
    connection: Connection, streams: Streams, student: Path
) -> None:
    await feed(streams, make_prompt(0))
    made = worker(connection, student, await store_with(1, fault=0.1))
    with pytest.raises(WeightsMismatch, match=r"version 1: .* by 0\.1 nats, more than .*0\.001"):
        await asyncio.wait_for(made.run(), DEADLINE_S)
    assert (await streams.ledger()).depth["prompts"] == 1


async def test_later_weights_that_fail_the_probe_stop_it(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(0)
    async with working(worker(connection, student, store)) as running:
        await feed(streams, *(make_prompt(order) for order in range(20)))
        await until_sampled(streams, 1)
        await store.publish(published(tiny_model(1), 1, fault=0.1))
        with pytest.raises(WeightsMismatch, match="version 1"):
            await asyncio.wait_for(running, DEADLINE_S)
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.dead, ledger.exact) == (20, 0, True)
    for group in await sampled(streams):
        assert group.weight_version == 0
        assert_sampled_by_its_version(group)


async def test_a_tolerance_that_allows_it_lets_it_work(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(1, fault=0.1)
    async with working(worker(connection, student, store, probe_tolerance=0.3)):
        await feed(streams, make_prompt(0))
        assert len(await until_sampled(streams, 1)) == 1


async def test_a_weight_store_that_breaks_stops_it(
    connection: Connection, streams: Streams, student: Path
) -> None:
    store = await store_with(0)
    async with working(worker(connection, student, store)) as running:
        await feed(streams, make_prompt(0))
        await until_sampled(streams, 1)
        await store.break_down(ConnectionError("the store is gone"))
        with pytest.raises(ConnectionError, match="the store is gone"):
            await asyncio.wait_for(running, DEADLINE_S)


async def test_a_learner_that_publishes_nothing_is_named(
    connection: Connection, streams: Streams, student: Path
) -> None:
    made = worker(connection, student, FakeWeightStore(), weights_timeout_s=0.1)
    with pytest.raises(NoWeights, match=r"rollout-0 waited 0\.1 s for the learner's first"):
        await asyncio.wait_for(made.run(), DEADLINE_S)


async def test_it_can_be_stopped_before_there_are_weights(
    connection: Connection, streams: Streams, student: Path
) -> None:
    made = worker(connection, student, FakeWeightStore())
    await made.stop()
    await asyncio.wait_for(made.run(), DEADLINE_S)


async def test_threads_are_set(connection: Connection, student: Path) -> None:
    before = torch.get_num_threads()
    made = worker(connection, student, FakeWeightStore(), torch_threads=before + 1)
    await made.stop()
    await made.run()
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
