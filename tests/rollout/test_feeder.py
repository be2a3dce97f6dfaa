"""Admission against a real Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.config import DataConfig, SamplingConfig
from rollout.feeder import Feeder
from rollout.prompts import PromptSource, Row
from services.stage import Connection
from services.streams import Streams, claim
from services.tasks import end
from services.trajectory import Prompt, decode
from tests.waiting import DEADLINE_S

SOURCE = PromptSource(
    [Row(np.array([i], np.int32), "test", str(i)) for i in range(20)],
    SamplingConfig(n=2, max_tokens=4),
    seed=0,
    data=DataConfig(path=Path("x.jsonl"), max_prompt_tokens=4, epochs=2),
)


def feeder(
    connection: Connection, *, total: int = 40, groups_per_step: int = 3, max_staleness: int = 1
) -> Feeder:
    return Feeder(
        connection,
        SOURCE,
        total=total,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
    )


async def take(streams: Streams, count: int = 100) -> list[Prompt]:
    """Takes what is there, as the learner at the far end would."""
    claims = await claim([streams], "prompts", "learner", count=count, block_ms=100)
    ledger = await streams.ledger()
    await streams.settle("prompts", [item.id for item in claims])
    await streams.advance(consumed=ledger.consumed + len(claims), step=0)
    return [decode(Prompt, item.payload) for item in claims]


async def until_fed(streams: Streams, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await streams.ledger()).fed < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fixed", [False, True])
async def test_any_weights_will_do_where_the_sampler_never_changes(
    fixed: bool, connection: Connection, streams: Streams
) -> None:
    made = Feeder(
        connection, SOURCE, total=9, groups_per_step=3, max_staleness=0, fixed_sampler=fixed
    )
    running = asyncio.create_task(made.run())
    taken: list[Prompt] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(taken) < 9:
            taken += await take(streams)
        await running
    wanted = [0] * 9 if fixed else [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [prompt.min_weight_version for prompt in taken] == wanted


async def test_all_prompts_are_fed_in_order_within_the_budget(
    connection: Connection, streams: Streams
) -> None:
    running = asyncio.create_task(feeder(connection).run())
    taken: list[Prompt] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(taken) < 40:
            ledger = await streams.ledger()
            assert ledger.in_flight <= 6
            taken += await take(streams, count=4)
        await running
    assert [p.order for p in taken] == list(range(40))
    assert [p.id for p in taken] == [SOURCE.prompt(order).id for order in range(40)]
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.in_flight, ledger.exact) == (40, 0, True)


async def test_a_full_budget_is_waited_for(connection: Connection, streams: Streams) -> None:
    running = asyncio.create_task(feeder(connection).run())
    await until_fed(streams, 6)
    with pytest.raises(TimeoutError):  # some polls later it has still not fed more
        await asyncio.wait_for(asyncio.shield(running), 0.25)
    assert (await streams.ledger()).fed == 6
    await end([running])


async def test_a_restarted_feeder_feeds_nothing_twice(
    connection: Connection, streams: Streams
) -> None:
    taken: list[Prompt] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(taken) < 30:
            killed = asyncio.create_task(feeder(connection).run())
            taken += await take(streams)
            killed.cancel()
        # Two at once, as when the old one was only believed to be dead.
        both = asyncio.gather(feeder(connection).run(), feeder(connection).run())
        while len(taken) < 40:
            taken += await take(streams)
        await both
    assert [p.order for p in taken] == list(range(40))


async def test_the_dead_make_room(connection: Connection, streams: Streams) -> None:
    running = asyncio.create_task(feeder(connection, total=8).run())
    await until_fed(streams, 6)
    for item in await claim([streams], "prompts", "worker", count=2, block_ms=100):
        await streams.bury(item, "broken")
    await asyncio.wait_for(running, DEADLINE_S)
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.dead, ledger.in_flight) == (8, 2, 6)


async def test_it_ends_at_its_total(connection: Connection, streams: Streams) -> None:
    made = feeder(connection, total=5, groups_per_step=100)
    await asyncio.wait_for(made.run(), DEADLINE_S)
    assert (await streams.ledger()).fed == 5
    await asyncio.wait_for(made.run(), DEADLINE_S)  # nothing is left to do
    entries: Any = await streams.redis.xlen(streams.key("prompts"))
    assert entries == 5
