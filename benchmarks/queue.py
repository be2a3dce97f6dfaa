"""Durable groups per second through all four hand-offs, against bare redis-py with the same bytes.

    python -m benchmarks.queue [--json FILE] [--seconds 2]

"ours" feeds a group and hands it off three times and settles it: one Lua script a move, which
acknowledges, adds and deletes in one atomic step. "redis-py" does XADD + XREADGROUP + XACK for
each of the same four streams: no atomic move, nothing deleted. Both run on one append-only Redis,
one after the other for each row, with the same number of asyncio workers and connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.redis_server import EmbeddedRedis, connect
from services.streams import GROUP, STREAMS, Streams, claim

SIZES = {"16 KB": 16 << 10, "256 KB": 256 << 10, "1 MB": 1 << 20}
WORKERS = (1, 4, 16)


async def ours(url: str, payload: bytes, deadline: float) -> int:
    """Moves groups through the pipeline until `deadline`; returns how many came out."""
    streams = Streams(connect(url), f"bench-{uuid.uuid4()}")
    await streams.create()
    done = 0
    while time.perf_counter() < deadline:
        await streams.feed([payload], expected_fed=done, max_in_flight=10**9)
        for source, target in pairwise(STREAMS):
            (item,) = await claim([streams], source, "w", count=1, block_ms=1000)
            await streams.hand_off(item, target, payload)
        (item,) = await claim([streams], "scored", "w", count=1, block_ms=1000)
        await streams.settle("scored", [item.id])
        done += 1
    await streams.redis.aclose()
    return done


async def bare(url: str, payload: bytes, deadline: float) -> int:
    """The same four hops with plain commands."""
    redis: Any = connect(url)
    keys = [f"bench-{uuid.uuid4()}" for _ in STREAMS]
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


async def rate(
    work: Callable[[str, bytes, float], Awaitable[int]],
    url: str,
    payload: bytes,
    workers: int,
    seconds: float,
) -> float:
    """Groups per second of `workers` concurrent workers."""
    started = time.perf_counter()
    counts = await asyncio.gather(*[work(url, payload, started + seconds) for _ in range(workers)])
    return sum(counts) / (time.perf_counter() - started)


def rows(seconds: float) -> list[dict[str, object]]:
    """Every size and number of workers, both sides in turn on one server."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    made: list[dict[str, object]] = []
    for name, size in SIZES.items():
        for workers in WORKERS:
            with tempfile.TemporaryDirectory() as directory:
                server = EmbeddedRedis(Path(directory))
                server.start()
                payload = os.urandom(size)
                peer = asyncio.run(rate(bare, server.url, payload, workers, seconds))
                own = asyncio.run(rate(ours, server.url, payload, workers, seconds))
                server.stop()
            made.append(
                {"name": f"{name}, {workers} workers", "ours": round(own, 1),
                 "peer": round(peer, 1), "ratio": round(own / peer, 3),
                 "unit": "groups/s through 4 hops", "machine": machine}
            )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    found = rows(options.seconds)
    table = Table(title="groups through all four hand-offs, per second")
    for heading in ("payload", "ours", "redis-py", "ratio"):
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(*(str(row[key]) for key in ("name", "ours", "peer", "ratio")))
    Console().print(table)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
