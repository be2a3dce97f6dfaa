"""Real faults around the hand-off: clocks that jump, workers that sleep, a Redis that goes away and
comes back, a stranger on the same Redis. Each prompt must still get exactly one result."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import libfaketime
import pytest
from redis.exceptions import RedisError

from services.config import StageConfig
from services.redis_server import EmbeddedRedis, connect
from services.stage import Connection, Stage, consumers_of, new_consumer
from services.streams import Ledger, Streams, claim

ITEMS = 12


async def upper(payload: bytes) -> bytes:
    await asyncio.sleep(0.01)
    return payload.upper()


def worker(connection: Connection, name: str) -> Stage:
    return Stage(
        "test", new_consumer(name), [connection.streams()], "prompts", "rollouts", upper, 2,
        connection.config,
    )  # fmt: skip


async def feed(streams: Streams) -> None:
    payloads = [b"item%d" % i for i in range(ITEMS)]
    await streams.feed(payloads, expected_fed=0, max_in_flight=1000)


async def until_done(streams: Streams) -> Ledger:
    async with asyncio.timeout(30):
        while (ledger := await streams.ledger()).depth["rollouts"] < ITEMS:
            assert ledger.exact
            await asyncio.sleep(0.02)
    return ledger


async def results(streams: Streams) -> list[bytes]:
    return sorted(payload for stream, _, payload in await streams.items() if stream == "rollouts")


async def finish(stages: list[Stage], running: list[asyncio.Task[None]]) -> None:
    """Stops workers in order; raises what one of them died of."""
    for stage in stages:
        stage.stopping.set()
    await asyncio.gather(*running)
    for stage in stages:
        for lane in stage.lanes:
            await lane.redis.aclose()


ONE_EACH = sorted(b"ITEM%d" % i for i in range(ITEMS))


# --------------------------------------------------------------------------- clocks that jump


class WrongClock:
    """A Redis whose clock can be set, as a host's is by an operator or a bad NTP server."""

    def __init__(self, directory: Path) -> None:
        self._offset = directory / "offset"
        self.jump(0)
        library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
        faked = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.server = EmbeddedRedis(directory / "redis")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in faked.items():
                patch.setenv(name, value)
            self.server.start()

    def jump(self, seconds: int) -> None:
        self._offset.write_text(f"{seconds:+d}\n")


@pytest.fixture
def wrong_clock(tmp_path: Path) -> Iterator[WrongClock]:
    clock = WrongClock(tmp_path)
    yield clock
    clock.server.stop()


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_clock_jump_neither_loses_nor_doubles(
    wrong_clock: WrongClock, seconds: int
) -> None:
    """Forward, every lease seems to have run out; back, none will for an hour. Two workers are
    at work, and a third one dies holding items just before the jump."""
    connection = Connection(wrong_clock.server.url, "clock", StageConfig(lease_s=0.4))
    streams = connection.streams()
    await streams.create()
    await feed(streams)
    dead = new_consumer("dead")
    assert len(await claim([streams], "prompts", dead, count=3, block_ms=100)) == 3
    stages = [worker(connection, "a"), worker(connection, "b")]
    running = [asyncio.create_task(stage.run()) for stage in stages]
    wrong_clock.jump(seconds)
    await streams.abandon(consumers_of("dead"))  # as the driver does when it sees a death
    ledger = await until_done(streams)
    assert (ledger.fed, ledger.in_flight, ledger.dead) == (ITEMS, ITEMS, 0)
    assert await results(streams) == ONE_EACH
    await finish(stages, running)
    await streams.redis.aclose()


# ------------------------------------------------------------------------ workers that sleep

_SLEEPER = """
import asyncio, sys
from services.config import StageConfig
from services.stage import Connection, Stage, new_consumer

async def process(payload):
    print("started", flush=True)
    await asyncio.sleep(0.3)
    return payload.upper()

async def main():
    connection = Connection(sys.argv[1], sys.argv[2], StageConfig(lease_s=0.4))
    await Stage("test", new_consumer("sleeper"), [connection.streams()], "prompts", "rollouts",
                process, 2, connection.config).run()

asyncio.run(main())
"""


async def test_a_stopped_worker_that_wakes_after_the_take_over_changes_nothing(
    connection: Connection, streams: Streams
) -> None:
    await feed(streams)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SLEEPER), connection.redis_url, connection.run],
        stdout=subprocess.PIPE,
    )
    try:
        assert sleeper.stdout is not None
        assert (await asyncio.to_thread(sleeper.stdout.readline)) == b"started\n"
        os.kill(sleeper.pid, signal.SIGSTOP)
        other = worker(connection, "other")
        running = asyncio.create_task(other.run())
        await until_done(streams)
        os.kill(sleeper.pid, signal.SIGCONT)
        # Awake, it reports that its items are another's: the sign that it had its say.
        async with asyncio.timeout(15):
            while not any(
                name.startswith("sleeper") and report["lost"]
                for name, report in (await streams.reports()).items()
            ):
                await asyncio.sleep(0.05)
        assert await results(streams) == ONE_EACH
        await finish([other], [running])
    finally:
        sleeper.kill()
        sleeper.communicate()


# -------------------------------------------------------------- a Redis that goes and returns


async def test_work_goes_on_when_redis_returns_within_the_patience(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    connection = Connection(server.url, "run", StageConfig(lease_s=0.4, patience_s=30))
    streams = connection.streams()
    await streams.create()
    await feed(streams)
    stage = worker(connection, "a")
    running = asyncio.create_task(stage.run())
    os.kill(server.pid, signal.SIGKILL)
    while server.running:
        await asyncio.sleep(0.01)
    ledger = asyncio.create_task(streams.ledger())
    await asyncio.sleep(0)
    assert not ledger.done()  # it waits
    server.start()
    assert (await ledger).exact
    await until_done(streams)
    assert await results(streams) == ONE_EACH
    await finish([stage], [running])
    await streams.redis.aclose()
    server.stop()


async def test_past_the_patience_it_says_for_how_long_it_waited(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = connect(server.url, patience_s=0.5)
    await client.ping()
    server.stop()
    started = time.monotonic()
    with pytest.raises(RedisError, match=r"no answer for \d+ s: .*redis\.sock"):
        await client.ping()
    assert 0.5 < time.monotonic() - started < 5  # not multiplied by nested retries
    await client.aclose()


# ---------------------------------------------------------------------- two runs on one Redis


async def test_two_runs_share_one_redis_without_seeing_each_other(
    redis_server: EmbeddedRedis,
) -> None:
    """The same worker names, orders and streams in both; one run loses a worker, and is left."""
    config = StageConfig(lease_s=0.4)
    runs = [Connection(redis_server.url, f"{name}-shared", config) for name in ("one", "two")]
    both = [connection.streams() for connection in runs]
    for streams in both:
        await streams.create()
        await feed(streams)
    await claim(both[:1], "prompts", new_consumer("w"), count=2, block_ms=100)
    stages = [worker(connection, "w") for connection in runs]
    running = [asyncio.create_task(stage.run()) for stage in stages]
    await both[0].abandon(consumers_of("w"))  # also of the live one, whose work is then lost
    for streams in both:
        ledger = await until_done(streams)
        assert (ledger.fed, ledger.in_flight) == (ITEMS, ITEMS)
        assert await results(streams) == ONE_EACH
    await finish(stages, running)
    for streams in both:
        await streams.redis.aclose()
