"""Model checking in the small: random interleavings of claims, time-outs, take-overs, crashes
and hand-offs on a real Redis, against the plainest model of where each item is."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from services.pipeline import PIPELINE
from services.redis_server import EmbeddedRedis, connect
from services.streams import GROUP, Claim, StreamName, Streams, claim

WORKERS = ("a", "b", "c")
NEXT: dict[str, StreamName] = {"prompts": "rollouts", "rollouts": "verified", "verified": "scored"}


class HandOff(RuleBasedStateMachine):
    """Claims outlive take-overs here: a worker that was stopped and wakes up still has its old
    claim and tries to hand it off, which is what the scripts must refuse."""

    url = ""
    claims = Bundle("claims")

    @initialize()
    def connect(self) -> None:
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.streams = Streams(self.redis, f"machine-{uuid.uuid4()}")
        self.run(self.redis.config_set("hz", 500))  # how often it sees that a claim waited enough
        self.run(self.streams.create())
        self.where: dict[str, str] = {}  # order -> stream, "dead" or "trained"
        self.results: dict[str, int] = {}  # order -> how often it left the last stream

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    @rule(count=st.integers(1, 3), wrong_cursor=st.booleans())
    def feed(self, count: int, wrong_cursor: bool) -> None:
        fed = len(self.where)
        payloads = [str(fed + i).encode() for i in range(count)]
        expected = fed + 1 if wrong_cursor else fed
        added, now = self.run(
            self.streams.feed(payloads, expected_fed=expected, max_in_flight=1000)
        )
        assert (added, now) == ((0, fed) if wrong_cursor else (count, fed + count))
        if not wrong_cursor:
            self.where |= {p.decode(): "prompts" for p in payloads}

    @rule(target=claims, stream=st.sampled_from(PIPELINE.streams), worker=st.sampled_from(WORKERS))
    def claim(self, stream: StreamName, worker: str) -> Any:
        taken = self.run(claim([self.streams], stream, worker, count=2, block_ms=1))
        return self._check(stream, worker, taken)

    @rule(target=claims, stream=st.sampled_from(PIPELINE.streams), worker=st.sampled_from(WORKERS))
    def take_over(self, stream: StreamName, worker: str) -> Any:
        """Every lease has run out."""
        taken = self.run(self.streams.take_over(stream, worker, lease_s=0, count=2))
        return self._check(stream, worker, taken)

    def _check(self, stream: StreamName, worker: str, taken: list[Claim]) -> Any:
        for item in taken:
            assert self.where[item.payload.decode()] == stream
        return multiple(*[(worker, item) for item in taken])

    @rule(held=claims)
    def renew(self, held: tuple[str, Claim]) -> None:
        worker, item = held
        self.run(self.streams.renew(item.stream, worker, [item.id]))

    @rule(held=claims)
    def release(self, held: tuple[str, Claim]) -> None:
        worker, item = held
        self.run(self.streams.release(item, worker, "failed"))

    @rule(worker=st.sampled_from(WORKERS))
    def abandon(self, worker: str) -> None:
        """The driver saw the worker die. It may live on unseen, and use its claims."""
        self.run(self.streams.abandon(re.compile(worker)))

    @rule()
    def resume(self) -> None:
        """The driver died, and with it everybody; a new one frees all that was held."""
        self.run(self.streams.abandon(re.compile(".*")))
        for stream in NEXT:
            pending = self.run(self.redis.xpending(self.streams.key(stream), GROUP))["pending"]
            unread = self.run(claim([self.streams], stream, "a", count=1000, block_ms=1))
            there = self.run(self.redis.xlen(self.streams.key(stream)))
            assert pending + len(unread) == there  # none that nobody would ever be given

    @rule(first=consumes(claims), second=consumes(claims))
    def hand_off_together(self, first: tuple[str, Claim], second: tuple[str, Claim]) -> None:
        """Two that wait for the wire at once, perhaps with the same item."""
        items = [item for _, item in (first, second) if item.stream in NEXT]

        async def together() -> list[bool]:
            moves = [self.streams.hand_off(i, NEXT[i.stream], i.payload) for i in items]
            return await asyncio.gather(*moves)

        for item, moved in zip(items, self.run(together()), strict=True):
            self._expect(item, moved, NEXT[item.stream])

    @rule(held=consumes(claims))
    def hand_off(self, held: tuple[str, Claim]) -> None:
        _, item = held
        if item.stream not in NEXT:
            return
        moved = self.run(self.streams.hand_off(item, NEXT[item.stream], item.payload))
        self._expect(item, moved, NEXT[item.stream])

    @rule(held=claims)
    def bury(self, held: tuple[str, Claim]) -> None:
        _, item = held
        self._expect(item, self.run(self.streams.bury(item, "poison")), "dead")

    @rule(held=claims)
    def settle(self, held: tuple[str, Claim]) -> None:
        _, item = held
        if item.stream != "scored":
            return
        moved = bool(self.run(self.streams.settle("scored", [item.id])))
        self._expect(item, moved, "trained")
        self.results[item.payload.decode()] = self.results.get(item.payload.decode(), 0) + moved

    def _expect(self, item: Claim, moved: bool, target: str) -> None:
        """A move succeeds if and only if the item is still in the stream it was claimed from,
        as the very entry that was claimed."""
        order = item.payload.decode()
        if moved:
            assert self.where[order] == item.stream
            self.where[order] = target

    @rule()
    def requeue(self) -> None:
        for dead in self.run(self.streams.dead()):
            assert self.run(self.streams.requeue(dead))
            self.where[dead.payload.decode()] = dead.stream

    @invariant()
    def every_item_is_in_exactly_one_place(self) -> None:
        found: dict[str, str] = {}
        for stream, _, payload in self.run(self.streams.items()):
            assert payload.decode() not in found
            found[payload.decode()] = stream
        for dead in self.run(self.streams.dead()):
            assert dead.payload.decode() not in found
            found[dead.payload.decode()] = "dead"
        assert found == {o: w for o, w in self.where.items() if w != "trained"}
        assert all(count == 1 for count in self.results.values() if count)

    @invariant()
    def the_ledger_is_exact(self) -> None:
        ledger = self.run(self.streams.ledger())
        assert ledger.exact
        assert ledger.fed == len(self.where)
        assert ledger.trained == sum(w == "trained" for w in self.where.values())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.redis.aclose())
            self.runner.close()


@pytest.mark.slow
def test_hand_off(redis_server: EmbeddedRedis) -> None:
    HandOff.url = redis_server.url
    run_state_machine_as_test(
        HandOff, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )
