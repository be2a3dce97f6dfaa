"""What every stage's worker is: a room writes `process`, and all else stands here, once.

    claim ─▶ decode ─▶ process ─▶ encode ─▶ hand off          (services.stage: leases, faults)

A worker holds its engine, judges or clients in `working`, and what has to go on beside the items
(following new weights) in `background`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from services.config import Config
from services.pipeline import Step
from services.stage import BusyTime, Connection, Stage, new_consumer
from services.tasks import beside
from services.trajectory import Record, decode, encode

In = TypeVar("In", bound=Record)
Out = TypeVar("Out", bound=Record)
SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True, slots=True)
class Post:
    """Where a worker works.

    Args:
        connection: the run.
        step: its stage.
        capacity: how many items it works on at once.
        lanes: whose items it takes, first one first.
        name: of the worker, for logs and status; it need not be unique.
    """

    connection: Connection
    step: Step
    capacity: int
    lanes: tuple[str, ...]
    name: str = ""


class StepWorker(ABC, Generic[In, Out, SettingsT]):
    """One worker of one stage. Subclasses say in `takes` which record they read."""

    takes: ClassVar[type[Record]]
    settings_class: ClassVar[type[Any]] = Config
    """Of `settings`. For a stage of one's own a `Config`, as which the configuration's are read."""

    def __init__(self, post: Post, settings: SettingsT) -> None:
        self.post, self.settings = post, settings
        # Never the name of a worker before: what that one held must go stale, not be this one's.
        self.consumer = new_consumer(post.name)
        self.busy = BusyTime()  # while it works on at least one item
        self.stopping = asyncio.Event()

    @abstractmethod
    async def process(self, item: In) -> Out:
        """The record that this stage makes of `item`. Several run at once.

        Raises:
            services.errors.BadItem: it can never be processed.
            services.errors.Unavailable: a dependency is down; the item waits.
            services.errors.WorkerDied, services.errors.WorkerFailed: this worker cannot go on.
        """

    def details(self) -> dict[str, float]:
        """What this worker says of itself, in numbers, for `scope status` and the metrics."""
        return {}

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Holds what `process` needs for as long as the worker runs."""
        yield

    async def background(self) -> None:
        """Goes on beside the items, until cancelled; its failure ends the worker."""

    async def run(self) -> None:
        """Works until `stop`; then finishes what it holds.

        Raises:
            services.errors.WorkerDied, services.errors.WorkerFailed: see `process`.
            redis.exceptions.RedisError: Redis failed through all of the client's retries.
        """
        connection, step = self.post.connection, self.post.step
        async with AsyncExitStack() as resources:
            await resources.enter_async_context(self.working())
            lanes = [
                await resources.enter_async_context(connection.streams(lane))
                for lane in self.post.lanes
            ]
            stage = Stage(
                name=step.name,
                consumer=self.consumer,
                lanes=lanes,
                source=step.reads,
                target=step.writes,
                process=self._process,
                capacity=self.post.capacity,
                config=connection.config,
                stopping=self.stopping,
                details=lambda: {"workers": 1.0, **self.details()},
            )
            await beside(stage.run(), self.background())

    async def stop(self) -> None:
        """Lets `run` finish what it holds and return."""
        self.stopping.set()

    async def _process(self, payload: bytes) -> bytes:
        return encode(await self.process(decode(self.takes, payload)))  # type: ignore[arg-type]
