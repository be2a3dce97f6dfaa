"""The hand-off scripts on a real Redis."""

from __future__ import annotations

import asyncio
import re

import pytest

from services.stage import consumers_of
from services.streams import Claim, Ledger, Streams, claim

LEASE_S = 0.05


async def feed(streams: Streams, *payloads: bytes) -> None:
    fed = (await streams.ledger()).fed
    await streams.feed(payloads, expected_fed=fed, max_in_flight=1000)


async def take(streams: Streams, worker: str = "a", count: int = 10) -> list[Claim]:
    return await claim([streams], "prompts", worker, count=count, block_ms=50)


async def expired(streams: Streams, worker: str, count: int = 10) -> list[Claim]:
    """Takes over, however long it takes until the lease has run out."""
    while not (taken := await streams.take_over("prompts", worker, lease_s=LEASE_S, count=count)):
        pass
    return taken


async def test_an_item_goes_through_all_streams_and_is_counted_once(streams: Streams) -> None:
    await feed(streams, b"x")
    for source, target in (("prompts", "rollouts"), ("rollouts", "verified")):
        (item,) = await claim([streams], source, "w", count=1, block_ms=50)  # type: ignore[arg-type]
        assert await streams.hand_off(item, target, item.payload + b"+")  # type: ignore[arg-type]
        ledger = await streams.ledger()
        assert ledger.exact
        assert ledger.depth[target] == ledger.in_flight == 1
    (item,) = await claim([streams], "verified", "w", count=1, block_ms=50)
    assert item.payload == b"x++"
    assert await streams.settle("verified", [item.id]) == 1
    assert await streams.settle("verified", [item.id]) == 0
    ledger = await streams.ledger()
    assert (ledger.fed, ledger.trained, ledger.in_flight) == (1, 1, 0)


async def test_feeding_is_idempotent(streams: Streams) -> None:
    assert await streams.feed([b"a", b"b"], expected_fed=0, max_in_flight=9) == (2, 2)
    assert await streams.feed([b"a", b"b"], expected_fed=0, max_in_flight=9) == (0, 2)
    assert (await streams.ledger()).depth["prompts"] == 2


async def test_admission_counts_what_is_neither_trained_nor_dead(streams: Streams) -> None:
    assert await streams.feed([b"a", b"b", b"c"], expected_fed=0, max_in_flight=2) == (2, 2)
    assert await streams.feed([b"c"], expected_fed=2, max_in_flight=2) == (0, 2)
    (first, _) = await take(streams)
    await streams.bury(first, "bad")
    assert await streams.feed([b"c", b"d"], expected_fed=2, max_in_flight=2) == (1, 3)
    await streams.advance(consumed=1, step=1)
    assert await streams.feed([b"d", b"e"], expected_fed=3, max_in_flight=2) == (1, 4)


async def test_of_two_workers_with_one_item_the_first_to_finish_wins(streams: Streams) -> None:
    await feed(streams, b"x")
    (slow,) = await take(streams, "slow")
    (fast,) = await expired(streams, "fast")
    assert (fast.id, fast.deliveries) == (slow.id, 2)
    assert await streams.hand_off(fast, "rollouts", b"fast")
    assert not await streams.hand_off(slow, "rollouts", b"slow")
    assert not await streams.bury(slow, "too late")
    ledger = await streams.ledger()
    assert ledger.exact
    assert (ledger.depth["rollouts"], ledger.dead) == (1, 0)


async def test_a_renewed_item_is_not_taken_over(streams: Streams) -> None:
    await feed(streams, b"x", b"y")
    held, dropped = await take(streams, "a")
    while True:  # until the one that is not renewed has been taken over
        assert await streams.renew("prompts", "a", [held.id]) == {held.id}
        taken = await streams.take_over("prompts", "b", lease_s=LEASE_S, count=10)
        if taken:
            break
    assert [item.id for item in taken] == [dropped.id]


async def test_a_heartbeat_cannot_steal_an_item_back(streams: Streams) -> None:
    await feed(streams, b"x")
    (item,) = await take(streams, "stopped")
    await expired(streams, "other")
    assert await streams.renew("prompts", "stopped", [item.id]) == set()
    assert await streams.renew("prompts", "other", [item.id]) == {item.id}


async def test_a_released_item_can_be_taken_at_once_and_keeps_its_failure(
    streams: Streams,
) -> None:
    await feed(streams, b"x")
    (item,) = await take(streams, "a")
    assert await streams.release(item, "a", "what went wrong")
    (again,) = await streams.take_over("prompts", "b", lease_s=3600, count=1)
    assert (again.deliveries, again.last_failure) == (2, "what went wrong")
    assert not await streams.release(item, "a", "no longer ours")


async def test_take_over_finds_items_behind_many_that_are_alive(streams: Streams) -> None:
    await feed(streams, *[b"%d" % i for i in range(200)])
    everything = await take(streams, "a", count=200)
    await streams.release(everything[-1], "a", "")
    (last,) = await streams.take_over("prompts", "b", lease_s=3600, count=1)
    assert last.payload == b"199"


