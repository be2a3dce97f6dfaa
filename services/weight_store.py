"""The weights' way back: the learner publishes a version, every engine waits for the next.

The weights lie in the Ray object store and are read there without a copy, once by each node.
The store owns them, not the learner, so the last version outlives the learner that made it. A
store that dies is restarted empty, and the learner, which looks after it, publishes again.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError

from services.config import HEAD
from services.weights import Call, TransferFailed, Weights

_CALL_S = 300.0  # how long an engine waits for the learner's next call
_PAUSE_S = 1.0  # between attempts to reach a store that is being restarted


@dataclass(frozen=True, slots=True)
class Publication:
    """One published version; `serial` is that of `Weights`."""

    serial: str
    version: int
    reference: list[ray.ObjectRef[Weights]]  # a list of one: Ray would fetch a bare reference


@dataclass(frozen=True, slots=True)
class Ask:
    """An engine of `world_size` processes waits to be sent the newest version."""

    member: str
    world_size: int


class _Line:
    """Calls to one engine, and what became of them."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Call] = asyncio.Queue()
        self.done: asyncio.Queue[None] = asyncio.Queue()


class WeightStore:
    """Ray actor that holds the newest version and wakes whoever waits for the next. Between
    learner and engines that transfer without it, it carries the calls of the transfer."""

    def __init__(self) -> None:
        self._newest: Publication | None = None
        self._published = asyncio.Condition()
        self._asks: asyncio.Queue[Ask] = asyncio.Queue()
        self._lines: dict[str, _Line] = {}

    async def make_room(self) -> None:
        """Forgets the newest version. Called before the next is sent here: that one lies in the
        object store twice while this actor makes its own copy, and three would be one too many."""
        self._newest = None

    async def publish(self, weights: Weights) -> None:
        """Makes a version the newest one, even when its number is lower than the last."""
        reference = ray.put(weights)
        async with self._published:
            self._newest = Publication(weights.serial, weights.version, [reference])
            self._published.notify_all()

    async def version(self) -> int | None:
        """The newest version; None when there is none, as after a restart."""
        return None if self._newest is None else self._newest.version

    async def next(self, after: str, timeout_s: float) -> Publication | None:
        """The newest publication if its serial is not `after`, waiting up to `timeout_s`."""
        async with self._published:
            try:
                await asyncio.wait_for(
                    self._published.wait_for(
                        lambda: self._newest is not None and self._newest.serial != after
                    ),
                    timeout_s,
                )
            except TimeoutError:
                return None
            return self._newest

    # ------------------------------------------------------- transfers that do not go through it

    async def ask(self, ask: Ask) -> None:
        """Called by an engine; whatever it asked for before is forgotten."""
        self._lines[ask.member] = _Line()
        await self._asks.put(ask)

    async def next_ask(self, timeout_s: float) -> Ask | None:
        """Called by the learner; None if nobody asks in time."""
        return await _within(timeout_s, self._asks.get())

    async def call(self, member: str, method: str, argument: Any) -> None:
        """Called by the learner; returns when the engine has done it."""
        line = self._lines[member]
        await line.calls.put(Call(method, argument))
        await line.done.get()

    async def next_call(self, member: str, timeout_s: float) -> Call | None:
        """Called by the engine; None if the learner wants nothing in time."""
        return await _within(timeout_s, self._lines[member].calls.get())

    async def done(self, member: str) -> None:
        """Called by the engine after each call."""
        await self._lines[member].done.put(None)


T = TypeVar("T")


async def _within(timeout_s: float, awaited: Coroutine[Any, Any, T]) -> T | None:
    try:
        return await asyncio.wait_for(awaited, timeout_s)
    except TimeoutError:
        return None


class StoreFeed:
    """`services.weights.WeightFeed` and `Sender` on a store: what a rollout worker is given."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._serial = ""
        self._member = uuid.uuid4().hex

    async def next(self, timeout_s: float) -> Weights | None:
        """See `WeightFeed`. A store that is being restarted has nothing new yet."""
        try:
            publication: Publication | None = await self._store.next.remote(self._serial, timeout_s)
            if publication is None:
                return None
            weights: Weights = await publication.reference[0]
        except (RayActorError, ObjectLostError):
            await asyncio.sleep(min(_PAUSE_S, timeout_s))
            return None
        self._serial = publication.serial
        return weights if weights.buffer.size else replace(weights, sender=self)

    async def calls(self, world_size: int) -> AsyncIterator[Call]:
        """See `services.weights.Sender`."""
        try:
            await self._store.ask.remote(Ask(self._member, world_size))
            while True:
                call: Call | None = await self._store.next_call.remote(self._member, _CALL_S)
                if call is None:
                    raise TransferFailed(f"the learner sent nothing for {_CALL_S:g} s")
                yield call
                await self._store.done.remote(self._member)
                if call.method == "finish_weight_update":
                    return
        except RayActorError as error:
            raise TransferFailed(f"the weight store died: {error}") from error


def hand_over(store: Any, weights: Weights, timeout_s: float) -> None:
    """Makes `weights` the newest of a `WeightStore`, in two calls of at most `timeout_s` each.

    Raises:
        RayActorError: it died, or is being restarted.
        GetTimeoutError: it does not answer.
    """
    ray.get(store.make_room.remote(), timeout=timeout_s)
    ray.get(store.publish.remote(weights), timeout=timeout_s)


def start_store(name: str) -> Any:
    """The run's store: a named Ray actor on the head, started if it is not there yet."""
    return (
        ray.remote(WeightStore)
        .options(
            name=name,
            get_if_exists=True,
            num_cpus=HEAD.cpus,
            resources=HEAD.custom,
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote()
    )
