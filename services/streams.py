"""Redis Streams with an atomic hand-off: exactly one result for every prompt.

    scope:{RUN}:FIRST ─▶ … ─▶ :LAST ─▶ (trained)          in the order of services.pipeline
                  └───────┴──────┴──▶ :dead

An item is in exactly one stream from the moment it is fed until it is trained or dead, because
every move is one Lua script: acknowledge here *and only if that succeeded* add there and delete
here. A worker whose item was taken over meanwhile is told so (`hand_off` returns False) and
throws its result away. Streams are never trimmed: MAXLEN would drop pending items silently.

So at any time `fed = trained + dead + in flight`, and `Streams.ledger` reads all of it in one
transaction. The braces in the keys keep one run in one Redis Cluster slot. Works with Redis 6.2
and later, and Valkey.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from services import stream_scripts as scripts
from services.pipeline import PIPELINE, TRAIN, Pipeline

StreamName: TypeAlias = str  # one of `Pipeline.streams`

_LONG_IDLE_MS = 10**9  # past every lease
_NOBODY = "nobody"  # the consumer that holds what the dead held; it is never deleted itself
GROUP = "stage"  # one consumer group a stream: each item goes to one worker of the next stage


@dataclass(frozen=True, slots=True)
class Claim:
    """An item that this worker holds: pending in `lane`'s stream `stream` under `id`."""

    lane: Streams
    stream: StreamName
    id: str
    payload: bytes
    deliveries: int = 1
    last_failure: str = ""  # traceback of the delivery before, when that one failed


_Item: TypeAlias = tuple[str, bytes, "asyncio.Future[bool]"]


@dataclass
class _Leaving:
    """Hand-offs from one stream to another that wait for their turn on the wire."""

    items: list[_Item] = field(default_factory=list)
    on_the_wire: asyncio.Lock = field(default_factory=asyncio.Lock)

    def take(self) -> list[_Item]:
        taken, self.items = self.items, []
        return taken


