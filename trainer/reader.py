"""The learner's end of the scored stream: whole steps of groups, and what a crash left behind.

Groups are acknowledged only when a checkpoint that contains them is durable (`settle`), so the
pending list of the one consumer `learner` is the replay log: a restarted learner is given the
same groups again, before any new one.

The learner computes on its own thread; here an event loop on another (`Background`) claims,
decodes and checks the next step's groups meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from services.stage import Connection
from services.streams import Claim, Ledger, claim
from services.trajectory import ScoredGroup, WireError, decode
from trainer.batch import BadGroup, check
from trainer.checkpoint import Progress
from trainer.objectives import TeacherNeed

T = TypeVar("T")

CONSUMER = "learner"
_BLOCK_MS = 500


class Stalled(RuntimeError):
    """No full step of scored groups came in time; the message says where the items are."""


class HistoryGap(RuntimeError):
    """Redis and the checkpoint disagree about what was trained: `scope resume` mends it."""


class Background:
    """An event loop on a thread of its own, which goes on while its owner computes."""

    def __enter__(self) -> Background:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="background", daemon=True
        )
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for `work`'s result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Taken(NamedTuple):
    """A group that a step is given, and the entry that it came in."""

    claim: Claim
    group: ScoredGroup


class GroupReader:
    """Collects scored groups into steps, the next one while the last is trained on.

    Args:
        connection: the run.
        need: which trajectories must have a teacher's score.
        top: how many of the teacher's most likely tokens must come with each.
        groups_per_step: groups of a full step; only the last step of a run has fewer.
        total: prompts that the run feeds in all.
        timeout_s: how long one step is waited for.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        need: TeacherNeed,
        groups_per_step: int,
        total: int,
        timeout_s: float,
        top: int = 0,
    ) -> None:
        self.streams = connection.streams()
        self.covered: set[int] = set()  # orders of the prompts that the model has learned from
        self.unsettled: list[str] = []  # entries trained since the last durable checkpoint
        self._need, self._top = need, top
        self._groups_per_step = groups_per_step
        self._total = total
        self._timeout_s = timeout_s
        self._ready: deque[Taken] = deque()
        self._ahead: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._closing = False

    async def start(self, progress: Progress | None) -> None:
        """Settles what the checkpoint contains and replays what it does not.

        Raises:
            HistoryGap: groups are gone from Redis that this checkpoint does not contain, or the
                other way round, because Redis or a newer checkpoint was lost.
        """
        await self.streams.create()
        if progress is not None:
            await self.streams.settle("scored", progress.entries)
            self.covered = set(progress.orders)
        ledger = await self.streams.ledger()
        if ledger.trained != self.consumed:
            raise HistoryGap(
                f"Redis has {ledger.trained} trained prompts, the checkpoint that is to be "
                f"continued {self.consumed}"
            )
        await self.streams.advance(
            consumed=self.consumed, step=progress.step if progress is not None else 0
        )
        await self._accept(await self.streams.held("scored", CONSUMER))

    @property
    def consumed(self) -> int:
        """Prompts that the model has learned from."""
        return len(self.covered)

    async def next_step(self, while_waiting: Callable[[], None] = lambda: None) -> list[Taken]:
        """The groups of the next step; none when all are trained. Calls `while_waiting` about
        every half second until they are there. Those of the step after it are claimed from here
        on.

        Raises:
            Stalled: the groups did not come within the timeout.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            ledger = await self.streams.ledger()
            left = self._total - self.consumed - ledger.dead
            wanted = min(self._groups_per_step, left)
            if len(self._ready) >= wanted:
                step = [self._ready.popleft() for _ in range(wanted)]
                if step:
                    self._claim_ahead()
                return step
            while_waiting()
            if time.monotonic() > deadline:
                raise Stalled(
                    f"the learner waited {self._timeout_s:.0f} s for {wanted} scored groups and "
                    f"has {len(self._ready)}: {describe(ledger)}"
                )
            await self._something_new()

    async def trained(self, step: int, taken: Sequence[Claim], orders: Iterable[int]) -> None:
        """Records that a step has used these groups, which lets the feeder admit more."""
        self.covered.update(orders)
        self.unsettled += [item.id for item in taken]
        await self.streams.advance(consumed=self.consumed, step=step)

    async def settle(self, entries: Sequence[str]) -> None:
        """Acknowledges the entries that a durable checkpoint contains: the first of `unsettled`."""
        await self.streams.settle("scored", entries)
        del self.unsettled[: len(entries)]

    async def close(self) -> None:
        """Stops claiming. What was claimed and not trained on is replayed to the next reader."""
        self._closing = True
        if self._ahead is not None:
            await asyncio.wait({self._ahead})
        await self.streams.redis.aclose()

    def _claim_ahead(self) -> asyncio.Task[None]:
        """The one task that claims. It is never cancelled: a claim whose answer nobody takes
        would be lost until a restart."""
        if self._ahead is None or self._ahead.done():
            if self._ahead is not None:
                self._ahead.result()
            self._ahead = asyncio.create_task(self._fill())
        return self._ahead

    async def _something_new(self) -> None:
        """Returns when a group has come, or after about half a second."""
        self._arrived.clear()
        task = self._claim_ahead()
        arrived = asyncio.create_task(self._arrived.wait())
        await asyncio.wait(
            {task, arrived}, timeout=_BLOCK_MS / 1000, return_when=asyncio.FIRST_COMPLETED
        )
        arrived.cancel()

    async def _fill(self) -> None:
        """Claims until a whole step is ready."""
        while len(self._ready) < self._groups_per_step and not self._closing:
            await self._accept(
                await claim(
                    [self.streams],
                    "scored",
                    CONSUMER,
                    count=self._groups_per_step - len(self._ready),
                    block_ms=_BLOCK_MS,
                )
            )

    async def _accept(self, claims: Sequence[Claim]) -> None:
        if claims:
            self._arrived.set()
        for item in claims:
            try:
                group = decode(ScoredGroup, item.payload)
                check(group, self._need, self._top)
            except (WireError, BadGroup) as error:
                await self.streams.bury(item, f"trainer: {error}")
            else:
                self._ready.append(Taken(item, group))


def describe(ledger: Ledger) -> str:
    """Where the items of a run are, for whoever waits for them."""
    streams = ", ".join(
        f"{name} {depth} (oldest {ledger.age_s[name]:.0f} s)"
        for name, depth in ledger.depth.items()
    )
    return (
        f"fed {ledger.fed}, trained {ledger.trained}, dead {ledger.dead}, in flight "
        f"{ledger.in_flight}: {streams}"
    )
