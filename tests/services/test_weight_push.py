"""Transfers that leave the host out, as far as a machine without GPUs has them: everything but the
tensors' own way. vLLM's sending engines are the real ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray
import torch

from services.weight_store import StoreFeed, start_store
from services.weights import Call, Weights
from tests.waiting import DEADLINE_S

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm")]

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")  # whatever goes there is a copy, as on a GPU


def version(number: int) -> Weights:
    parameters = {"a": torch.full((2, 3), float(number)), "b": torch.ones(4, dtype=torch.bfloat16)}
    return Weights.flatten(number, parameters.items(), [1, 2], [-0.5])


@pytest.fixture
def store(ray_cluster: None) -> Iterator[Any]:
    actor = start_store("pushed")
    yield actor
    ray.kill(actor)


@pytest.fixture(params=[CPU])
def pusher(store: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    from services.weight_push import Pusher, end_of

    made = Pusher(store, request.param, end_of("nccl"))
    yield made
    ray.kill(store)  # which also ends a send that nobody answers
    made.close()


@pytest.fixture
def broadcasts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What vLLM's NCCL engine would have broadcast, and to whom it would have connected."""
    from vllm.distributed.weight_transfer import nccl_engine

    seen: list[Any] = []

    def broadcast(self: Any, source: Any, meta: Any) -> None:
        seen.append(dict(self._checked_iter(source, meta)))

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: seen.append(info))
    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast", broadcast)
    return seen


async def received(feed: StoreFeed, world_size: int) -> list[Call]:
    async with asyncio.timeout(DEADLINE_S):
        announced = await feed.next(DEADLINE_S)
        assert announced is not None
        assert announced.sender is not None and not announced.buffer.size
        return [call async for call in announced.sender.calls(world_size)]


async def test_nccl_sends_the_newest_version_to_each_engine(
    store: Any, pusher: Any, broadcasts: Any
) -> None:
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    await store.publish.remote(pusher.offer(version(1)))
    feed = StoreFeed(store)
    calls = await received(feed, world_size=2)
    assert [call.method for call in calls] == [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ]
    told = NCCLWeightTransferInitInfo(**calls[0].argument)
    endpoint, sent = broadcasts
    assert (told.world_size, told.rank_offset) == (endpoint.world_size, 1) == (3, 1)
    assert (told.master_address, told.master_port, told.packed) == (
        endpoint.master_address, endpoint.master_port, endpoint.packed,
    )  # fmt: skip
    update = NCCLWeightTransferUpdateInfo(**calls[2].argument)
    assert update.names == ["a", "b"]
    assert update.dtype_names == ["float32", "bfloat16"]
    assert [list(shape) for shape in update.shapes] == [[2, 3], [4]]
    assert sent["a"].tolist() == [[1.0] * 3] * 2
    assert (calls[3].argument.version, calls[3].argument.probe_ids) == (1, (1, 2))

    # The next version goes over the same connection; another engine gets one of its own.
    await store.publish.remote(pusher.offer(version(2)))
    assert (await received(feed, world_size=2))[0].method == "start_weight_update"
    assert (await received(StoreFeed(store), world_size=1))[-1].argument.version == 2
    assert broadcasts[2]["a"][0, 0] == 2.0
    assert broadcasts[3].world_size == 2


async def test_an_engine_that_went_away_holds_up_no_other(
    store: Any, pusher: Any, broadcasts: Any
) -> None:
    await store.publish.remote(pusher.offer(version(1)))
    gone = await StoreFeed(store).next(DEADLINE_S)
    assert gone is not None and gone.sender is not None
    async for call in gone.sender.calls(1):
        assert call.method == "init_weight_transfer_engine"
        break
    assert (await received(StoreFeed(store), world_size=1))[-1].method == "finish_weight_update"


async def begun(store: Any) -> tuple[AsyncIterator[Call], Any]:
    """An engine that was sent the announcement of a version, and answers nothing."""
    announced = await StoreFeed(store).next(DEADLINE_S)
    assert announced is not None and announced.sender is not None
    calls = announced.sender.calls(1)
    assert (await anext(calls)).method == "init_weight_transfer_engine"
    assert (await anext(calls)).method == "start_weight_update"
    return calls, announced.version


def copies(sent: dict[str, torch.Tensor]) -> set[int]:
    """The pieces of memory in which the tensors of one engine lie."""
    return {tensor.untyped_storage()._cdata for tensor in sent.values()}


@pytest.mark.parametrize("pusher", [ELSEWHERE], indirect=True)
async def test_a_version_goes_to_the_device_once_for_all_engines(
    store: Any, pusher: Any, broadcasts: Any
) -> None:
    await store.publish.remote(pusher.offer(version(1)))
    for _ in range(2):
        await received(StoreFeed(store), world_size=1)
    _, first, _, second = broadcasts
    assert first["a"].device == second["a"].device == ELSEWHERE
    assert len(copies(first)) == 1 and copies(first) == copies(second)


async def test_what_is_being_sent_stays_as_it_is(store: Any, pusher: Any, broadcasts: Any) -> None:
    await store.publish.remote(pusher.offer(version(1)))
    slow, _ = await begun(store)
    await store.publish.remote(pusher.offer(version(2)))
    assert (await received(StoreFeed(store), world_size=1))[-1].argument.version == 2
    await store.publish.remote(pusher.offer(version(3)))
    assert [call async for call in slow][-1].argument.version == 1
    sent = [one["a"][0, 0].item() for one in broadcasts if isinstance(one, dict)]
    assert sent == [2.0, 1.0]


@pytest.mark.parametrize("pusher", [ELSEWHERE], indirect=True)
async def test_two_versions_at_most_lie_on_the_device(
    store: Any, pusher: Any, broadcasts: Any
) -> None:
    """A third, while two are being sent to engines that hang, goes there tensor by tensor."""
    from services.weight_push import SENDER

    hanging = []
    for number in (1, 2):
        await store.publish.remote(pusher.offer(version(number)))
        hanging.append(await begun(store))
    assert [number for _, number in hanging] == [1, 2]
    await store.publish.remote(pusher.offer(version(3)))
    assert (await received(StoreFeed(store), world_size=1))[-1].argument.version == 3
    assert len(copies(broadcasts[-1])) == len(broadcasts[-1])
    for calls, _ in hanging:
        assert [call async for call in calls][-1].method == "finish_weight_update"
    for sender in threading.enumerate():
        if sender.name == SENDER:
            sender.join(DEADLINE_S)
    await store.publish.remote(pusher.offer(version(4)))
    await received(StoreFeed(store), world_size=1)
    assert len(copies(broadcasts[-1])) == 1


def test_ipc_tells_vllm_that_handles_are_of_packed_buffers() -> None:
    from services.weight_push import end_of

    end = end_of("ipc")(1)
    assert (end.backend, end.rank, end.packed) == ("ipc", 0, True)