async def test_the_dead_keep_everything_and_can_be_requeued(streams: Streams) -> None:
    await feed(streams, b"x")
    (item,) = await take(streams)
    assert await streams.bury(item, "reason", "traceback")
    (dead,) = await streams.dead()
    assert (dead.stream, dead.reason, dead.detail, dead.payload) == (
        "prompts", "reason", "traceback", b"x",
    )  # fmt: skip
    assert (await streams.ledger()).exact
    assert await streams.requeue(dead)
    assert not await streams.requeue(dead)
    ledger = await streams.ledger()
    assert ledger.exact
    assert (ledger.depth["prompts"], ledger.dead) == (1, 0)


async def test_what_a_consumer_holds_is_its_replay_log(streams: Streams) -> None:
    await feed(streams, b"x", b"y")
    claimed = await take(streams, "learner")
    assert [c.payload for c in await streams.held("prompts", "learner")] == [b"x", b"y"]
    await streams.settle("prompts", [claimed[0].id])
    assert [c.payload for c in await streams.held("prompts", "learner")] == [b"y"]
    assert await streams.held("prompts", "other") == []


async def test_lanes_and_runs_do_not_meet(streams: Streams) -> None:
    other = Streams(streams.redis, streams.run, lane="eval")
    await other.create()
    await feed(other, b"eval")
    assert await take(streams) == []
    both = await claim([other, streams], "prompts", "w", count=5, block_ms=50)
    assert [(c.payload, c.lane) for c in both] == [(b"eval", other)]
    assert (await streams.ledger()).fed == 0


async def test_every_key_is_in_one_cluster_slot(streams: Streams) -> None:
    await feed(streams, b"x")
    keys: list[bytes] = [k async for k in streams.redis.scan_iter(f"scope:*{streams.run}*")]
    assert keys
    tag = f"{{{streams.run}}}".encode()
    assert all(tag in key for key in keys)


async def test_hand_offs_at_once_go_together_and_each_has_its_own_answer(streams: Streams) -> None:
    await feed(streams, b"a", b"b", b"c", b"d")
    items = await take(streams)
    assert await streams.bury(items[1], "gone meanwhile")
    calls_before = await _script_calls(streams)
    moved = await asyncio.gather(
        *[streams.hand_off(item, "rollouts", item.payload * 2) for item in items]
    )
    assert moved == [True, False, True, True]
    assert await _script_calls(streams) - calls_before == 2  # the first, then the three that waited
    out = await claim([streams], "rollouts", "w", count=9, block_ms=50)
    assert sorted(item.payload for item in out) == [b"aa", b"cc", b"dd"]


async def _script_calls(streams: Streams) -> int:
    stats = await streams.redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


async def test_what_a_dead_worker_held_is_free_at_once(streams: Streams) -> None:
    await feed(streams, b"a", b"b", b"c")
    mine, dead = "r-1-0123abcd", "r-11-0123abcd"
    (kept,) = await take(streams, mine, count=1)
    await take(streams, dead)
    await streams.report(dead, {"stage": "r"})
    assert await streams.abandon(consumers_of("r-11")) == 2
    assert await streams.reports() == {}
    taken = await streams.take_over("prompts", "heir", lease_s=3600, count=9)
    assert [item.deliveries for item in taken] == [2, 2]
    assert await streams.hand_off(kept, "rollouts", b"A")


async def test_what_was_freed_before_stays_free_when_all_are_dead(streams: Streams) -> None:
    """A worker died, then the driver did before anybody took the worker's items over."""
    await feed(streams, b"a", b"b")
    await take(streams, "first-0123abcd", count=1)
    await streams.abandon(consumers_of("first"))
    await take(streams, "second-0123abcd", count=1)
    for _ in range(2):  # a resumed run may itself be resumed
        await streams.abandon(re.compile(".*"))
    taken = await streams.take_over("prompts", "heir", lease_s=3600, count=9)
    assert sorted(item.payload for item in taken) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("scored", "rollouts", "slowest"),
    [
        (40, 8, "rollouts"),  # the learner has used all 40: they wait for a checkpoint
        (47, 8, "rollouts"),  # 7 are no step of 8
        (48, 8, "scored"),
        (47, 0, "scored"),  # the last step is a small one
    ],
)
def test_what_steps_have_used_is_not_waited_for(scored: int, rollouts: int, slowest: str) -> None:
    ledger = Ledger(
        fed=100 + scored + rollouts,
        trained=100,
        consumed=140,
        dead=0,
        step=17,
        depth={"prompts": 0, "rollouts": rollouts, "verified": 0, "scored": scored},
        age_s={
            "prompts": 0.0,
            "rollouts": 60.0 if rollouts else 0.0,
            "verified": 0.0,
            "scored": 900.0,
        },
    )
    assert ledger.exact
    assert ledger.slowest(8) == slowest
