"""The weights' way back: the learner publishes a version, every engine waits for the next.

The weights lie in the Ray object store and are read there without a copy, once by each node.
The store owns them, not the learner, so the last version outlives the learner that made it. A
store that dies is restarted empty, and the learner, which looks after it, publishes again.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from services.weights import Weights

_PAUSE_S = 1.0  # between attempts to reach a store that is being restarted


@dataclass(frozen=True, slots=True)
class Publication:
    """One published version. `serial` tells it from a second one of the same number, which a
    learner that went back to a checkpoint makes."""

    serial: str
    version: int
    reference: list[ray.ObjectRef[Weights]]  # a list of one: Ray would fetch a bare reference


class WeightStore:
    """Ray actor that holds the newest version and wakes whoever waits for the next."""

    def __init__(self) -> None:
        self._newest: Publication | None = None
        self._life = uuid.uuid4().hex  # so that serials of a restarted store are new ones
        self._count = 0
        self._published = asyncio.Condition()

    async def publish(self, version: int, weights: Weights) -> None:
        """Makes a version the newest one, even when its number is lower than the last."""
        reference = ray.put(weights)
        async with self._published:
            self._count += 1
            self._newest = Publication(f"{self._life}-{self._count}", version, [reference])
            self._published.notify_all()

    async def version(self) -> int | None:
        """The newest version; None when nothing was published since the store started."""
        return None if self._newest is None else self._newest.version

    async def next(self, after: str, timeout_s: float) -> Publication | None:
        """The newest publication if its serial is not `after`, waiting up to `timeout_s`."""
        async with self._published:
            try:
                await asyncio.wait_for(
                    self._published.wait_for(
                        lambda: self._newest is not None and self._newest.serial != after
                    ),
                    timeout_s,
                )
            except TimeoutError:
                return None
            return self._newest


class StoreFeed:
    """`services.weights.WeightFeed` on a store: what a rollout worker is given."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._serial = ""

    async def next(self, timeout_s: float) -> Weights | None:
        """See `WeightFeed`. A store that is being restarted has nothing new yet."""
        try:
            found: Publication | None = await self._store.next.remote(self._serial, timeout_s)
            if found is None:
                return None
            weights: Weights = await found.reference[0]
        except (RayActorError, ObjectLostError):
            await asyncio.sleep(min(_PAUSE_S, timeout_s))
            return None
        self._serial = found.serial
        return weights


def start_store(name: str) -> Any:
    """The run's store: a named Ray actor, started if it is not there yet."""
    return (
        ray.remote(WeightStore)
        .options(name=name, get_if_exists=True, num_cpus=0, max_restarts=-1, max_concurrency=1000)
        .remote()
    )
