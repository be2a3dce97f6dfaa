"""The worker on a real Redis with real judges: verdicts, truncation, and the exact ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from deploy.status import render, summary
from services.pipeline import EVAL
from services.stage import Connection, totals
from services.streams import Ledger, Streams, claim
from services.trajectory import (
    Finish,
    Prompt,
    RolloutGroup,
    Sampling,
    Trajectory,
    Verdict,
    VerifiedGroup,
    decode,
    encode,
)
from tests.builders import post
from tests.waiting import DEADLINE_S
from verifier.config import VerifierConfig
from verifier.worker import VerifierWorker

ENDLESS = "tests.verifier.endless:judge"


def group(
    order: int, texts: Sequence[str], reference: str, *, source: str = "", finish: Finish = "stop"
) -> RolloutGroup:
    prompt = Prompt(
        id=f"p{order}",
        order=order,
        token_ids=np.array([1, 2], np.int32),
        data_source=source,
        reference=reference,
        sampling=Sampling(n=len(texts), max_tokens=8),
    )
    trajectories = tuple(
        Trajectory(np.array([3, 4], np.int32), np.array([-0.5, -0.1], np.float32), finish, text)
        for text in texts
    )
    return RolloutGroup(prompt, trajectories, weight_version=7)


async def put(streams: Streams, payloads: Sequence[bytes]) -> None:
    """Brings `payloads` to "rollouts" the way of every prompt: fed, then handed off."""
    fed = (await streams.ledger()).fed
    await streams.feed([b"prompt"] * len(payloads), expected_fed=fed, max_in_flight=1_000)
    claims = await claim([streams], "prompts", "rollout", count=len(payloads), block_ms=1_000)
    for item, payload in zip(claims, payloads, strict=True):
        assert await streams.hand_off(item, "rollouts", payload)


async def ledger_when(streams: Streams, condition: Callable[[Ledger], bool]) -> Ledger:
    async with asyncio.timeout(DEADLINE_S):
        while not condition(ledger := await streams.ledger()):
            assert ledger.exact, ledger
            await asyncio.sleep(0.01)
    return ledger


async def verified(streams: Streams) -> dict[int, VerifiedGroup]:
    claims = await claim([streams], "verified", "teacher", count=100, block_ms=100)
    groups = [decode(VerifiedGroup, item.payload) for item in claims]
    return {group.rollout.prompt.order: group for group in groups}


def made(connection: Connection, config: VerifierConfig) -> VerifierWorker:
    return VerifierWorker(post(connection, "verifier", capacity=config.capacity), config)


@asynccontextmanager
async def running(connection: Connection, config: VerifierConfig) -> AsyncIterator[None]:
    async with connection.streams(EVAL) as evaluation:
        await evaluation.create()  # both lanes exist before any worker starts
    worker = made(connection, config)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run())
        yield
        await worker.stop()


async def test_groups_get_their_verdicts_and_the_ledger_stays_exact(
    connection: Connection, streams: Streams
) -> None:
    config = VerifierConfig(kind="math", kinds={"letters": "exact"}, answer_marker="=>")
    groups = [
        group(0, [r"\boxed{0.5}", r"\boxed{2}", "no idea"], r"\frac{1}{2}", source="deepmath"),
        group(1, ["=> b", "b", "=> a"], "b", source="letters"),
        group(2, [], "1"),
    ]
    await put(streams, [encode(item) for item in groups])
    async with running(connection, config):
        ledger = await ledger_when(streams, lambda now: now.depth["verified"] == 3)
    assert ledger.exact
    assert ledger.depth["rollouts"] == ledger.dead == 0
    found = await verified(streams)
    assert [v.outcome for v in found[0].verdicts] == ["correct", "incorrect", "incorrect"]
    assert [v.outcome for v in found[1].verdicts] == ["correct", "incorrect", "incorrect"]
    assert found[2].verdicts == ()
    assert found[0].rollout.weight_version == 7
    assert [t.text for t in found[0].rollout.trajectories] == [
        t.text for t in groups[0].trajectories
    ]


@pytest.mark.parametrize(
    ("overlong", "verdict"),
    [
        ("incorrect", Verdict("incorrect", "truncated: no end token")),
        ("mask", Verdict("unknown", "masked: truncated")),
    ],
)
async def test_a_truncated_trajectory_is_not_judged(
    connection: Connection, streams: Streams, overlong: str, verdict: Verdict
) -> None:
    config = VerifierConfig.model_validate({"kind": "exact", "overlong": overlong})
    await put(streams, [encode(group(0, ["42"], "42", finish="length"))])
    async with running(connection, config):
        await ledger_when(streams, lambda now: now.depth["verified"] == 1)
    assert (await verified(streams))[0].verdicts == (verdict,)


async def test_a_corrupted_item_dies_alone_and_says_why(
    connection: Connection, streams: Streams
) -> None:
    intact = encode(group(0, ["42"], "42"))
    corrupted = intact[:-1] + bytes([intact[-1] ^ 1])
    await put(streams, [corrupted, intact, encode(group(1, [], "").prompt)])
    async with running(connection, VerifierConfig(kind="exact")):
        ledger = await ledger_when(
            streams, lambda now: now.depth["verified"] == 1 and now.dead == 2
        )
    assert ledger.exact
    reasons = {item.payload: item.reason for item in await streams.dead()}
    assert "checksum mismatch" in reasons[corrupted]
    assert any("expected a RolloutGroup, found a Prompt" in reason for reason in reasons.values())


@pytest.mark.slow
async def test_a_bomb_is_unknown_and_the_rest_of_its_group_is_judged(
    connection: Connection, streams: Streams
) -> None:
    config = VerifierConfig(kind=ENDLESS, deadline_s=5.0)
    await put(streams, [encode(group(0, ["bomb", "5"], "5"))])
    async with running(connection, config):
        await ledger_when(streams, lambda now: now.depth["verified"] == 1)
    bomb, right = (await verified(streams))[0].verdicts
    assert bomb == Verdict("unknown", "the judge took longer than 5 s")
    assert right.outcome == "correct"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quick_s", "queue"),
    [
        (DEADLINE_S, {"waiting": 2, "slow": 0, "replaced": 0}),  # two wait for the only judge
        (0.1, {"waiting": 2, "slow": 3, "replaced": 3}),  # two wait for the judge of the slow
    ],
)
async def test_the_queue_and_the_slow_show_in_the_status_and_the_metrics(
    connection: Connection,
    streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
    quick_s: float,
    queue: dict[str, int],
) -> None:
    monkeypatch.setattr("verifier.judge_pool._QUICK_S", quick_s)
    await put(streams, [encode(group(0, ["bomb"] * 3, "5"))])
    await connection.streams(EVAL).create()
    config = VerifierConfig(kind=ENDLESS, deadline_s=DEADLINE_S)
    work = asyncio.create_task(made(connection, config).run())
    seen: dict[str, float] = {}
    async with asyncio.timeout(DEADLINE_S):
        while seen != queue:  # where it comes to rest: bombs never end
            await asyncio.sleep(0.05)
            reports = await streams.reports()
            metrics = totals(reports.values())
            seen = {name: metrics.get(f"verifier/{name}", 0) for name in queue}
    work.cancel()
    await asyncio.wait({work})
    status = {**summary(await streams.ledger()), "workers": reports, "as_of": time.time()}
    said = ", ".join(f"{name} {count}" for name, count in queue.items())
    assert f"0 done, 1 in work, {said}" in render({**status, "live": True})


async def test_evaluation_prompts_stay_in_their_lane(
    connection: Connection, streams: Streams
) -> None:
    async with connection.streams(EVAL) as evaluation:
        await evaluation.create()
        await put(evaluation, [encode(group(0, ["42"], "42"))])
        async with running(connection, VerifierConfig(kind="exact")):
            await ledger_when(evaluation, lambda now: now.depth["verified"] == 1)
        assert (await streams.ledger()).fed == 0
