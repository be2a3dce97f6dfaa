"""The weights' way back: the learner publishes a version, every engine waits for the next.

The weights lie in the Ray object store and are read there without a copy, once by each node.
The store owns them, not the learner, so the last version outlives the learner that made it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from services.weights import Weights

KEEP = 2  # versions held: the newest, and the one that a slow engine may still be reading


class WeightStore:
    """Ray actor that holds the newest versions and wakes whoever waits for the next."""

    def __init__(self) -> None:
        self._versions: dict[int, ray.ObjectRef[Weights]] = {}
        self._published = asyncio.Condition()

    async def publish(self, version: int, weights: Weights) -> None:
        """Makes a version current, and the newest one even when its number is lower: a learner
        that went back to a checkpoint publishes again from there."""
        reference = ray.put(weights)
        async with self._published:
            for old in [v for v in self._versions if v > version or v <= version - KEEP]:
                del self._versions[old]
            self._versions[version] = reference
            self._published.notify_all()

    async def newest(
        self, have: int, timeout_s: float
    ) -> tuple[int, list[ray.ObjectRef[Weights]]] | None:
        """The newest version if it is another than `have`, waiting up to `timeout_s` for one.
        The reference comes in a list of one: Ray would resolve a bare one."""
        async with self._published:
            try:
                await asyncio.wait_for(
                    self._published.wait_for(lambda: max(self._versions, default=have) != have),
                    timeout_s,
                )
            except TimeoutError:
                return None
            version = max(self._versions)
            return version, [self._versions[version]]


def start_store(name: str) -> Any:
    """The run's store: a named Ray actor, started if it is not there yet."""
    return (
        ray.remote(WeightStore)
        .options(name=name, get_if_exists=True, num_cpus=0, max_restarts=-1, max_concurrency=1000)
        .remote()
    )
