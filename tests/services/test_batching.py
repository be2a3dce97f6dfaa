from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from services.batching import Batcher
from tests.waiting import DEADLINE_S, until


class Recording:
    """Doubles numbers, and remembers the batches; `gate` holds the first one back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.gate.wait(DEADLINE_S)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * i for i in items]


async def started(run: Recording) -> None:
    await until(lambda: run.batches, every_s=0.001)


async def test_what_waits_goes_together_up_to_the_budget() -> None:
    run = Recording()
    batcher = Batcher(run, cost=lambda i: i, budget=10)
    first = asyncio.create_task(batcher.submit(1))
    await started(run)
    rest = [asyncio.create_task(batcher.submit(i)) for i in (4, 5, 2, 20, 3)]
    await asyncio.sleep(0)
    run.gate.set()
    assert await asyncio.gather(first, *rest) == [2, 8, 10, 4, 40, 6]
    assert run.batches == [[1], [4, 5], [2], [20], [3]]


async def test_an_error_reaches_everyone_in_the_batch_and_no_one_else() -> None:
    run = Recording()
    run.gate.set()
    batcher = Batcher(run, cost=lambda _: 1, budget=2)
    results = await asyncio.gather(*[batcher.submit(i) for i in (13, 1, 2)], return_exceptions=True)
    assert [type(r) for r in results] == [ValueError, ValueError, int]
    assert await batcher.submit(4) == 8


async def test_a_cancelled_caller_frees_its_place() -> None:
    run = Recording()
    batcher = Batcher(run, cost=lambda _: 1, budget=8)
    first = asyncio.create_task(batcher.submit(1))
    await started(run)
    gone, stays = (asyncio.create_task(batcher.submit(i)) for i in (2, 3))
    await asyncio.sleep(0)
    gone.cancel()
    run.gate.set()
    assert await asyncio.gather(first, stays) == [2, 6]
    assert run.batches == [[1], [3]]
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_an_action_runs_between_batches() -> None:
    run = Recording()
    batcher = Batcher(run, cost=lambda _: 1, budget=8)
    first = asyncio.create_task(batcher.submit(1))
    await started(run)
    done: list[int] = []
    action = asyncio.create_task(batcher.between_batches(lambda: done.append(7)))
    await asyncio.sleep(0.01)
    assert not done
    run.gate.set()
    await action
    assert done == [7]
    assert await first == 2
