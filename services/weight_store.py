"""The weights' way back: the learner publishes a version, every engine waits for the next.

The weights themselves lie in the Ray object store, read once by each node; this actor only
holds the references.
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
        self._versions: dict[int, list[ray.ObjectRef[Weights]]] = {}
        self._published = asyncio.Condition()

    async def publish(self, version: int, refs: list[ray.ObjectRef[Weights]]) -> None:
        """Makes a version current. `refs` is a list of one: a bare reference would be fetched."""
        async with self._published:
            self._versions[version] = refs
            for old in sorted(self._versions)[:-KEEP]:
                del self._versions[old]
            self._published.notify_all()

    async def newest(
        self, after: int, timeout_s: float
    ) -> tuple[int, list[ray.ObjectRef[Weights]]] | None:
        """The newest version if it is newer than `after`, waiting up to `timeout_s` for one."""
        async with self._published:
            try:
                await asyncio.wait_for(
                    self._published.wait_for(lambda: max(self._versions, default=-1) > after),
                    timeout_s,
                )
            except TimeoutError:
                return None
            version = max(self._versions)
            return version, self._versions[version]


def start_store(name: str) -> Any:
    """The run's store, started if it is not there yet (a detached-by-name Ray actor)."""
    return (
        ray.remote(WeightStore)
        .options(name=name, get_if_exists=True, num_cpus=0, max_restarts=-1, max_concurrency=1000)
        .remote()
    )
