"""The client against real HTTP servers, honest and not: a checked value or a typed error."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from starlette.types import Receive, Scope, Send

from services.errors import BadItem, Unavailable
from services.trajectory import TokenIds
from teacher.client import BadAnswer, NoLogProbs, Target, TeacherBusy, TeacherClient
from teacher.scorer import ScoringError
from teacher.scores import InvalidLogProbs, TokenScores
from tests.teacher.fakes import (
    FAKE_CARD,
    FakeScorer,
    FaultyTeacher,
    fake_app,
    fake_scores,
    listening,
)
from tests.waiting import DEADLINE_S


def ids(*values: int) -> TokenIds:
    return np.array(values, np.int32)


ASKED = [(ids(1, 2), ids(3, 4)), (ids(1), ids(5)), (ids(1), ids())]


@pytest_asyncio.fixture
async def client(faulty_url: str) -> AsyncIterator[TeacherClient]:
    async with TeacherClient(Target(faulty_url, "some-key"), timeout_s=DEADLINE_S) as made:
        yield made


def _assert_honest(scores: list[TokenScores]) -> None:
    expected = [[-0.03, -0.04], [-0.05], []]
    for score, values in zip(scores, expected, strict=True):
        assert score.logprobs.dtype == np.float32
        np.testing.assert_allclose(score.logprobs, values, rtol=1e-6)


async def test_scores_come_in_order_and_name_their_model(
    client: TeacherClient, faulty: FaultyTeacher
) -> None:
    assert client.fingerprint == ""
    _assert_honest(await client.score(ASKED))
    assert client.fingerprint == "f00d"
    assert faulty.requests[-1]["sequences"][0] == {"prompt": [1, 2], "completion": [3, 4]}
    assert faulty.authorizations == ["Bearer some-key"]


async def test_it_speaks_with_the_real_application(scorer: FakeScorer) -> None:
    with listening(fake_app(scorer, ["k"])) as url:
        async with TeacherClient(Target(url + "/", "k"), timeout_s=DEADLINE_S) as client:
            assert await client.info() == FAKE_CARD
            _assert_honest(await client.score(ASKED))


async def test_rounding_above_zero_is_taken_as_zero(
    client: TeacherClient, faulty: FaultyTeacher
) -> None:
    faulty.fault = {"scores": [{"logprobs": [5e-5], "perplexity": 1.0}]}
    (score,) = await client.score([(ids(1), ids(2))])
    assert score.logprobs.tolist() == [0.0]


def _scores(*logprobs: list[Any]) -> dict[str, Any]:
    return {"scores": [{"logprobs": values, "perplexity": 1.0} for values in logprobs]}


BAD_ANSWERS = {
    "too few scores": (_scores([-1.0, -1.0]), "1 scores for 3 sequences"),
    "too many scores": (_scores([-1.0, -1.0], [-1.0], [], []), "4 scores for 3"),
    "too few log-probs": (_scores([-1.0], [-1.0], []), "1 log-probs for 2"),
    "too many log-probs": (_scores([-1.0, -1.0], [-1.0], [-1.0]), "1 log-probs for 0"),
    "not a number": (_scores([-1.0, float("nan")], [-1.0], []), "is nan"),
    "minus infinity": (_scores([-1.0, float("-inf")], [-1.0], []), "is -inf"),
    "positive": (_scores([-1.0, 0.5], [-1.0], []), "log-prob 1 of 2 is 0.5"),
    "null": (_scores([-1.0, None], [-1.0], []), "something else"),
    "text for numbers": (_scores(["minus one", -1.0], [-1.0], []), "something else"),
    "no scores": ({"scores": None}, "something else"),
    "no fingerprint": ({"fingerprint": ""}, "does not say which model"),
    "not JSON": (b"<html>It works!</html>", "It works"),
    "half of the JSON": (b'{"model": "fake", "scores": [{"logp', "something else"),
    "nothing": (b"", "something else"),
    "binary": (bytes(range(256)), "something else"),
    "another JSON": (b"[]", "something else"),
}


@pytest.mark.parametrize(("fault", "said"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
async def test_garbage_is_a_bad_answer_and_never_a_value(
    client: TeacherClient, faulty: FaultyTeacher, fault: Any, said: str
) -> None:
    faulty.fault = fault
    with pytest.raises(BadAnswer, match=said):
        await client.score(ASKED)
    assert client.fingerprint == ""  # a liar is not pinned
    faulty.fault = None
    _assert_honest(await client.score(ASKED))


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504])
async def test_a_teacher_that_refuses_is_unavailable(
    client: TeacherClient, faulty: FaultyTeacher, status: int
) -> None:
    faulty.fault = status
    with pytest.raises(Unavailable, match=f"answered {status}: this is fault {status}"):
        await client.score(ASKED)


@pytest.mark.parametrize("status", [413, 422])
async def test_an_item_that_cannot_be_scored_is_bad(
    client: TeacherClient, faulty: FaultyTeacher, status: int
) -> None:
    faulty.fault = status
    with pytest.raises(BadItem, match=rf"this is fault {status} \(x\.0\)"):
        await client.score(ASKED)


async def test_silence_ends_at_the_time_out(faulty_url: str, faulty: FaultyTeacher) -> None:
    faulty.fault = "silence"
    async with TeacherClient(Target(faulty_url), timeout_s=0.2) as client:
        with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
            await client.score(ASKED)


async def test_an_answer_that_breaks_off_is_unavailable(
    client: TeacherClient, faulty: FaultyTeacher
) -> None:
    faulty.fault = "half body"
    with pytest.raises(Unavailable, match="cannot be reached"):
        await client.score(ASKED)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
async def test_a_connection_that_is_reset_is_unavailable(said: bytes) -> None:
    """Before the answer, or in its middle: what came of it is no answer."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with TeacherClient(
            Target(f"http://127.0.0.1:{port}"), timeout_s=DEADLINE_S
        ) as client:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await client.score(ASKED)


