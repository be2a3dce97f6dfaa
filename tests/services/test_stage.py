"""The loop of every worker: what becomes of an item when its work goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from services.config import StageConfig
from services.errors import BadItem, PatienceExceeded, Unavailable, WireError
from services.stage import BusyTime, Stage
from services.streams import Ledger, StreamName, Streams
from tests.waiting import DEADLINE_S
from tests.waiting import until as until_true

Process = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def working(
    streams: Streams, process: Process, *, consumer: str = "w", capacity: int = 4, **config: float
) -> AsyncIterator[Stage]:
    settings = StageConfig(**{"lease_s": 2.0, "patience_s": DEADLINE_S, **config})  # type: ignore[arg-type]
    stage = Stage("test", consumer, [streams], "prompts", "rollouts", process, capacity, settings)
    task = asyncio.create_task(stage.run())
    try:
        yield stage
    finally:
        stage.stopping.set()
        await asyncio.wait({task}, timeout=DEADLINE_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(streams: Streams, condition: Callable[[Ledger], bool]) -> Ledger:
    async with asyncio.timeout(DEADLINE_S):
        while not condition(ledger := await streams.ledger()):
            assert ledger.exact
            await asyncio.sleep(0.01)
    return ledger


async def feed(streams: Streams, *payloads: bytes) -> None:
    await streams.feed(payloads, expected_fed=0, max_in_flight=1000)


async def upper(payload: bytes) -> bytes:
    return payload.upper()


async def test_items_are_worked_on_and_handed_on(streams: Streams) -> None:
    await feed(streams, *[b"item%d" % i for i in range(20)])
    async with working(streams, upper):
        await until(streams, lambda ledger: ledger.depth["rollouts"] == 20)
    entries = await streams.redis.xrange(streams.key("rollouts"))
    assert {fields[b"item"] for _, fields in entries} == {b"ITEM%d" % i for i in range(20)}


async def test_capacity_bounds_what_is_worked_on_at_once(streams: Streams) -> None:
    now, most = 0, 0

    async def process(payload: bytes) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return payload

    await feed(streams, *[b"x"] * 12)
    async with working(streams, process, capacity=3):
        await until(streams, lambda ledger: ledger.depth["rollouts"] == 12)
    assert most == 3


@pytest.mark.parametrize("error", [BadItem("too long"), WireError("checksum")])
async def test_an_item_that_can_never_succeed_is_buried_at_once(
    streams: Streams, error: Exception
) -> None:
    calls = 0

    async def process(payload: bytes) -> bytes:
        nonlocal calls
        calls += 1
        raise error

    await feed(streams, b"x")
    async with working(streams, process):
        await until(streams, lambda ledger: ledger.dead == 1)
    (dead,) = await streams.dead()
    assert dead.reason == f"test: {error}"
    assert calls == 1


async def test_an_item_that_breaks_the_stage_three_times_is_buried_with_its_traceback(
    streams: Streams,
) -> None:
    calls = 0

    async def process(payload: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if payload == b"poison":
            raise ZeroDivisionError("on the third line")
        return payload

    await feed(streams, b"poison", b"good")
    async with working(streams, process):
        await until(streams, lambda ledger: ledger.dead == 1 and ledger.depth["rollouts"] == 1)
    (dead,) = await streams.dead()
    assert dead.reason == "test: ZeroDivisionError: on the third line"
    assert "Traceback" in dead.detail
    assert calls == 4


async def test_an_unavailable_dependency_is_waited_for_visibly(streams: Streams) -> None:
    up = asyncio.Event()

    async def process(payload: bytes) -> bytes:
        if not up.is_set():
            raise Unavailable("teacher at http://t said 503")
        return payload

    await feed(streams, b"x")
    async with working(streams, process):
        async with asyncio.timeout(DEADLINE_S):
            while "503" not in (await streams.reports()).get("w", {}).get("waiting_for", ""):
                await asyncio.sleep(0.01)
        assert (await streams.ledger()).dead == 0
        up.set()
        await until(streams, lambda ledger: ledger.depth["rollouts"] == 1)


async def test_past_its_patience_the_worker_stops_and_the_item_stays(streams: Streams) -> None:
    async def process(payload: bytes) -> bytes:
        raise Unavailable("teacher said 503")

    await feed(streams, b"x")
    stage = Stage(
        "test", "w", [streams], "prompts", "rollouts", process, 1,
        StageConfig(lease_s=0.4, patience_s=0.3),
    )  # fmt: skip
    with pytest.raises(PatienceExceeded, match="teacher said 503"):
        async with asyncio.timeout(DEADLINE_S):
            await stage.run()
    ledger = await streams.ledger()
    assert (ledger.depth["prompts"], ledger.dead) == (1, 0)


async def test_a_dead_workers_items_are_taken_over(streams: Streams) -> None:
    async def hang(payload: bytes) -> bytes:
        await asyncio.Event().wait()
        return payload

    await feed(streams, b"x", b"y")
    stage = Stage(
        "test", "dying", [streams], "prompts", "rollouts", hang, 2, StageConfig(lease_s=0.4)
    )
    dying = asyncio.create_task(stage.run())
    async with asyncio.timeout(DEADLINE_S):
        while len(stage._working) < 2:
            await asyncio.sleep(0.01)
    dying.cancel()  # its heartbeat stops with it, as if the process were gone
    await asyncio.gather(dying, return_exceptions=True)
    async with working(streams, upper, consumer="heir"):
        await until(streams, lambda ledger: ledger.depth["rollouts"] == 2)


async def test_long_work_keeps_its_lease(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three leases long, beside an idle worker that would take over what is not renewed."""
    calls, renewals, renew = 0, 0, streams.renew

    async def counted(stream: StreamName, consumer: str, ids: Sequence[str]) -> set[str]:
        nonlocal renewals
        renewals += bool(ids)
        return await renew(stream, consumer, ids)

    async def process(payload: bytes) -> bytes:
        nonlocal calls
        calls += 1
        await until_true(lambda: renewals > 3 * 4)  # four a lease
        return payload

    monkeypatch.setattr(streams, "renew", counted)
    await feed(streams, b"x")
    async with working(streams, process, consumer="a"), working(streams, process, consumer="b"):
        await until(streams, lambda ledger: ledger.depth["rollouts"] == 1)
    assert calls == 1


async def test_a_stopping_worker_finishes_what_it_holds(streams: Streams) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def process(payload: bytes) -> bytes:
        started.set()
        await go.wait()
        return payload

    await feed(streams, b"x")
    async with working(streams, process) as stage:
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        stage.stopping.set()
        go.set()
    assert (await streams.ledger()).depth["rollouts"] == 1


async def test_nothing_of_a_stopped_worker_lives_on(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its heartbeat does not notice the first cancellation."""
    at_it = asyncio.Event()

    async def swallow(*_: object) -> None:
        at_it.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            monkeypatch.undo()  # as Redis' client, once

    monkeypatch.setattr(streams, "report", swallow)
    before = asyncio.all_tasks()
    async with working(streams, upper):
        await asyncio.wait_for(at_it.wait(), DEADLINE_S)
    assert asyncio.all_tasks() == before


def test_work_that_overlaps_is_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("services.stage.time.monotonic", lambda: now)
    busy = BusyTime()
    with busy:
        now = 103.0
        with busy:
            now = 104.0
        now = 105.0
        assert busy.seconds == 5.0  # the piece that is worked on counts
    now = 200.0
    with busy:
        now = 201.0
    assert busy.seconds == 6.0
