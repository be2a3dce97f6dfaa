"""The learner's end of the scored stream: whole steps of groups, and what a crash left behind.

A step takes the groups that were fed first of those that no step has used and that are not dead;
one that others overtook is waited for. The feeder counts on it: in any other order a group could
be older than `max_staleness` steps when its turn comes (see `rollout.feeder`). One that is all the
same (it was put back to work, or Redis and the checkpoint disagreed) is sampled again.

Groups are acknowledged only when a checkpoint that contains them is durable (`settle`), so the
pending list of the one consumer `learner` is the replay log: a restarted learner is given the
same groups again, before any new one.

The learner computes on its own thread; here an event loop on another (`LoopThread`) claims,
decodes and checks the next step's groups meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence, Set
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from services.errors import BadItem, PatienceExceeded, WorkerDied
from services.stage import Connection
from services.streams import Claim, Ledger, claim
from services.tasks import beside
from services.teacher_need import TeacherNeed
from services.trajectory import ScoredGroup, decode, encode
from trainer.batch import check
from trainer.checkpoint import Progress
from trainer.deaths import Deaths

log = logging.getLogger(__name__)

T = TypeVar("T")

CONSUMER = "learner"
_BLOCK_MS = 500


class Stalled(PatienceExceeded):
    """No full step of scored groups came in time; the message says where the items are."""


class HistoryGap(WorkerDied):
    """Redis and the checkpoint disagree about what was trained: `scope resume` mends it."""


class LoopThread:
    """An event loop on a thread of its own, which goes on while its owner computes."""

    def __enter__(self) -> LoopThread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="background", daemon=True
        )
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for `work`'s result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextmanager
    def holding(self, resource: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """What `resource` gives, entered and left on this loop."""
        held = self.run(resource.__aenter__())
        try:
            yield held
        finally:
            self.run(resource.__aexit__(None, None, None))

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Taken(NamedTuple):
    """A group that a step is given, and the entry that it came in."""

    claim: Claim
    group: ScoredGroup


class GroupReader:
    """Collects scored groups into steps, the next ones while the last is trained on. To be entered.

    Args:
        connection: the run.
        need: which trajectories must have a teacher's score.
        vocabulary: how many tokens the student has.
        top: how many of the teacher's most likely tokens must come with each.
        groups_per_step: groups of a full step; only the last step of a run has fewer.
        max_staleness: how many versions older than the step's a token's weights may be; None
            where whoever samples never changes.
        total: prompts that the run feeds in all.
        timeout_s: how long one step is waited for, once a prompt was fed.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        need: TeacherNeed,
        vocabulary: int,
        groups_per_step: int,
        max_staleness: int | None,
        total: int,
        timeout_s: float,
        top: int = 0,
        entropy: bool = False,
    ) -> None:
        self.streams = connection.streams()
        self.covered: set[int] = set()  # orders of the prompts that the model has learned from
        self.unsettled: list[str] = []  # entries trained since the last durable checkpoint
        self._check = partial(check, need=need, top=top, vocabulary=vocabulary, entropy=entropy)
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._total = total
        self._timeout_s = timeout_s
        self._deaths = Deaths(self.streams)
        self._ready: dict[int, Taken] = {}  # by order; admission bounds how many
        self._claiming: asyncio.Task[None]
        self._arrived = asyncio.Event()
        self._closing = False
        self._resources = AsyncExitStack()

    async def start(self, progress: Progress | None) -> None:
        """Settles what the checkpoint contains and replays what it does not.

        Raises:
            HistoryGap: groups are gone from Redis that this checkpoint does not contain, or the
                other way round, because Redis or a newer checkpoint was lost.
        """
        await self.streams.create()
        if progress is not None:
            await self.streams.settle(self.streams.results, progress.entries)
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
        await self._accept(await self.streams.held(self.streams.results, CONSUMER))
        self._claiming = asyncio.create_task(self._claim())

    @property
    def consumed(self) -> int:
        """Prompts that the model has learned from."""
        return len(self.covered)

    async def next_step(
        self, version: int, while_waiting: Callable[[], None] = lambda: None
    ) -> list[Taken]:
        """The groups that `version` of the weights learns from, in the order of the feed; none
        when all are trained. Calls `while_waiting` about every half second until they are there.

        The clock starts with the run's first prompt: before it, engines start and the untrained
        student is evaluated, with deadlines of their own.

        Raises:
            Stalled: the groups did not come within the timeout.
        """
        deadline: float | None = None
        while True:
            dead = await self._deaths.orders(self.covered)
            due = list(islice(self._open(dead), self._groups_per_step))
            await self._sample_again([o for o in due if self._stale(o, version)], version)
            missing = [order for order in due if order not in self._ready]
            if not missing:
                return [self._ready.pop(order) for order in due]
            while_waiting()
            if deadline is None and (await self.streams.ledger()).fed:
                deadline = time.monotonic() + self._timeout_s
            if deadline is not None and time.monotonic() > deadline:
                raise Stalled(
                    f"the learner waited {self._timeout_s:.0f} s for {len(due)} scored groups and "
                    f"has {len(due) - len(missing)}; the first that is missing is of prompt "
                    f"{missing[0]}: {describe(await self.streams.ledger())}"
                )
            await self._something_new()

    async def trained(self, step: int, taken: Sequence[Claim], orders: Iterable[int]) -> None:
        """Records that a step has used these groups, which lets the feeder admit more."""
        self.covered.update(orders)
        self.unsettled += [item.id for item in taken]
        await self.streams.advance(consumed=self.consumed, step=step)

    async def settle(self, entries: Sequence[str]) -> None:
        """Acknowledges the entries that a durable checkpoint contains: the first of `unsettled`."""
        await self.streams.settle(self.streams.results, entries)
        del self.unsettled[: len(entries)]

    async def __aenter__(self) -> GroupReader:
        await self._resources.enter_async_context(self.streams)
        self._resources.push_async_callback(self._stop_claiming)
        return self

    async def __aexit__(self, *_: object) -> None:
        """What was claimed and not trained on is replayed to the next reader."""
        await self._resources.aclose()

    async def _stop_claiming(self) -> None:
        self._closing = True
        if hasattr(self, "_claiming"):
            await asyncio.wait({self._claiming})

    def _open(self, dead: Set[int]) -> Iterator[int]:
        """Orders that no step has used and that are not dead, the first fed first."""
        behind = max(self.covered, default=-1) + 1
        # What is open below the last that was used was put back to work; mostly there is none.
        if behind == len(self.covered) + sum(o < behind for o in dead - self.covered):
            yield from (order for order in range(behind, self._total) if order not in dead)
        else:
            known = self.covered | dead
            yield from (order for order in range(self._total) if order not in known)

    def _stale(self, order: int, version: int) -> bool:
        if self._max_staleness is None or order not in self._ready:
            return False
        sampled = self._ready[order].group.rollout.weight_version
        return sampled < version - self._max_staleness

    async def _sample_again(self, orders: Sequence[int], version: int) -> None:
        """Sends these back to where prompts begin, to be sampled by weights new enough for this
        step."""
        for order in orders:
            claim, group = self._ready.pop(order)
            log.warning("prompt %d is sampled again: its group is too old for this step", order)
            oldest = version - (self._max_staleness or 0)
            prompt = replace(group.prompt, min_weight_version=oldest)
            await self.streams.hand_off(claim, self.streams.pipeline.source, encode(prompt))

    async def _something_new(self) -> None:
        """Returns when a group has come, or after about half a second.

        Raises:
            redis.exceptions.RedisError: Redis failed through all of the client's retries.
        """
        self._arrived.clear()
        await beside(self._arrival(), self._claiming)

    async def _arrival(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_BLOCK_MS / 1000):
                await self._arrived.wait()

    async def _claim(self) -> None:
        """Claims until the reader is left. It is never cancelled: a claim whose answer nobody takes
        would be lost until a restart."""
        while not self._closing:
            await self._accept(
                await claim(
                    [self.streams],
                    self.streams.results,
                    CONSUMER,
                    count=self._groups_per_step,
                    block_ms=_BLOCK_MS,
                )
            )

    async def _accept(self, claims: Sequence[Claim]) -> None:
        for item in claims:
            try:
                group = decode(ScoredGroup, item.payload)
                self._check(group)
                order = group.prompt.order
                if order in self._ready or order in self.covered:
                    raise BadItem(f"prompt {order} came twice")
            except BadItem as error:
                await self.streams.bury(item, f"trainer: {error}")
            else:
                self._ready[order] = Taken(item, group)
        if claims:
            self._arrived.set()


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
