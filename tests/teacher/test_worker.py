"""The stage on real Redis against a real HTTP server: garbage from the teacher scores nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.config import StageConfig
from services.errors import BadItem, PatienceExceeded, WorkerFailed
from services.stage import Connection
from services.streams import Streams, claim
from services.teacher_need import TeacherNeed
from services.trajectory import (
    Outcome,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Trajectory,
    Verdict,
    VerifiedGroup,
    decode,
    encode,
)
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import Target
from teacher.ends import Ends
from teacher.pool import Servers
from teacher.worker import TeacherSettings, TeacherWorker
from tests.builders import post
from tests.teacher.fakes import FAKE_CARD, FakeScorer, FaultyTeacher, fake_app, listening
from tests.waiting import DEADLINE_S, until

OUTCOMES: Sequence[Outcome] = ("correct", "incorrect", "unknown", "incorrect", "incorrect")
COMPLETIONS: Sequence[list[int]] = ([11], [21, 22], [31], [], [51, 52, 53])


def group(order: int = 0) -> VerifiedGroup:
    """Five trajectories; the fourth is empty."""
    prompt = Prompt(
        id=f"p{order}",
        order=order,
        token_ids=np.array([1, 2], np.int32),
        data_source="test",
        reference="42",
        sampling=Sampling(n=len(OUTCOMES), max_tokens=3),
    )
    trajectories = tuple(
        Trajectory(np.array(ids, np.int32), np.full(len(ids), -0.5, np.float32), "stop", "")
        for ids in COMPLETIONS
    )
    verdicts = tuple(Verdict(outcome, "") for outcome in OUTCOMES)
    return VerifiedGroup(RolloutGroup(prompt, trajectories, 0), verdicts)


async def put(streams: Streams, payload: bytes) -> None:
    """Puts an item on the verified stream, by the way that all items take."""
    await streams.feed([payload], expected_fed=(await streams.ledger()).fed, max_in_flight=100)
    (item,) = await claim([streams], "prompts", "test", count=1, block_ms=1000)
    assert await streams.hand_off(item, "verified", payload)


async def scored(streams: Streams) -> list[ScoredGroup]:
    entries: Any = await streams.redis.xrange(streams.key("scored"))
    return [decode(ScoredGroup, fields[b"item"]) for _, fields in entries]


@asynccontextmanager
async def working(
    connection: Connection,
    url: str,
    need: TeacherNeed = "incorrect",
    *,
    fingerprint: str | None = None,
    timeout_s: float = DEADLINE_S,
    top: int = 0,
) -> AsyncIterator[TeacherWorker]:
    """`running`, with one teacher."""
    servers = {"default": Servers([Target(url, "key")], timeout_s, fingerprint)}
    made = TeacherWorker(post(connection, "teacher"), TeacherSettings(need, top, servers))
    async with running(made) as worker:
        yield worker


@asynccontextmanager
async def running(worker: TeacherWorker) -> AsyncIterator[TeacherWorker]:
    """The worker runs inside of the block and is cut off after it, as a kill would. One that fails
    ends the block at once, with its error."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(worker.run())
        yield worker
        task.cancel()


@pytest.mark.parametrize(
    ("need", "asked", "empty"),
    [("incorrect", [1, 4], [3]), ("all", [0, 1, 4], [3]), ("none", [], [])],
)
async def test_only_what_the_objective_needs_is_scored(
    connection: Connection,
    streams: Streams,
    faulty: FaultyTeacher,
    faulty_url: str,
    need: TeacherNeed,
    asked: list[int],
    empty: list[int],
) -> None:
    original = group()
    await put(streams, encode(original))
    async with working(connection, faulty_url, need):
        (result,) = await until(lambda: scored(streams))
    assert result.teacher == ("f00d" if asked else "")
    assert sorted(result.teacher_logprobs) == sorted(asked + empty)
    for place, logprobs in result.teacher_logprobs.items():
        np.testing.assert_allclose(logprobs, -np.array(COMPLETIONS[place]) / 100, rtol=1e-6)
    sent = [r["sequences"] for r in faulty.requests]
    wanted = [{"prompt": [1, 2], "completion": COMPLETIONS[place]} for place in asked]
    assert sent == ([wanted] if asked else [])
    assert encode(result.verified) == encode(original)
    assert (await streams.ledger()).exact


