"""Durable groups per second through all four hand-offs, against bare redis-py with the same bytes.

    python -m benchmarks.queue [--json FILE] [--seconds 1] [--rounds 5]

"ours" feeds a group and hands it off three times and settles it: one Lua script a move, which
acknowledges, adds and deletes in one atomic step. "redis-py" does XADD + XREADGROUP + XACK for
each of the same four streams: no atomic move, nothing deleted. Both run in turn, `rounds` times
for each row, on an append-only Redis that is new each time, with the same number of asyncio workers
and connections; what counts is the median. (Large payloads are bound by Redis writing its file:
single rounds of either side differ by half.)
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from services.config import StageConfig
from services.pipeline import PIPELINE
from services.redis_server import EmbeddedRedis, connect
from services.stage import Connection, Stage
from services.streams import GROUP, claim

SIZES = {"16 KB": 16 << 10, "256 KB": 256 << 10, "1 MB": 1 << 20}
WORKERS = (1, 4, 16)
CAPACITY = 16  # groups in flight in one worker
IN_FLIGHT_BYTES = 8 << 20
FEED = 64  # groups that are fed and settled at once

Side: TypeAlias = Callable[[str, bytes, int, float], Coroutine[Any, Any, float]]


async def ours(url: str, payload: bytes, workers: int, seconds: float) -> float:
    """Groups per second through the pipeline: `workers` workers in each of its three stages,
    fed and settled as the feeder and the learner do it. A stage's work is to return its input."""
    connection = Connection(url, f"bench-{uuid.uuid4()}", StageConfig())
    async with AsyncExitStack() as resources:
        streams = await resources.enter_async_context(connection.streams())
        await streams.create()
        stages = [
            Stage(
                name=source,
                consumer=f"{source}-{number}",
                lanes=[await resources.enter_async_context(connection.streams())],
                source=source,
                target=target,
                process=_unchanged,
                capacity=CAPACITY,
                config=connection.config,
            )
            for source, target in itertools.pairwise(PIPELINE.streams)
            for number in range(workers)
        ]
        running = [asyncio.create_task(stage.run()) for stage in stages]
        started = time.perf_counter()
        done = fed = 0
        # Bounded in bytes, or a short run would mostly fill the pipeline.
        deep = min(workers * CAPACITY, max(workers, IN_FLIGHT_BYTES // len(payload)))
        while time.perf_counter() < started + seconds:
            room = deep - (fed - done)
            if room:
                _, fed = await streams.feed(
                    [payload] * min(FEED, room), expected_fed=fed, max_in_flight=10**9
                )
            items = await claim([streams], "scored", "learner", count=FEED, block_ms=1000)
            done += await streams.settle("scored", [item.id for item in items])
            await streams.advance(consumed=done, step=0)
        elapsed = time.perf_counter() - started
        for stage in stages:
            stage.stopping.set()
        await asyncio.gather(*running)
    return done / elapsed


async def _unchanged(payload: bytes) -> bytes:
    return payload


async def bare(url: str, payload: bytes, workers: int, seconds: float) -> float:
    """Groups per second of `workers` workers that each move one group at a time."""
    started = time.perf_counter()
    counts = await asyncio.gather(
        *[_bare_worker(url, payload, started + seconds) for _ in range(workers)]
    )
    return sum(counts) / (time.perf_counter() - started)


async def _bare_worker(url: str, payload: bytes, deadline: float) -> int:
    redis: Any = connect(url)
    keys = [f"bench-{uuid.uuid4()}" for _ in PIPELINE.streams]
    for key in keys:
        await redis.xgroup_create(key, GROUP, id="0", mkstream=True)
    done = 0
    while time.perf_counter() < deadline:
        for key in keys:
            await redis.xadd(key, {"item": payload})
            reply = await redis.xreadgroup(GROUP, "w", {key: ">"}, count=1, block=1000)
            ((_, ((id_, _),)),) = reply.items() if isinstance(reply, dict) else reply
            await redis.xack(key, GROUP, id_)
        done += 1
    await redis.delete(*keys)  # what was acknowledged stays in a stream until it is deleted
    await redis.aclose()
    return done


def measure(side: Side, payload: bytes, workers: int, seconds: float) -> float:
    """One round of one side, on a Redis of its own."""
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedRedis(Path(directory))
        server.start()
        try:
            return asyncio.run(side(server.url, payload, workers, seconds))
        finally:
            server.stop()


def rows(seconds: float, rounds: int) -> list[dict[str, object]]:
    """Every size and number of workers, both sides in turn."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    made: list[dict[str, object]] = []
    for (name, size), workers in itertools.product(SIZES.items(), WORKERS):
        payload = os.urandom(size)
        taken = [
            [measure(side, payload, workers, seconds) for side in (bare, ours)]
            for _ in range(rounds)
        ]
        peers, owns = zip(*taken, strict=True)
        peer, own = statistics.median(peers), statistics.median(owns)
        made.append(
            {"name": f"{name}, {workers} workers", "ours": round(own, 1),
             "peer": round(peer, 1), "ratio": round(own / peer, 3),
             "ours_range": [round(min(owns), 1), round(max(owns), 1)],
             "peer_range": [round(min(peers), 1), round(max(peers), 1)],
             "unit": "groups/s through 4 hops", "machine": machine,
             "date": datetime.date.today().isoformat()}
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = rows(options.seconds, options.rounds)
    table = Table(title="groups through all four hand-offs, per second")
    for heading in ("payload", "ours", "redis-py", "ratio"):
        table.add_column(heading, justify="right")
    for row in results:
        table.add_row(*(str(row[key]) for key in ("name", "ours", "peer", "ratio")))
    Console().print(table)
    if options.json:
        options.json.write_text(
            "".join(json.dumps(row) + "\n" for row in results), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
