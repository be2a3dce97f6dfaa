"""`scope status`: reads a run's ledger from Redis, or, when the run is over, from its directory."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from deploy.config import ConfigError, RunConfig, load
from services.disk import write_whole
from services.redis_server import EmbeddedRedis, answers, connect, resolve_url, trouble
from services.stage import QUIET_S
from services.streams import Ledger, Streams

_NEEDED_BYTES = 1 << 16  # a step's record and the ledger


@asynccontextmanager
async def open_streams(run_dir: Path) -> AsyncIterator[Streams]:
    """The streams of a run. A private Redis that is not running is started for as long as this
    takes: its append-only file has everything.

    Raises:
        ConfigError: not a run directory.
        services.redis_server.RedisUnavailable: Redis cannot be started.
    """
    config = load(run_dir / "config.yaml")
    server = None
    url = _live_url(config, run_dir)
    if url is None:
        server = EmbeddedRedis(run_dir / "redis")
        server.start()
        url = server.url
    try:
        async with connect(url, patience_s=1.0) as client:
            yield Streams(client, config.name, pipeline=config.pipeline)
    finally:
        if server is not None:
            server.stop()


async def read_status(run_dir: Path) -> dict[str, Any]:
    """The ledger, and what each worker last reported.

    Raises:
        ConfigError: not a run directory, or its Redis cannot be reached.
    """
    url = _live_url(load(run_dir / "config.yaml"), run_dir)
    if url is None:
        return _last_known(run_dir)
    async with open_streams(run_dir) as streams:
        try:
            ledger = summary(await streams.ledger())
            workers = await streams.reports()
        except RedisError as error:
            raise ConfigError(f"Redis of {run_dir} cannot be reached: {error}") from None
    now = {"as_of": time.time(), "live": True, "redis": trouble(url)}
    now["disk_full"] = shutil.disk_usage(run_dir).free < _NEEDED_BYTES
    return {**ledger, "workers": workers, **now}


def render(status: dict[str, Any]) -> str:
    """The status as lines to read."""
    when = time.strftime("%F %T", time.localtime(status["as_of"]))
    lines = [
        f"step {status['step']}  fed {status['fed']} = trained {status['trained']} + dead "
        f"{status['dead']} + in flight {status['in_flight']}"
        + ("" if status["live"] else f"  (not running; as of {when})")
    ]
    for name, stream in status["streams"].items():
        last = name == [*status["streams"]][-1]  # the learner's
        used = status["consumed"] - status["trained"] if last else 0
        held = f", {used} of them trained and not yet in a checkpoint" if used else ""
        lines.append(f"  {name:<9} {stream['depth']:>6}  oldest {stream['age_s']:.1f} s{held}")
    if status.get("redis"):
        lines.append(f"  all wait for Redis: {status['redis']}")
    if status.get("disk_full"):
        lines.append("  the run directory's disk is full: its records wait in Redis for room")
    for name, report in sorted(status["workers"].items()):
        quiet = status["as_of"] - report["at"]
        if quiet < QUIET_S:
            said = [f"{report['done']} done", f"{report['active']} in work"]
            said += [_detail(what, value) for what, value in report["details"].items()]
            lines.append(f"  {name}: {', '.join(filter(None, said))}")
            if report["waiting_for"]:
                waited = status["as_of"] - report["waiting_since"]
                lines.append(f"    waiting for {waited:.0f} s: {report['waiting_for']}")
    return "\n".join(lines)


def _detail(what: str, value: float) -> str:
    """One of a worker's figures in words: `sampling_s` is in seconds."""
    if what == "workers":  # each is one, for those who add them up
        return ""
    words, seconds = re.subn(r"_s(_|$)", r"\1", what)
    return f"{words.replace('_', ' ')} " + (f"{value:.1f} s" if seconds else f"{value:,.0f}")


def summary(ledger: Ledger) -> dict[str, Any]:
    """The ledger as `scope status --json` prints it."""
    return {
        "fed": ledger.fed,
        "trained": ledger.trained,
        "dead": ledger.dead,
        "in_flight": ledger.in_flight,
        "step": ledger.step,
        "consumed": ledger.consumed,
        "streams": {
            name: {"depth": depth, "age_s": round(ledger.age_s[name], 3)}
            for name, depth in ledger.depth.items()
        },
    }


def write_snapshot(run_dir: Path, ledger: Ledger) -> None:
    """Keeps the ledger in the run directory, whole or not at all, for when Redis is gone."""
    now = {**summary(ledger), "as_of": time.time()}
    write_whole(run_dir / "ledger.json", json.dumps(now))


def _live_url(config: RunConfig, run_dir: Path) -> str | None:
    """Of the run's Redis; None where that is a private one that does not run."""
    if (given := resolve_url(config.redis)) is not None:
        return given
    address = run_dir / "redis" / "url"
    url = address.read_text(encoding="utf-8") if address.exists() else ""
    return url if url and answers(url) else None


def _last_known(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "ledger.json"
    if not file.exists():
        raise ConfigError(f"{run_dir} has no ledger yet: the run has not started its work")
    return {**json.loads(file.read_text(encoding="utf-8")), "workers": {}, "live": False}