async def test_the_most_likely_tokens_come_along_where_the_objective_wants_them(
    connection: Connection, streams: Streams, faulty_url: str
) -> None:
    await put(streams, encode(group()))
    async with working(connection, faulty_url, "incorrect", top=2):
        (result,) = await until(lambda: scored(streams))
    assert sorted(result.teacher_top) == sorted(result.teacher_logprobs)
    for place, top in result.teacher_top.items():
        length = len(COMPLETIONS[place])
        assert top.ids.tolist() == [[0, 1]] * length  # the fake's most likely ones
        np.testing.assert_allclose(top.logprobs, np.tile([0.0, -0.01], (length, 1)))


async def test_the_student_s_tokens_are_scored_and_the_entropy_comes_along(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    """The student ends with 53 and the teacher with 3, among the student's tokens too."""
    original = group()
    with pytest.raises(BadItem, match="recorded no most likely tokens"):
        await TeacherWorker(
            post(connection, "teacher"), TeacherSettings("incorrect", student_top=True)
        ).process(original)
    trajectories = tuple(
        replace(t, top=np.tile(np.array([[53, 8]], np.int32), (len(t.token_ids), 1)))
        for t in original.rollout.trajectories
    )
    rollout = replace(original.rollout, trajectories=trajectories)
    await put(streams, encode(replace(original, rollout=rollout)))
    servers = {"default": Servers([Target(faulty_url, "key")], DEADLINE_S)}
    ends = {"default": Ends((53,), 3)}
    settings = TeacherSettings("incorrect", 0, servers, ends, student_top=True, entropy=True)
    async with running(TeacherWorker(post(connection, "teacher"), settings)):
        (result,) = await until(lambda: scored(streams))
    (sent,) = [request["sequences"] for request in faulty.requests]
    assert [one["candidates"] for one in sent] == [[[3, 8]] * 2, [[3, 8]] * 3]
    assert sorted(result.teacher_top) == sorted(result.teacher_entropy) == [1, 3, 4]
    for place, top in result.teacher_top.items():
        assert top.ids is result.rollout.trajectories[place].top  # said once in the record
        np.testing.assert_allclose(top.logprobs, np.tile([-0.03, -0.08], (len(top.ids), 1)))
        np.testing.assert_allclose(
            result.teacher_entropy[place], -result.teacher_logprobs[place] / 2, rtol=1e-6
        )


@pytest.fixture
def two_teachers() -> Iterator[dict[str, str]]:
    """The URL of each: real applications, whose models say different things."""
    code = FAKE_CARD.model_copy(update={"id": "code", "fingerprint": "c0de"})
    app = build_app(
        [Teacher(code, FakeScorer(scale=2.0))],
        KeyRing([]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=1000),
    )
    with listening(fake_app(FakeScorer())) as first, listening(app) as second:
        yield {"default": first, "code": second}


def group_of(teacher: str, order: int) -> VerifiedGroup:
    original = group(order)
    prompt = replace(original.rollout.prompt, teacher=teacher)
    return replace(original, rollout=replace(original.rollout, prompt=prompt))


async def test_each_group_is_scored_by_its_own_teacher(
    connection: Connection, streams: Streams, two_teachers: dict[str, str]
) -> None:
    names = ["default", "code", "code", "default"]
    for order, name in enumerate(names):
        await put(streams, encode(group_of(name, order)))
    fingerprints = {"default": "f00d", "code": "c0de"}
    teachers = {
        name: Servers([Target(url)], DEADLINE_S, fingerprints[name])
        for name, url in two_teachers.items()
    }
    async with running(
        TeacherWorker(post(connection, "teacher"), TeacherSettings("all", 0, teachers))
    ) as worker:

        async def all_there() -> bool:
            return (await streams.ledger()).depth["scored"] == len(names)

        await until(all_there)

        async def reported() -> Any:
            details = (await streams.reports()).get(worker.consumer, {}).get("details", {})
            return (details.get("sequences_default"), details.get("sequences_code")) == (6, 6)

        await until(reported)
        # What `scope plan` takes each teacher's rate from.
        details = (await streams.reports())[worker.consumer]["details"]
        assert details["tokens_default"] == details["tokens_code"] == details["tokens"] / 2 > 0
        assert 0 < details["asking_s_code"] <= details["asking_s"]
    for result in await scored(streams):
        name = names[result.prompt.order]
        assert (result.prompt.teacher, result.teacher) == (name, fingerprints[name])
        for place, logprobs in result.teacher_logprobs.items():
            wanted = -np.array(COMPLETIONS[place]) / (50 if name == "code" else 100)
            np.testing.assert_allclose(logprobs, wanted, rtol=1e-6)


async def test_one_teacher_s_scores_are_not_taken_for_another_s(
    connection: Connection, streams: Streams, two_teachers: dict[str, str]
) -> None:
    """Both names lead to the same server: the one whose model it is not gets nothing from it, and
    nothing goes on, since waiting would not mend it."""
    await put(streams, encode(group_of("default", 0)))
    target = [Target(two_teachers["code"])]
    teachers = {
        "default": Servers(target, DEADLINE_S, "f00d"),
        "code": Servers(target, DEADLINE_S, "c0de"),
    }
    worker = TeacherWorker(post(connection, "teacher"), TeacherSettings("all", 0, teachers))
    with pytest.RaisesGroup(pytest.RaisesExc(WorkerFailed, match="fingerprint is c0de, not f00d")):
        async with running(worker):
            await until(lambda: scored(streams))
    assert await scored(streams) == []
    assert (await streams.ledger()).depth["verified"] == 1  # for whoever continues the run


async def test_a_group_whose_teacher_the_run_does_not_have_is_buried(
    connection: Connection, streams: Streams, faulty_url: str
) -> None:
    await put(streams, encode(group_of("cod", 0)))
    async with working(connection, faulty_url):
        (dead,) = await until(streams.dead)
    assert "this run has no teacher 'cod', only default" in dead.reason


DOWN: dict[str, tuple[int | str, str]] = {
    "500": (500, "answered 500"),
    "503": (503, "answered 503"),
    "429": (429, "answered 429"),
    "wrong key": (401, "answered 401"),
    "silence": ("silence", "did not answer within 0.3 s"),
    "half body": ("half body", "cannot be reached"),
}


@pytest.mark.parametrize(("fault", "said"), DOWN.values(), ids=DOWN.keys())
async def test_while_the_teacher_is_down_the_item_waits_and_is_scored_when_it_heals(
    connection: Connection,
    streams: Streams,
    faulty: FaultyTeacher,
    faulty_url: str,
    fault: int | str,
    said: str,
) -> None:
    faulty.fault = fault
    patient = replace(connection, config=StageConfig(lease_s=2.0, patience_s=DEADLINE_S))
    await put(streams, encode(group()))
    timeout_s = 0.3 if fault == "silence" else DEADLINE_S
    async with working(patient, faulty_url, timeout_s=timeout_s) as worker:

        async def waiting() -> str:
            report = (await streams.reports()).get(worker.consumer, {})
            return str(report.get("waiting_for", ""))

        assert said in await until(waiting)
        ledger = await streams.ledger()
        assert (ledger.depth["verified"], ledger.depth["scored"], ledger.dead) == (1, 0, 0)
        faulty.fault = None
        assert len(await until(lambda: scored(streams))) == 1
    assert await streams.dead() == []


def _scores(*logprobs: list[float]) -> dict[str, Any]:
    return {"scores": [{"logprobs": values, "perplexity": 1.0} for values in logprobs]}


GARBAGE: dict[str, tuple[Any, str]] = {
    "wrong length": (_scores([-1.0], [-1.0, -1.0, -1.0]), "1 log-probs for 2"),
    "too few scores": (_scores([-1.0, -1.0]), "1 scores for 2 sequences"),
    "not a number": (_scores([-1.0, float("nan")], [-1.0, -1.0, -1.0]), "is nan"),
    "positive": (_scores([-1.0, 3.0], [-1.0, -1.0, -1.0]), "is 3.0"),
    "not JSON": (b"OK", "something else"),
}


@pytest.mark.parametrize(("fault", "said"), GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_buries_the_item_and_scores_nothing(
    connection: Connection,
    streams: Streams,
    faulty: FaultyTeacher,
    faulty_url: str,
    fault: Any,
    said: str,
) -> None:
    faulty.fault = fault
    strict = replace(connection, config=StageConfig(lease_s=2.0, max_deliveries=1))
    await put(streams, encode(group()))
    async with working(strict, faulty_url, fingerprint="f00d"):
        (dead,) = await until(streams.dead)
    assert dead.reason.startswith("teacher: BadAnswer: ")
    assert said in dead.reason
    assert dead.payload == encode(group())
    assert await scored(streams) == []
    assert (await streams.ledger()).exact


async def test_an_item_that_meets_garbage_is_tried_as_often_as_configured(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    faulty.fault = b"garbage"
    await put(streams, encode(group()))
    async with working(connection, faulty_url):
        (dead,) = await until(streams.dead)
    assert "BadAnswer" in dead.reason
    assert len(faulty.requests) == connection.config.max_deliveries
    assert await scored(streams) == []


async def test_an_item_that_garbage_met_once_is_scored_when_the_teacher_heals(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    faulty.fault = b"garbage"
    many = replace(connection, config=StageConfig(lease_s=2.0, max_deliveries=1000))
    await put(streams, encode(group()))
    async with working(many, faulty_url):

        async def tried_again() -> bool:
            return len(faulty.requests) > 1

        await until(tried_again)
        assert await scored(streams) == []
        faulty.fault = None
        assert len(await until(lambda: scored(streams))) == 1


@pytest.mark.parametrize("status", [413, 422])
async def test_an_item_that_the_teacher_can_never_score_is_buried_at_once(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str, status: int
) -> None:
    faulty.fault = status
    await put(streams, encode(group()))
    async with working(connection, faulty_url):
        (dead,) = await until(streams.dead)
    assert f"this is fault {status}" in dead.reason
    assert len(faulty.requests) == 1
    assert await scored(streams) == []


async def test_bytes_that_are_no_group_are_buried(
    connection: Connection, streams: Streams, faulty_url: str
) -> None:
    await put(streams, encode(group())[:-1])
    async with working(connection, faulty_url):
        (dead,) = await until(streams.dead)
    assert "checksum" in dead.reason


async def test_past_the_patience_the_worker_stops_and_the_item_stays(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    faulty.fault = 503
    hasty = replace(connection, config=StageConfig(lease_s=0.4, patience_s=0.1))
    await put(streams, encode(group()))
    servers = {"default": Servers([Target(faulty_url)], timeout_s=DEADLINE_S)}
    worker = TeacherWorker(post(hasty, "teacher"), TeacherSettings("all", 0, servers))
    with pytest.raises(PatienceExceeded, match="this is fault 503"):
        await asyncio.wait_for(worker.run(), DEADLINE_S)
    ledger = await streams.ledger()
    assert (ledger.depth["verified"], ledger.depth["scored"], ledger.dead) == (1, 0, 0)


async def test_a_stopped_worker_finishes_what_it_holds(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    faulty.fault = 503
    patient = replace(connection, config=StageConfig(lease_s=2.0, patience_s=DEADLINE_S))
    await put(streams, encode(group()))
    servers = {"default": Servers([Target(faulty_url)], timeout_s=DEADLINE_S)}
    worker = TeacherWorker(post(patient, "teacher"), TeacherSettings("all", 0, servers))
    task = asyncio.create_task(worker.run())

    async def asked() -> bool:
        return bool(faulty.authorizations)

    await until(asked)
    await worker.stop()
    faulty.fault = None
    await asyncio.wait_for(task, DEADLINE_S)
    assert len(await scored(streams)) == 1


async def test_many_groups_each_arrive_once(
    connection: Connection, streams: Streams, faulty_url: str
) -> None:
    for order in range(30):
        await put(streams, encode(group(order)))
    async with working(connection, faulty_url) as one, working(connection, faulty_url) as two:
        assert one.consumer != two.consumer

        async def all_there() -> bool:
            return (await streams.ledger()).depth["scored"] == 30

        await until(all_there)
    assert sorted(g.prompt.order for g in await scored(streams)) == list(range(30))
