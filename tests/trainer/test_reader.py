"""The learner's end of the scored stream on a real Redis, with crashes in between."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.stage import Connection
from services.streams import Claim, Streams, claim
from services.trajectory import Prompt, ScoredGroup, decode, encode
from tests.builders import VOCAB, scored_group
from tests.waiting import DEADLINE_S, until, wait_until
from trainer.checkpoint import Progress, ranges
from trainer.reader import GroupReader, HistoryGap, LoopThread, Stalled, Taken


async def put(streams: Streams, *groups: ScoredGroup | bytes) -> None:
    """Lets groups arrive on the scored stream as the teacher stage leaves them."""
    fed = (await streams.ledger()).fed
    payloads = [g if isinstance(g, bytes) else encode(g) for g in groups]
    await streams.feed(payloads, expected_fed=fed, max_in_flight=1000)
    for item in await claim([streams], "prompts", "w", count=len(groups), block_ms=100):
        await streams.hand_off(item, "scored", item.payload)


def reader(
    connection: Connection,
    *,
    total: int,
    timeout_s: float = DEADLINE_S,
    max_staleness: int | None = 1,
) -> GroupReader:
    return GroupReader(
        connection,
        need="incorrect",
        vocabulary=VOCAB,
        groups_per_step=2,
        max_staleness=max_staleness,
        total=total,
        timeout_s=timeout_s,
    )


def orders(step: list[Taken]) -> list[int]:
    return [item.group.prompt.order for item in step]


def claims(step: list[Taken]) -> list[Claim]:
    return [item.claim for item in step]


def group(order: int) -> ScoredGroup:
    return scored_group(["correct", "incorrect"], order=order)


async def test_full_steps_then_a_short_one_then_the_end(
    connection: Connection, streams: Streams
) -> None:
    await put(streams, *[group(i) for i in range(3)])
    source = reader(connection, total=3)
    await source.start(None)
    sizes = []
    while step := await source.next_step(len(sizes)):
        sizes.append(len(step))
        await source.trained(len(sizes), claims(step), orders(step))
    assert sizes == [2, 1]
    ledger = await streams.ledger()
    assert (ledger.consumed, ledger.trained, ledger.step) == (3, 0, 2)
    await source.settle(list(source.unsettled))
    assert (await streams.ledger()).trained == 3
    assert (await streams.ledger()).exact


def test_the_next_step_is_read_while_the_learner_computes(connection: Connection) -> None:
    """Nobody waits for anything between the two steps, and the groups come in all the same."""
    with LoopThread() as background, background.holding(reader(connection, total=4)) as source:
        background.run(source.start(None))
        background.run(put(source.streams, *[group(i) for i in range(4)]))
        first = background.run(source.next_step(0))
        wait_until(lambda: len(source._ready) >= 2)  # "computing"
        assert sorted(source._ready) == [2, 3]
        background.run(source.trained(1, claims(first), orders(first)))
        assert orders(background.run(source.next_step(1))) == [2, 3]


async def test_what_no_checkpoint_contains_is_replayed(
    connection: Connection, streams: Streams
) -> None:
    await put(streams, *[group(i) for i in range(4)])
    async with reader(connection, total=4) as before:
        await before.start(None)
        first = await before.next_step(0)
        await before.trained(1, claims(first), orders(first))
        saved = Progress(1, list(before.unsettled), ranges(before.covered))  # durable, then kill -9
        second = await before.next_step(1)
        await before.trained(2, claims(second), orders(second))

    after = reader(connection, total=4)
    await after.start(saved)
    assert after.consumed == 2
    assert orders(await after.next_step(1)) == orders(second)
    ledger = await streams.ledger()
    assert (ledger.trained, ledger.consumed, ledger.step) == (2, 2, 1)


async def test_a_checkpoint_that_redis_is_ahead_of_is_refused(
    connection: Connection, streams: Streams
) -> None:
    await put(streams, *[group(i) for i in range(2)])
    before = reader(connection, total=2)
    await before.start(None)
    step = await before.next_step(0)
    await before.trained(1, claims(step), orders(step))
    await before.settle(list(before.unsettled))
    with pytest.raises(HistoryGap, match=r"Redis has 2 trained prompts, .* continued 0"):
        await reader(connection, total=2).start(None)


async def test_a_group_that_must_not_be_trained_on_is_buried(
    connection: Connection, streams: Streams
) -> None:
    poisoned = group(0)
    poisoned.teacher_logprobs[1][0] = np.nan
    await put(streams, poisoned, b"not an item", group(2))
    source = reader(connection, total=3)
    await source.start(None)
    assert orders(await source.next_step(0)) == [2]
    reasons = sorted(d.reason for d in await streams.dead())
    assert "teacher log-probs of trajectory 1: not finite" in reasons[1]
    assert "not a record" in reasons[0]


async def test_waiting_has_a_deadline_and_says_where_the_items_are(
    connection: Connection, streams: Streams
) -> None:
    await streams.feed([b"x"], expected_fed=0, max_in_flight=9)
    source = reader(connection, total=2, timeout_s=0.2)
    await source.start(None)
    told = r"for 2 scored groups and has 0; .* of prompt 0: fed 1.*prompts 1 \(oldest"
    with pytest.raises(Stalled, match=told):
        await source.next_step(0)


async def test_the_clock_starts_with_the_first_prompt(
    connection: Connection, streams: Streams
) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    async with reader(connection, total=2, timeout_s=0.0) as source:
        await source.start(None)
        step = asyncio.create_task(source.next_step(0, look))
        await until(lambda: looks >= 3 or step.done())  # engines start, the student is evaluated
        assert not step.done()
        await streams.feed([b"x"], expected_fed=0, max_in_flight=9)
        with pytest.raises(Stalled, match="fed 1"):
            await step


async def test_a_group_that_others_overtook_is_waited_for(
    connection: Connection, streams: Streams
) -> None:
    async with reader(connection, total=4, timeout_s=0.0) as source:
        await source.start(None)
        await put(streams, *[group(i) for i in (1, 3, 2)])
        await until(lambda: len(source._ready) == 3)
        with pytest.raises(Stalled, match="the first that is missing is of prompt 0"):
            await source.next_step(0)
        await put(streams, group(0))
    async with reader(connection, total=4) as source:
        await source.start(None)
        assert orders(await source.next_step(0)) == [0, 1]


@pytest.mark.parametrize("max_staleness", [0, None])
async def test_a_group_that_is_too_old_is_sampled_again_where_the_sampler_changes(
    max_staleness: int | None, connection: Connection, streams: Streams
) -> None:
    await put(streams, group(0), group(1))
    made = reader(connection, total=2, timeout_s=0.0, max_staleness=max_staleness)
    async with made as source:
        await source.start(None)
        await until(lambda: len(source._ready) == 2)
        if max_staleness is None:
            assert orders(await source.next_step(4)) == [0, 1]
        else:
            with pytest.raises(Stalled):
                await source.next_step(4)
            sent = await claim([streams], "prompts", "w", count=9, block_ms=100)
            assert [decode(Prompt, item.payload).min_weight_version for item in sent] == [4, 4]
