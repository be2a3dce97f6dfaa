"""The loop that every worker runs: claim an item, work on it, hand the result on.

    take over / claim ──▶ process ──▶ hand off          (one asyncio task an item)
            heartbeat renews every lease meanwhile

What becomes of an item when its work fails is decided here, once, for all stages:

* `BadItem`: it can never succeed, so it goes to `dead` with the reason.
* `Unavailable`: a dependency is down, which is not the item's fault. It waits with back-off,
  visibly (`scope status`), and past the patience the worker stops with that error.
* `WorkerDied`, `WorkerFailed`: it is given back, and the worker ends with that error.
* anything else: it is given back with the traceback, to be tried again by whoever takes it, and
  goes to `dead` after `max_deliveries`. A worker that dies outright counts the same.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from services.config import StageConfig
from services.errors import BadItem, PatienceExceeded, Unavailable, WorkerDied, WorkerFailed
from services.pipeline import PIPELINE, TRAIN, Pipeline
from services.redis_server import connect
from services.streams import Claim, StreamName, Streams, claim
from services.tasks import end

log = logging.getLogger(__name__)

Process: TypeAlias = Callable[[bytes], Awaitable[bytes]]

QUIET_S = 60.0  # a worker that has not reported for this long is taken for gone
_BLOCK_S = 1.0  # how long a read waits at most; also how soon a stop is noticed
_FIRST_RETRY_S, _LAST_RETRY_S = 0.2, 15.0


@dataclass(frozen=True, slots=True)
class Connection:
    """All that a worker needs to find its run."""

    redis_url: str = field(repr=False)  # with the password in it
    run: str
    config: StageConfig
    pipeline: Pipeline = PIPELINE

    def streams(self, lane: str = TRAIN) -> Streams:
        """A client of one lane, with a connection of its own."""
        client = connect(self.redis_url, patience_s=self.config.patience_s)
        return Streams(client, self.run, lane, self.pipeline)


def new_consumer(worker: str) -> str:
    """A name in Redis for a worker that starts: never that of the one it replaces, which may
    still be running."""
    return f"{worker}-{uuid.uuid4().hex[:8]}"


def consumers_of(worker: str) -> re.Pattern[str]:
    """Matches every name that `new_consumer` ever gave to this worker."""
    return re.compile(re.escape(worker) + "-[0-9a-f]{8}")


class BusyTime:
    """`with busy:` around pieces of work that overlap adds up how long there was at least one."""

    def __init__(self) -> None:
        self._seconds, self._pieces, self._since = 0.0, 0, 0.0

    def __enter__(self) -> None:
        if not self._pieces:
            self._since = time.monotonic()
        self._pieces += 1

    def __exit__(self, *_: object) -> None:
        self._pieces -= 1
        if not self._pieces:
            self._seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """So far, the piece that is worked on included."""
        return self._seconds + (time.monotonic() - self._since if self._pieces else 0.0)


@dataclass
class Stage:
    """One worker of one stage.

    Args:
        name: what the stage is called in logs and in the dead stream.
        consumer: this worker's name in Redis, never used by another live worker.
        lanes: where to read from, first one first.
        source, target: the streams it moves items between.
        process: one item's wire form in, the result's wire form out.
        capacity: how many items are worked on at once.
        details: what else this stage can say of itself, in numbers, for `scope status` and the
            metrics.
    """

    name: str
    consumer: str
    lanes: Sequence[Streams]
    source: StreamName
    target: StreamName
    process: Process
    capacity: int
    config: StageConfig
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    details: Callable[[], dict[str, float]] = dict
    _active: set[asyncio.Task[None]] = field(default_factory=set)
    _working: dict[Claim, asyncio.Task[bytes]] = field(default_factory=dict)
    _done: int = 0
    _lost: int = 0
    _failed: int = 0
    _unavailable: int = 0
    _busy_s: float = 0.0
    _waiting_for: str = ""
    _waiting_since: float = 0.0

    async def run(self) -> None:
        """Works until `stopping` is set; then finishes what it holds.

        Raises:
            PatienceExceeded: a dependency stayed unavailable for longer than the patience.
            redis.exceptions.RedisError: Redis itself did, through all of the client's retries.
        """
        # Apart, because a Redis that is full takes a renewal and no report.
        beats = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._report())]
        try:
            await self._claim_until_stopped(*beats)
            if self._active:
                await asyncio.wait(self._active)
                self._collect()
        finally:
            await end([*beats, *self._active])

    async def _claim_until_stopped(self, *beats: asyncio.Task[None]) -> None:
        every = self.config.lease_s / 4  # how often the items of the dead are looked for
        block_ms = max(1, int(1000 * min(_BLOCK_S, every)))
        next_take_over = 0.0
        while not self.stopping.is_set():
            self._collect(*beats)
            free = self.capacity - len(self._active)
            if free <= 0:
                await asyncio.wait([*self._active, *beats], return_when=asyncio.FIRST_COMPLETED)
                continue
            claims: list[Claim] = []
            if time.monotonic() >= next_take_over:
                next_take_over = time.monotonic() + every
                for lane in self.lanes:
                    claims += await lane.take_over(
                        self.source, self.consumer, lease_s=self.config.lease_s, count=free
                    )
            if not claims:
                claims = await claim(
                    self.lanes, self.source, self.consumer, count=free, block_ms=block_ms
                )
            for item in claims:
                self._active.add(asyncio.create_task(self._handle(item)))

    def _collect(self, *also: asyncio.Task[None]) -> None:
        """Forgets finished tasks; raises what one of them (or of `also`) died of."""
        for task in [*self._active, *also]:
            if task.done():
                self._active.discard(task)
                if not task.cancelled():
                    task.result()

    async def _handle(self, item: Claim) -> None:
        if item.deliveries > self.config.max_deliveries:
            await self._bury(item, f"failed {item.deliveries - 1} deliveries", item.last_failure)
            return
        # A task of its own, so that its error is a value to be judged rather than a crash.
        work = asyncio.create_task(self._process_patiently(item.payload))
        self._working[item] = work
        started = time.monotonic()
        try:
            await asyncio.wait({work})
        finally:
            self._busy_s += time.monotonic() - started
            del self._working[item]
            work.cancel()
        if work.cancelled():  # by the heartbeat: another worker has the item now
            self._lost += 1
            return
        error = work.exception()
        self._failed += error is not None
        if error is None:
            if await item.lane.hand_off(item, self.target, work.result()):
                self._done += 1
            else:
                self._lost += 1
        elif isinstance(error, BadItem):
            await self._bury(item, str(error), _trace(error))
        elif isinstance(error, WorkerDied | WorkerFailed) or not isinstance(error, Exception):
            await item.lane.release(item, self.consumer, str(error))
            raise error
        elif item.deliveries >= self.config.max_deliveries:
            await self._bury(item, f"{type(error).__name__}: {error}", _trace(error))
        else:
            log.warning("%s: an item failed and goes back to the queue: %r", self.name, error)
            await item.lane.release(item, self.consumer, _trace(error))

    async def _process_patiently(self, payload: bytes) -> bytes:
        """Processes one item, waiting while a dependency is unavailable."""
        started = time.monotonic()
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(_FIRST_RETRY_S, max=_LAST_RETRY_S),
            stop=stop_after_delay(self.config.patience_s),
            after=self._shows_waiting,
            reraise=True,
        )
        try:
            result: bytes = await attempts(self.process, payload)
        except Unavailable as error:
            waited = time.monotonic() - started
            raise PatienceExceeded(
                f"{self.name} waited {waited:.0f} s for a dependency: {error}"
            ) from error
        self._waiting_for, self._waiting_since = "", 0.0
        return result

    def _shows_waiting(self, attempt: RetryCallState) -> None:
        assert attempt.outcome is not None
        self._unavailable += 1
        self._waiting_for = str(attempt.outcome.exception())
        self._waiting_since = self._waiting_since or time.time()

    async def _bury(self, item: Claim, reason: str, detail: str) -> None:
        log.error("%s: an item is given up: %s", self.name, reason)
        await item.lane.bury(item, f"{self.name}: {reason}", detail)

    async def _heartbeat(self) -> None:
        """Renews every lease; work on an item that was taken over is dropped."""
        while True:
            for lane in self.lanes:
                mine = {item: work for item, work in self._working.items() if item.lane is lane}
                held = await lane.renew(self.source, self.consumer, [item.id for item in mine])
                for item, work in mine.items():
                    if item.id not in held:
                        work.cancel()
            await asyncio.sleep(self._beat_s)

    async def _report(self) -> None:
        last_warned = 0.0
        while True:
            await self.lanes[0].report(self.consumer, self._state())
            if self._waiting_for and time.monotonic() - last_warned > 60:
                last_warned = time.monotonic()
                log.warning("%s is waiting: %s", self.name, self._waiting_for)
            await asyncio.sleep(self._beat_s)

    @property
    def _beat_s(self) -> float:
        return min(self.config.lease_s / 4, 2.0)

    def _state(self) -> dict[str, object]:
        return {
            "stage": self.name,
            "at": time.time(),
            "active": len(self._working),
            "done": self._done,
            "lost": self._lost,
            "failed": self._failed,
            "unavailable": self._unavailable,
            "busy_s": self._busy_s,
            "waiting_for": self._waiting_for,
            "waiting_since": self._waiting_since,
            "details": self.details(),
        }


def totals(reports: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The details of all workers that reported in the last minute, added up, as metrics:
    `<stage>/<detail>`."""
    added: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        if time.time() - report["at"] < QUIET_S:
            for name, value in report["details"].items():
                added[f"{report['stage']}/{name}"] += value
    return dict(added)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
