"""Turns many concurrent calls into few large batches on one thread.

Engines that work in batches (the transformers sampler, the packed scorer) are called one item
at a time by many coroutines. `Batcher` gathers what waits, up to a budget, runs it on a thread of
its own, and gives each caller its own result. A caller that is cancelled frees its place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Gathers concurrent `submit` calls into batches of at most `budget` cost.

    Args:
        run: works on one batch, on the batcher's thread; one result an item, in order.
        cost: what an item takes of the budget. An item over the budget makes its own batch.
        budget: the most that one batch may cost.
        linger_s: how long an incomplete batch waits for company. Batches also grow by themselves
            while the one before runs, so 0 is right under load.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        *,
        cost: Callable[[ItemT], float],
        budget: float,
        linger_s: float = 0.0,
    ) -> None:
        self._run = run
        self._cost = cost
        self._budget = budget
        self._linger_s = linger_s
        self._waiting: deque[tuple[ItemT, asyncio.Future[ResultT]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, item: ItemT) -> ResultT:
        """This item's result; an error of its batch is raised for every item in it."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return await future

    async def between_batches(self, action: Callable[[], None]) -> None:
        """Runs `action` on the same thread, so that no batch runs meanwhile."""
        await asyncio.get_running_loop().run_in_executor(self._thread, action)

    def close(self) -> None:
        """Lets the thread end after the batch it is working on."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(self._linger_s)
            batch = self._next_batch()
            if not batch:
                continue
            work = loop.run_in_executor(self._thread, self._run, [item for item, _ in batch])
            await asyncio.wait({work})
            error = work.exception()
            for index, (_, future) in enumerate(batch):
                if future.done():
                    continue
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(work.result()[index])

    def _next_batch(self) -> list[tuple[ItemT, asyncio.Future[ResultT]]]:
        batch: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        spent = 0.0
        while self._waiting:
            item, future = self._waiting[0]
            if not future.done():
                spent += self._cost(item)
                if batch and spent > self._budget:
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch
