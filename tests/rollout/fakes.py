"""Stand-ins for what the rollout room gets from Ray."""

from __future__ import annotations

import asyncio

from services.weights import Weights


class FakeWeightStore:
    """`services.weight_store.WeightStore` in this process: same rules, no Ray."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.weights: Weights | None = None
        self.count = 0
        self.published = asyncio.Condition()

    async def publish(self, weights: Weights) -> None:
        async with self.published:
            self.weights = weights
            self.count += 1
            self.published.notify_all()

    async def break_down(self, failure: Exception) -> None:
        """From now on every request fails, those that wait included."""
        async with self.published:
            self.failure = failure
            self.published.notify_all()

    def feed(self) -> FakeFeed:
        return FakeFeed(self)


class FakeFeed:
    """One worker's `services.weights.WeightFeed`."""

    def __init__(self, store: FakeWeightStore) -> None:
        self._store = store
        self._seen = 0

    async def next(self, timeout_s: float) -> Weights | None:
        store = self._store
        async with store.published:
            try:
                async with asyncio.timeout(timeout_s):
                    await store.published.wait_for(
                        lambda: store.failure is not None or store.count > self._seen
                    )
            except TimeoutError:
                return None
        if store.failure is not None:
            raise store.failure
        self._seen = store.count
        return store.weights