async def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        async with TeacherClient(
            Target(f"http://127.0.0.1:{taken.getsockname()[1]}"), timeout_s=DEADLINE_S
        ) as client:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await client.score(ASKED)
            with pytest.raises(Unavailable, match="cannot be reached"):
                await client.info()


async def test_the_first_model_is_pinned(client: TeacherClient, faulty: FaultyTeacher) -> None:
    await client.score(ASKED)
    faulty.fault = {"fingerprint": "beef"}
    with pytest.raises(BadAnswer, match="fingerprint is beef, not f00d"):
        await client.score(ASKED)


async def test_an_expected_model_is_the_only_one(faulty_url: str, faulty: FaultyTeacher) -> None:
    async with TeacherClient(
        Target(faulty_url), timeout_s=DEADLINE_S, fingerprint="beef"
    ) as client:
        with pytest.raises(BadAnswer, match="fingerprint is f00d, not beef"):
            await client.score(ASKED)
        card = FAKE_CARD.model_dump()
        faulty.fault = {"data": [card]}
        with pytest.raises(BadAnswer, match="fingerprint is f00d, not beef"):
            await client.info()


@pytest.mark.parametrize("binary", [True, False], ids=["safetensors", "JSON"])
async def test_both_forms_carry_the_same(scorer: FakeScorer, binary: bool) -> None:
    with listening(fake_app(scorer)) as url:
        async with TeacherClient(Target(url), timeout_s=DEADLINE_S, binary=binary) as client:
            for top in (0, 3):
                for score, (_, completion) in zip(
                    await client.score(ASKED, top), ASKED, strict=True
                ):
                    wanted = fake_scores(completion.tolist(), top)
                    np.testing.assert_array_equal(score.logprobs, wanted.logprobs)
                    np.testing.assert_array_equal(score.top_ids, wanted.top_ids)
                    np.testing.assert_array_equal(score.top_logprobs, wanted.top_logprobs)


async def test_a_model_without_numbers_for_an_item_makes_it_bad(scorer: FakeScorer) -> None:
    scorer.error = ScoringError(1, InvalidLogProbs("log-prob 3 of 9 is nan"))
    with listening(fake_app(scorer)) as url:
        async with TeacherClient(Target(url), timeout_s=DEADLINE_S) as client:
            with pytest.raises(
                NoLogProbs, match=r"answered 500: .* 3 of 9 is nan \(sequences\.1\)"
            ):
                await client.score(ASKED)


async def test_a_busy_teacher_says_when_to_come_again(scorer: FakeScorer) -> None:
    with listening(fake_app(scorer, max_requests=0)) as url:
        async with TeacherClient(Target(url), timeout_s=DEADLINE_S) as client:
            with pytest.raises(TeacherBusy, match="answered 503: 0 requests are held") as raised:
                await client.score(ASKED)
            assert raised.value.retry_after_s >= 1


async def test_calls_share_a_connection_that_is_kept(scorer: FakeScorer) -> None:
    ports = set()
    app = fake_app(scorer)

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        ports.add(scope["client"])
        await app(scope, receive, send)

    with listening(watched) as url:
        async with TeacherClient(Target(url), timeout_s=DEADLINE_S) as client:
            for _ in range(5):
                await client.score(ASKED)
    assert len(ports) == 1


async def test_many_calls_at_once_keep_apart(scorer: FakeScorer) -> None:
    with listening(fake_app(scorer)) as url:
        async with TeacherClient(Target(url), timeout_s=DEADLINE_S) as client:
            answers = await asyncio.gather(*(client.score([(ids(1), ids(n))]) for n in range(50)))
    np.testing.assert_allclose([a[0].logprobs[0] for a in answers], -np.arange(50) / 100, rtol=1e-6)