@dataclass(frozen=True, slots=True)
class DeadItem:
    """An item that was given up, with what broke it."""

    id: str
    stream: StreamName
    reason: str
    detail: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every prompt is, read in one transaction. `trained` counts groups that a durable
    checkpoint contains; `consumed` those that a gradient step has used, durable or not."""

    fed: int
    trained: int
    consumed: int
    dead: int
    step: int
    depth: dict[str, int]  # items in each stream
    age_s: dict[str, float]  # seconds that the oldest item of each stream has waited

    @property
    def in_flight(self) -> int:
        """Prompts in any of the streams."""
        return sum(self.depth.values())

    def slowest(self, groups_per_step: int) -> str:
        """The stream with the oldest item; the learner's, which is the last, only when it has a
        step's groups that no step has used (the others wait for a checkpoint), or nothing else
        has any."""
        *work, last = self.depth
        unused = self.depth[last] - (self.consumed - self.trained)
        learner = unused >= groups_per_step or self.depth[last] == self.in_flight
        return max([*work, last] if learner else work, key=lambda name: self.age_s[name])

    @property
    def exact(self) -> bool:
        """Whether every prompt that was fed is somewhere, and once."""
        return self.fed == self.trained + self.dead + self.in_flight


class Streams:
    """The streams of one run. A `lane` is a second, separate set of them: evaluation prompts
    travel through the same workers and never touch the training ledger. As a context it closes
    its connection."""

    def __init__(
        self, redis: Redis, run: str, lane: str = TRAIN, pipeline: Pipeline = PIPELINE
    ) -> None:
        self.redis = redis
        self.run = run
        self.pipeline = pipeline
        self.results = pipeline.results(lane)
        self._prefix = f"scope:{{{run}}}:{lane}:" if lane else f"scope:{{{run}}}:"
        self._workers = f"scope:{{{run}}}:workers"  # of the run: a worker serves every lane
        register = redis.register_script
        self._feed = register(scripts.FEED)
        self._hand_off = register(scripts.HAND_OFF)
        self._bury = register(scripts.BURY)
        self._requeue = register(scripts.REQUEUE)
        self._settle = register(scripts.SETTLE)
        self._renew = register(scripts.RENEW)
        self._release = register(scripts.RELEASE)
        self._abandon = register(scripts.ABANDON)
        self._take_over = register(scripts.TAKE_OVER)
        self._restore = register(scripts.RESTORE)
        self._discard = register(scripts.DISCARD)
        self._leaving: dict[tuple[StreamName, StreamName], _Leaving] = defaultdict(_Leaving)

    async def __aenter__(self) -> Streams:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.redis.aclose()

    def of(self, lane: str) -> Streams:
        """Another lane of the same run, over the same connection."""
        return Streams(self.redis, self.run, lane, self.pipeline)

    def key(self, name: str) -> str:
        """`name` as a key in Redis: of this run and lane."""
        return self._prefix + name

    async def create(self) -> None:
        """Makes every stream's consumer group; harmless when they exist (XGROUP CREATE)."""
        for name in self.pipeline.streams:
            try:
                await self.redis.xgroup_create(self.key(name), GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    # ------------------------------------------------------------------ the feeder's side

    async def feed(
        self, payloads: Sequence[bytes], *, expected_fed: int, max_in_flight: int
    ) -> tuple[int, int]:
        """Adds as many of `payloads`, in order, as the budget admits.

        Nothing is added when the ledger's `fed` is not `expected_fed`, so a feeder that was
        restarted, or retried after a lost answer, cannot feed a prompt twice.

        Returns:
            (how many were added, the ledger's `fed` now).
        """
        added, fed = await self._feed(
            keys=[self.key("ledger"), self.key(self.pipeline.source), self.key("dead")],
            args=[expected_fed, max_in_flight, *payloads],
        )
        return int(added), int(fed)

    # ------------------------------------------------------------------- a worker's side

    async def hand_off(self, claim: Claim, target: StreamName, payload: bytes) -> bool:
        """Moves the item on in one atomic step; False if it was taken over meanwhile.

        Hand-offs that are asked for while one is on the wire go together in the next: one round
        trip for all of them.
        """
        leaving = self._leaving[claim.stream, target]
        moved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        leaving.items.append((claim.id, payload, moved))
        async with leaving.on_the_wire:
            if not moved.done():
                await self._hand_off_all(claim.stream, target, leaving.take())
        return await moved

    async def _hand_off_all(
        self, stream: StreamName, target: StreamName, items: list[_Item]
    ) -> None:
        try:
            moved = await self._hand_off(
                keys=[self.key(stream), self.key(target), self.key("failures")],
                args=[GROUP, *(part for id_, payload, _ in items for part in (id_, payload))],
            )
        except RedisError as error:
            for _, _, future in items:
                future.set_exception(error)
        else:
            for (_, _, future), ours in zip(items, moved, strict=True):
                future.set_result(bool(ours))
        finally:
            for _, _, future in items:
                future.cancel()  # only where this was cancelled itself

    async def bury(self, claim: Claim, reason: str, detail: str = "") -> bool:
        """Gives the item up: to `dead`, with the reason. False if it was taken over."""
        moved = await self._bury(
            keys=[self.key(claim.stream), self.key("dead"), self.key("failures")],
            args=[GROUP, claim.id, claim.stream, reason, detail],
        )
        return bool(moved)

    async def renew(self, stream: StreamName, consumer: str, ids: Sequence[str]) -> set[str]:
        """Heartbeat (XCLAIM … JUSTID): restarts the lease; returns the ids still held."""
        if not ids:
            return set()
        held = await self._renew(keys=[self.key(stream)], args=[GROUP, consumer, *ids])
        return {item.decode() for item in held}

    async def release(self, claim: Claim, consumer: str, detail: str) -> bool:
        """Gives the item back after a failure, free to be taken over at once."""
        released = await self._release(
            keys=[self.key(claim.stream), self.key("failures")],
            args=[GROUP, consumer, claim.id, _LONG_IDLE_MS, detail],
        )
        return bool(released)

    async def abandon(self, dead: re.Pattern[str]) -> int:
        """Frees what consumers whose names match `dead` held in the workers' streams, so that
        others take it over at once rather than when its lease has run out. Each such item counts
        as delivered once more. Returns how many there were."""
        freed = 0
        gone = [name for name in await self.reports() if dead.fullmatch(name)]
        if gone:
            await self.redis.hdel(self._workers, *gone)
        for step in self.pipeline.steps:
            name = step.reads
            consumers: Any = await self.redis.xinfo_consumers(self.key(name), GROUP)
            for consumer in (entry["name"].decode() for entry in consumers):
                if consumer != _NOBODY and dead.fullmatch(consumer):
                    freed += int(
                        await self._abandon(
                            keys=[self.key(name)],
                            args=[GROUP, consumer, _LONG_IDLE_MS, _NOBODY],
                        )
                    )
        return freed

    async def take_over(
        self, stream: StreamName, consumer: str, *, lease_s: float, count: int
    ) -> list[Claim]:
        """Claims up to `count` items whose worker stopped renewing them (XAUTOCLAIM)."""
        claims: list[Claim] = []
        cursor = "0-0"
        while len(claims) < count:
            cursor_raw, taken = await self._take_over(
                keys=[self.key(stream), self.key("failures")],
                args=[GROUP, consumer, int(lease_s * 1000), cursor, count - len(claims)],
            )
            claims += [
                Claim(self, stream, id_.decode(), payload, int(deliveries), failure.decode())
                for id_, payload, deliveries, failure in taken
            ]
            cursor = cursor_raw.decode()
            if cursor == "0-0":
                break
        return claims

    async def held(self, stream: StreamName, consumer: str) -> list[Claim]:
        """What `consumer` already holds, oldest first: the replay log after a crash."""
        reply = await self.redis.xreadgroup(GROUP, consumer, {self.key(stream): "0"})
        return _claims({self.key(stream): self}, stream, reply)

    async def settle(self, stream: StreamName, ids: Sequence[str]) -> int:
        """Takes items out for good and counts them as trained; ids already settled count 0."""
        if not ids:
            return 0
        return int(
            await self._settle(keys=[self.key(stream), self.key("ledger")], args=[GROUP, *ids])
        )

    async def advance(self, *, consumed: int, step: int) -> None:
        """Publishes the learner's progress: what admission counts from (HSET)."""
        await self.redis.hset(self.key("ledger"), mapping={"consumed": consumed, "step": step})

    # ----------------------------------------------------------- mending, while nobody works

    async def items(self) -> list[tuple[StreamName, str, bytes]]:
        """Everything in flight: (stream, id, payload). Reads all of it, so for a stopped run."""
        items: list[tuple[StreamName, str, bytes]] = []
        for name in self.pipeline.streams:
            entries: Any = await self.redis.xrange(self.key(name))
            items += [(name, id_.decode(), fields[b"item"]) for id_, fields in entries]
        return items

    async def discard(self, stream: StreamName, id_: str) -> None:
        """Takes out an item that the surviving history already holds."""
        await self._discard(keys=[self.key(stream)], args=[GROUP, id_])

    async def forget(self, item: DeadItem) -> None:
        """Takes a dead item out for good (XDEL)."""
        await self.redis.xdel(self.key("dead"), item.id)

    async def restore(self, *, fed: int, trained: int, payloads: Sequence[bytes]) -> None:
        """Sets the ledger to a history that a checkpoint holds, and feeds what is missing in it,
        in one step."""
        await self._restore(
            keys=[self.key("ledger"), self.key(self.pipeline.source)],
            args=[fed, trained, *payloads],
        )

    # --------------------------------------------------------------------- the dead, status

    async def dead(self, after: str = "0") -> list[DeadItem]:
        """The dead items past the id `after`, oldest first."""
        entries: Any = await self.redis.xrange(self.key("dead"), f"({after}")
        return [
            DeadItem(
                id=id_.decode(),
                stream=fields[b"stream"].decode(),
                reason=fields[b"reason"].decode(),
                detail=fields[b"detail"].decode(),
                payload=fields[b"item"],
            )
            for id_, fields in entries
        ]

    async def requeue(self, item: DeadItem) -> bool:
        """Puts a dead item back at the end of the stream it broke on."""
        moved = await self._requeue(keys=[self.key("dead"), self.key(item.stream)], args=[item.id])
        return bool(moved)

    async def ledger(self) -> Ledger:
        """Reads the ledger in one transaction (MULTI), so that its sum is exact."""
        names = self.pipeline.streams
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(self.key("ledger"))
            pipe.xlen(self.key("dead"))
            pipe.time()
            for name in names:
                pipe.xlen(self.key(name))
                pipe.xrange(self.key(name), count=1)
            counts, dead, (seconds, micros), *streams = await pipe.execute()
        now_ms = seconds * 1000 + micros / 1000
        return Ledger(
            fed=int(counts.get(b"fed", 0)),
            trained=int(counts.get(b"trained", 0)),
            consumed=int(counts.get(b"consumed", 0)),
            dead=dead,
            step=int(counts.get(b"step", 0)),
            depth=dict(zip(names, streams[::2], strict=True)),
            age_s={
                name: max(0.0, now_ms - int(first[0][0].split(b"-")[0])) / 1000 if first else 0.0
                for name, first in zip(names, streams[1::2], strict=True)
            },
        )

    async def want(self, role: str, count: int) -> None:
        """Leaves how many workers of a role the user wants, for the run's driver (HSET)."""
        await self.redis.hset(self._prefix + "wanted", role, count)

    async def wanted(self) -> dict[str, int]:
        """What `want` left."""
        raw: Any = await self.redis.hgetall(self._prefix + "wanted")
        return {role.decode(): int(count) for role, count in raw.items()}

    async def report(self, worker: str, state: dict[str, Any]) -> None:
        """Leaves a worker's state where `scope status` finds it (HSET)."""
        await self.redis.hset(self._workers, worker, json.dumps(state))

    async def reports(self) -> dict[str, dict[str, Any]]:
        """The last state that each worker left."""
        raw: Any = await self.redis.hgetall(self._workers)
        return {worker.decode(): json.loads(state) for worker, state in raw.items()}


async def claim(
    lanes: Sequence[Streams], stream: StreamName, consumer: str, *, count: int, block_ms: int
) -> list[Claim]:
    """Claims up to `count` new items of each lane (XREADGROUP), waiting up to `block_ms`."""
    by_key = {lane.key(stream): lane for lane in lanes}
    reply = await lanes[0].redis.xreadgroup(
        GROUP, consumer, dict.fromkeys(by_key, ">"), count=count, block=block_ms
    )
    return _claims(by_key, stream, reply)


def _claims(by_key: dict[str, Streams], stream: StreamName, reply: Any) -> list[Claim]:
    return [
        Claim(by_key[key.decode()], stream, id_.decode(), fields[b"item"])
        for key, entries in reply or ()
        for id_, fields in entries
    ]
