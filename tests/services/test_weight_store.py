"""The weight store as a real Ray actor: publication, going back, and its own death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray._private.internal_api import node_stats

from services.weight_store import StoreFeed, WeightStore, hand_over, start_store
from services.weights import Weights
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.slow


def version(number: int) -> Weights:
    return Weights.flatten(number, [("p", torch.full((4,), float(number)))], [1, 2], [-0.5])


class Observed(WeightStore):
    """A store that says which process it is."""

    async def pid(self) -> int:
        return os.getpid()


class Counting(WeightStore):
    """A store that says how much lies in Ray's object store when that is most: when it has just
    put a version there."""

    async def publish(self, weights: Weights) -> None:
        put, self.most = ray.put, 0.0

        def counted(value: Any) -> Any:
            reference = put(value)
            (node,) = ray.nodes()
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
            self.most = stats.store_stats.object_store_bytes_primary_copy
            return reference

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "put", counted)
            await super().publish(weights)

    async def at_most(self) -> float:
        return self.most


@pytest.fixture
def store(ray_cluster: None) -> Iterator[Any]:
    actor = ray.remote(Observed).options(num_cpus=0, max_restarts=-1).remote()
    yield actor
    ray.kill(actor)


async def test_every_feed_gets_every_publication_once_and_only_the_newest(store: Any) -> None:
    first, second = StoreFeed(store), StoreFeed(store)
    assert await first.next(0.01) is None
    await store.publish.remote(version(1))
    got = await first.next(10)
    assert got is not None
    assert dict(got.tensors())["p"].tolist() == [1.0] * 4
    assert await first.next(0.01) is None
    await store.publish.remote(version(2))
    for feed in (first, second):
        newest = await feed.next(10)
        assert newest is not None
        assert newest.version == 2


async def test_weights_are_read_where_they_lie(store: Any) -> None:
    """All readers of a node map the same memory, and nobody copies it."""
    large = Weights.flatten(1, [("p", torch.ones(1 << 20))], [1, 2], [-0.5])  # not sent along
    await store.publish.remote(large)
    one, other = [await StoreFeed(store).next(10) for _ in range(2)]
    assert one is not None and other is not None
    assert not one.buffer.flags.writeable
    assert one.buffer.ctypes.data == other.buffer.ctypes.data
    ((_, tensor),) = one.tensors()
    assert tensor.data_ptr() == one.buffer.ctypes.data
    assert tensor.sum() == 1 << 20


async def test_two_versions_lie_in_the_object_store_at_most(ray_cluster: None) -> None:
    store = ray.remote(Counting).options(num_cpus=0).remote()
    feed, size = StoreFeed(store), 8 << 20
    for number in range(3):
        weights = Weights.flatten(number, [("p", torch.ones(size // 4))], [1, 2], [-0.5])
        hand_over(store, weights, DEADLINE_S)
        assert 2 * size <= await store.at_most.remote() < 2.5 * size
        got = await feed.next(DEADLINE_S)
        assert got is not None and got.version == number
        del got
    ray.kill(store)


async def test_a_learner_that_went_back_is_followed(store: Any) -> None:
    feed = StoreFeed(store)
    for number in (5, 3, 3):  # the second 3 is another model of the same number
        await store.publish.remote(version(number))
        got = await feed.next(10)
        assert got is not None
        assert got.version == number


async def test_a_killed_store_comes_back_empty_and_is_published_to_again(store: Any) -> None:
    feed = StoreFeed(store)
    await store.publish.remote(version(1))
    assert await feed.next(10) is not None
    os.kill(await store.pid.remote(), signal.SIGKILL)
    while True:  # until the restarted actor answers
        try:
            assert await store.version.remote() is None
            break
        except ray.exceptions.RayActorError:
            assert await feed.next(0.1) is None
    await store.publish.remote(version(1))
    got = await feed.next(10)
    assert got is not None
    assert got.version == 1


async def test_the_runs_store_is_found_by_name(ray_cluster: None) -> None:
    store = start_store("a-runs-weights")
    await store.publish.remote(version(7))
    assert await start_store("a-runs-weights").version.remote() == 7
    ray.kill(store)
