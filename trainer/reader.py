"""The learner's end of the scored stream: whole steps of groups, and what a crash left behind.

Groups are acknowledged only when a checkpoint that contains them is durable (`settle`), so the
pending list of the one consumer `learner` is the replay log: a restarted learner is given the
same groups again, before any new one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from services.stage import Connection
from services.streams import Claim, Ledger, claim
from services.trajectory import ScoredGroup, WireError, decode
from trainer.batch import BadGroup, check
from trainer.checkpoint import Progress
from trainer.objectives import TeacherNeed

CONSUMER = "learner"
_BLOCK_MS = 500


class Stalled(RuntimeError):
    """No full step of scored groups came in time; the message says where the items are."""


class HistoryGap(RuntimeError):
    """Redis and the checkpoint disagree about what was trained: `scope resume` mends it."""


class GroupReader:
    """Collects scored groups into steps.

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
        self._ready: deque[Claim] = deque()

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

    async def next_step(self, while_waiting: Callable[[], None] = lambda: None) -> list[Claim]:
        """The groups of the next step; none when all are trained. Calls `while_waiting` about
        every half second until they are there.

        Raises:
            Stalled: the groups did not come within the timeout.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            ledger = await self.streams.ledger()
            left = self._total - self.consumed - ledger.dead
            wanted = min(self._groups_per_step, left)
            if len(self._ready) >= wanted:
                return [self._ready.popleft() for _ in range(wanted)]
            while_waiting()
            if time.monotonic() > deadline:
                raise Stalled(
                    f"the learner waited {self._timeout_s:.0f} s for {wanted} scored groups and "
                    f"has {len(self._ready)}: {describe(ledger)}"
                )
            await self._accept(
                await claim(
                    [self.streams],
                    "scored",
                    CONSUMER,
                    count=wanted - len(self._ready),
                    block_ms=_BLOCK_MS,
                )
            )

    async def trained(self, step: int, taken: Sequence[Claim], orders: Iterable[int]) -> None:
        """Records that a step has used these groups, which lets the feeder admit more."""
        self.covered.update(orders)
        self.unsettled += [item.id for item in taken]
        await self.streams.advance(consumed=self.consumed, step=step)

    async def settle(self, entries: Sequence[str]) -> None:
        """Acknowledges the entries that a durable checkpoint contains: the first of `unsettled`."""
        await self.streams.settle("scored", entries)
        del self.unsettled[: len(entries)]

    async def _accept(self, claims: Sequence[Claim]) -> None:
        for item in claims:
            try:
                group = decode(ScoredGroup, item.payload)
                check(group, self._need, self._top)
            except (WireError, BadGroup) as error:
                await self.streams.bury(item, f"trainer: {error}")
            else:
                self._ready.append(item)


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
