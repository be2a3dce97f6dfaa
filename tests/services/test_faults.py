"""Real faults around the hand-off: clocks that jump, workers that sleep, a Redis that goes away and
comes back, a stranger on the same Redis. Each prompt must still get exactly one result."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import libfaketime
import pytest
import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from services.config import StageConfig
from services.redis_server import EmbeddedRedis, RedisTakesNothing, connect, trouble
from services.stage import Connection, Stage, consumers_of, new_consumer
from services.streams import Ledger, Streams, claim
from tests.waiting import DEADLINE_S, until

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
    async with asyncio.timeout(DEADLINE_S):
        while (ledger := await streams.ledger()).depth["rollouts"] < ITEMS:
            assert ledger.exact
            await asyncio.sleep(0.02)
    return ledger


async def results(streams: Streams) -> list[bytes]:
    return sorted(payload for stream, _, payload in await streams.items() if stream == "rollouts")


async def finish(stages: list[Stage], running: list[asyncio.Task[None]]) -> None:
    """Stops workers in order; raises what one of them died of."""
    async with AsyncExitStack() as resources:
        for stage in stages:
            stage.stopping.set()
            for lane in stage.lanes:
                await resources.enter_async_context(lane)
        await asyncio.gather(*running)


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
    async with connection.streams() as streams:
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
        async with asyncio.timeout(DEADLINE_S):
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
    connection = Connection(server.url, "run", StageConfig(lease_s=0.4, patience_s=DEADLINE_S))
    async with connection.streams() as streams:
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
    server.stop()


async def test_past_the_patience_it_says_for_how_long_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = connect(server.url, patience_s=0.5)
    await client.ping()
    server.stop()
    pauses: list[float] = []
    compute = ExponentialBackoff.compute

    def counted(self: ExponentialBackoff, failures: int) -> float:
        pauses.append(compute(self, failures))
        return pauses[-1]

    monkeypatch.setattr(ExponentialBackoff, "compute", counted)
    with pytest.raises(RedisError, match=r"waited \d+ s for Redis: .*redis\.sock"):
        await client.ping()
    assert pauses and sum(pauses[:-1]) <= 0.5  # not multiplied by nested retries
    await client.aclose()


# ---------------------------------------------------------------------- two runs on one Redis


async def test_two_runs_share_one_redis_without_seeing_each_other(
    redis_server: EmbeddedRedis,
) -> None:
    """The same worker names, orders and streams in both; one run loses a worker, and is left."""
    config = StageConfig(lease_s=0.4)
    runs = [Connection(redis_server.url, f"{name}-shared", config) for name in ("one", "two")]
    async with AsyncExitStack() as resources:
        both = [await resources.enter_async_context(one.streams()) for one in runs]
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


async def test_a_full_redis_is_waited_for_while_leases_are_renewed(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    asked = redis.Redis.from_url(server.url)
    going_on = asyncio.Event()

    async def when_told(payload: bytes) -> bytes:
        await going_on.wait()
        return payload

    def refused() -> int:
        told = asked.info("errorstats").get("errorstat_OOM", {})  # type: ignore[union-attr]
        return int(told.get("count", 0))

    async with connect(server.url, patience_s=DEADLINE_S) as client:
        streams = Streams(client, "full")
        await streams.create()
        await streams.feed([b"item"], expected_fed=0, max_in_flight=9)
        stage = Stage(
            "upper", "w", [streams], "prompts", "rollouts", when_told, 1, StageConfig(lease_s=0.4)
        )
        working = asyncio.create_task(stage.run())
        await until(lambda: stage._working)
        asked.config_set("maxmemory", "500kb")
        feeding = asyncio.create_task(
            streams.feed([b"x" * 1000] * 4, expected_fed=1, max_in_flight=9)
        )
        await until(lambda: refused() >= 4)
        assert not feeding.done()
        assert "it is full: it uses" in trouble(server.url)
        assert "of a maxmemory of 500.00KB; raise it" in trouble(server.url)
        renewals = "cmdstat_xclaim"
        before = asked.info("commandstats")[renewals]["calls"]  # type: ignore[index]
        await until(
            lambda: asked.info("commandstats")[renewals]["calls"] > before + 4  # type: ignore[index]
        )
        asked.config_set("maxmemory", "0")
        assert await feeding == (4, 5)
        assert trouble(server.url) == ""
        going_on.set()
        stage.stopping.set()
        await working
        assert (await streams.ledger()).exact
        assert not await streams.dead()
    asked.close()
    server.stop()


async def test_past_its_patience_a_full_redis_is_one_sentence(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    async with connect(server.url, patience_s=0.1) as client:
        await client.config_set("maxmemory", "500kb")
        with pytest.raises(
            RedisTakesNothing, match=r"waited 0 s for Redis: it is full: .* maxmemory of 500\.00KB"
        ):
            await client.set("key", "value")
    server.stop()


FULL_DISK = """
import asyncio
from pathlib import Path
from services.redis_server import EmbeddedRedis, answers, connect, trouble
from services.streams import Streams
from tests.waiting import DEADLINE_S, until
async def main():
    server = EmbeddedRedis(Path("/mnt/redis"))
    server.start()
    filler = Path("/mnt/filler")
    async with connect(server.url, patience_s=DEADLINE_S) as client:
        streams = Streams(client, "full")
        await streams.create()
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        payload = bytes(100_000)
        async def feed():
            for fed in range(4):
                await streams.feed([payload], expected_fed=fed, max_in_flight=9)
        feeding = asyncio.create_task(feed())
        await until(lambda: trouble(server.url))
        print(trouble(server.url))
        print(answers(server.url), feeding.done())
        filler.unlink()
        await feeding
        await until(lambda: not trouble(server.url))
    server.stop()
    server = EmbeddedRedis(Path("/mnt/redis"))
    server.start()
    async with connect(server.url) as client:
        print(await Streams(client, "full").redis.xlen("scope:{full}:prompts"))
    server.stop()
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_redis_whose_disk_is_full_is_waited_for_and_loses_nothing() -> None:
    """On a real file system of two megabytes."""
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", "2000000", "--tmpfs", "/mnt",
         sys.executable, "-W", "ignore", "-c", FULL_DISK],
        capture_output=True, text=True, timeout=DEADLINE_S, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, now, after = done.stdout.splitlines()
    assert said.startswith("it cannot write its append-only file, because its disk is full")
    assert now == "True False"
    assert after == "4"
