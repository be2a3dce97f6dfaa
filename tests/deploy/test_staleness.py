"""The bound on the age of samples over random schedules: feeder and reader on a real Redis, and
workers between them that are late, overtake one another, die, and give prompts up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.config import DataConfig, SamplingConfig
from rollout.feeder import Feeder
from rollout.prompts import PromptSource, Row
from services.config import StageConfig
from services.redis_server import EmbeddedRedis
from services.stage import Connection
from services.streams import Claim, Streams, claim
from services.trajectory import Prompt, decode, encode
from tests.builders import VOCAB, scored_group
from tests.waiting import DEADLINE_S
from trainer import reader
from trainer.checkpoint import Progress, ranges
from trainer.reader import GroupReader, Stalled

TOTAL, GROUPS = 16, 2
SOURCE = PromptSource(
    [Row(np.array([i], np.int32), "test", str(i)) for i in range(TOTAL)],
    SamplingConfig(n=1, max_tokens=5),
    seed=0,
    data=DataConfig(path=Path("x.jsonl"), max_prompt_tokens=4),
)


class Pipeline:
    """One run whose every event is called for by the schedule."""

    def __init__(self, connection: Connection, streams: Streams, max_staleness: int) -> None:
        self.connection, self.streams, self.max_staleness = connection, streams, max_staleness
        self.feeder = Feeder(
            connection,
            SOURCE,
            total=TOTAL,
            groups_per_step=GROUPS,
            max_staleness=max_staleness,
        )
        self.reader: GroupReader
        self.resources = AsyncExitStack()
        self.step = self.loaded = 0  # versions: the learner's, and the workers'
        self.saved: Progress | None = None
        self.sampling: list[tuple[Claim, Prompt, int]] = []  # with the version at its first token
        self.ages: list[int] = []

    async def start(self) -> None:
        made = GroupReader(
            self.connection,
            need="incorrect",
            vocabulary=VOCAB,
            groups_per_step=GROUPS,
            max_staleness=self.max_staleness,
            total=TOTAL,
            timeout_s=0.0,
        )
        self.reader = await self.resources.enter_async_context(made)
        await self.reader.start(self.saved)
        self.step = self.loaded = self.saved.step if self.saved else 0

    async def waiting(self, stream: str) -> int:
        """Items that nobody has claimed."""
        key = self.streams.key(stream)
        pending = await self.streams.redis.xpending(key, "stage")
        return int(await self.streams.redis.xlen(key) - pending["pending"])

    async def feed(self) -> None:
        await self.feeder.admit(self.streams, await self.streams.ledger())

    async def load(self, _: int = 0) -> None:
        """The workers get the newest weights; what they are sampling goes on (`keep`)."""
        self.loaded = self.step

    async def begin(self) -> None:
        """The workers take all that there is; what they have no weights for, they give back."""
        for item in await self.passing():
            await self.streams.hand_off(item, "scored", item.payload)
        found = await self.streams.take_over("prompts", "w", lease_s=1000, count=TOTAL)
        if await self.waiting("prompts"):
            found += await claim([self.streams], "prompts", "w", count=TOTAL, block_ms=1)
        for item in found:
            asked = decode(Prompt, item.payload)
            if asked.min_weight_version <= self.loaded:
                self.sampling.append((item, asked, self.loaded))
            else:
                await self.streams.release(item, "w", "waits for weights")

    async def sample(self, which: int, into: str) -> None:
        if self.sampling:
            item, asked, version = self.sampling.pop(which % len(self.sampling))
            made = scored_group(["correct"], order=asked.order)
            rollout = replace(made.rollout, prompt=asked, weight_version=version)
            group = replace(made, verified=replace(made.verified, rollout=rollout))
            await self.streams.hand_off(item, into, encode(group))

    async def finish(self, which: int = 0) -> None:
        await self.sample(which, "scored")

    async def give_up_late(self, which: int) -> None:
        """After it was sampled: put back to work, it has become old."""
        await self.sample(which, "verified")
        for item in await self.passing():
            await self.streams.bury(item, "broken")

    async def passing(self) -> list[Claim]:
        if not await self.waiting("verified"):
            return []
        return await claim([self.streams], "verified", "t", count=TOTAL, block_ms=1)

    async def worker_dies(self, which: int) -> None:
        if self.sampling:
            item, *_ = self.sampling.pop(which % len(self.sampling))
            await self.streams.release(item, "w", "died")

    async def give_up(self, which: int) -> None:
        if self.sampling:
            item, *_ = self.sampling.pop(which % len(self.sampling))
            await self.streams.bury(item, "broken")

    async def corrupt(self, which: int) -> None:
        if self.sampling:
            item, *_ = self.sampling.pop(which % len(self.sampling))
            await self.streams.hand_off(item, "scored", item.payload[:-1])

    async def requeue(self, which: int) -> None:
        if dead := await self.streams.dead():
            await self.streams.requeue(dead[which % len(dead)])

    async def train(self, _: int = 0) -> bool:
        """False when nothing is left."""
        while await self.waiting("scored"):  # until the reader has claimed all
            assert not self.reader._claiming.done()
            await asyncio.sleep(0.001)
        try:
            taken = await self.reader.next_step(self.step)
        except Stalled:
            return True
        if taken:
            self.ages += [self.step - item.group.rollout.weight_version for item in taken]
            self.step += 1
            orders = [item.group.prompt.order for item in taken]
            await self.reader.trained(self.step, [item.claim for item in taken], orders)
        return bool(taken)

    async def save(self, _: int = 0) -> None:
        entries = list(self.reader.unsettled)
        self.saved = Progress(self.step, entries, ranges(self.reader.covered))
        await self.reader.settle(entries)

    async def learner_dies(self, _: int = 0) -> None:
        await self.resources.aclose()
        await self.start()

    async def finish_all(self) -> None:
        """From here on all goes well: whatever happened before, the run must end."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.train():
                await self.feed()
                await self.load()
                await self.begin()
                while self.sampling:
                    await self.finish()
        await self.resources.aclose()


ACTIONS: list[Callable[[Pipeline, int], object]] = [
    *[Pipeline.finish, Pipeline.finish, Pipeline.train, Pipeline.load] * 3,
    *[Pipeline.worker_dies, Pipeline.give_up, Pipeline.corrupt, Pipeline.give_up_late],
    *[Pipeline.requeue, Pipeline.save, Pipeline.learner_dies],
]
events = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5))
schedules = st.lists(events, min_size=20, max_size=100)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(max_staleness=st.integers(0, 2), schedule=schedules)
async def test_no_trained_token_is_older_than_the_bound(
    redis_server: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    max_staleness: int,
    schedule: list[tuple[Callable[[Pipeline, int], object], int]],
) -> None:
    monkeypatch.setattr(reader, "_BLOCK_MS", 5)
    run = f"staleness-{uuid.uuid4().hex[:8]}"
    connection = Connection(redis_server.url, run, StageConfig())
    async with connection.streams() as streams:
        pipeline = Pipeline(connection, streams, max_staleness)
        await pipeline.start()
        for action, which in schedule:
            await pipeline.feed()
            await pipeline.begin()
            await action(pipeline, which)  # type: ignore[misc]
        await pipeline.finish_all()
        ledger = await streams.ledger()
    assert max(pipeline.ages, default=0) <= max_staleness
    assert ledger.consumed + ledger.dead == ledger.fed == TOTAL
