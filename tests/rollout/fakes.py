"""Stand-ins for what the rollout room gets from Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from services.weights import Weights


class Method:
    """What a Ray actor handle has for each of the actor's methods."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class FakeWeightStore:
    """`services.weight_store.WeightStore` in this process: same rules, no Ray."""

    def __init__(self) -> None:
        self.newest = Method(self._newest)
        self.failure: Exception | None = None
        self._weights: Weights | None = None
        self._published = asyncio.Condition()

    async def publish(self, weights: Weights) -> None:
        async with self._published:
            self._weights = weights
            self._published.notify_all()

    async def break_down(self, failure: Exception) -> None:
        """From now on every request fails, those that wait included."""
        async with self._published:
            self.failure = failure
            self._published.notify_all()

    async def _newest(
        self, have: int, timeout_s: float
    ) -> tuple[int, list[Awaitable[Weights]]] | None:
        async with self._published:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._published.wait_for(
                        lambda: (
                            self.failure is not None
                            or (self._weights is not None and self._weights.version != have)
                        )
                    )
            except TimeoutError:
                return None
        if self.failure is not None:
            raise self.failure
        assert self._weights is not None
        reference: asyncio.Future[Weights] = asyncio.get_running_loop().create_future()
        reference.set_result(self._weights)
        return self._weights.version, [reference]
