"""Several real servers, some of them faulty, as one teacher."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from services.errors import BadItem, Unavailable, WorkerFailed
from teacher.client import BadAnswer, NoLogProbs, Target
from teacher.config import TeacherConfig
from teacher.openai_client import CompletionsClient, Probe
from teacher.pool import MissingKey, Servers, TeacherPool, targets
from teacher.scorer import ScoringError
from teacher.scores import InvalidLogProbs
from tests.teacher.fakes import (
    FAKE_CARD,
    FakeScorer,
    FaultyTeacher,
    fake_app,
    fake_scores,
    listening,
)
from tests.waiting import DEADLINE_S, until

PAIR = (np.array([1, 2], np.int32), np.array([3, 4], np.int32))


def pool(urls: Sequence[str], **options: Any) -> TeacherPool:
    return TeacherPool(
        Servers([Target(url) for url in urls], **{"timeout_s": DEADLINE_S, **options})
    )


async def warm_pool(urls: Sequence[str]) -> TeacherPool:
    """A pool that knows how fast its servers are, and has overtaken none so far."""
    servers = pool(urls)
    for _ in range(30):
        await assert_scores(servers)
    servers._hedge_factor = 2.0
    return servers


async def assert_scores(servers: TeacherPool) -> None:
    (scores,) = await servers.score([PAIR])
    np.testing.assert_allclose(scores.logprobs, fake_scores([3, 4]).logprobs)


@pytest.fixture
def scorers() -> list[FakeScorer]:
    return [FakeScorer(), FakeScorer()]


@pytest.fixture
def urls(scorers: list[FakeScorer]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(listening(fake_app(scorer))) for scorer in scorers]


async def test_the_server_with_the_least_to_do_is_asked(
    urls: list[str], scorers: list[FakeScorer]
) -> None:
    async with pool(urls) as servers:
        await assert_scores(servers)
        await until(lambda: servers.down == 0)
        for scorer in scorers:
            scorer.held = asyncio.Event()
            scorer.calls.clear()
        asked = [asyncio.create_task(assert_scores(servers)) for _ in range(6)]
        await until(lambda: [len(scorer.calls) for scorer in scorers] == [3, 3])
        for scorer in scorers:
            assert scorer.held is not None
            scorer.held.set()
        await asyncio.gather(*asked)


async def test_a_server_that_goes_under_load_costs_no_request_and_comes_back(
    scorers: list[FakeScorer],
) -> None:
    async with AsyncExitStack() as stack:
        stays = stack.enter_context(listening(fake_app(scorers[0])))
        second = stack.enter_context(ExitStack())
        goes = second.enter_context(listening(fake_app(scorers[1])))
        servers = await stack.enter_async_context(pool([goes, stays]))
        await assert_scores(servers)
        await until(lambda: servers.down == 0)
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                await assert_scores(servers)

        asked = [asyncio.create_task(load()) for _ in range(8)]
        await until(lambda: all(len(scorer.calls) > 20 for scorer in scorers))
        second.close()
        await until(lambda: servers.down == 1)
        before = len(scorers[0].calls)
        await until(lambda: len(scorers[0].calls) > before + 20)
        with listening(fake_app(scorers[1]), port=int(goes.rpartition(":")[2])):
            before = len(scorers[1].calls)
            await until(lambda: len(scorers[1].calls) > before + 20)
            stop.set()
            await asyncio.gather(*asked)  # no call has failed


async def test_three_failures_in_a_row_take_a_server_out_until_it_is_well() -> None:
    failing, good = FaultyTeacher(), FaultyTeacher()
    with listening(failing) as one, listening(good) as two:
        async with pool([one, two]) as servers:
            await servers.score([PAIR])
            await until(lambda: servers.down == 0)
            failing.requests.clear()
            for fault in (500, 500, None, 500, 500):  # never three
                failing.fault = fault
                await assert_scores(servers)
            assert (servers.down, servers.retried, len(failing.requests)) == (0, 4, 5)
            failing.fault = 500
            for _ in range(5):
                await assert_scores(servers)
            assert (servers.down, len(failing.requests)) == (1, 6)  # the third, and no more
            failing.fault = None
            await until(lambda: servers.down == 0)
            await assert_scores(servers)
            assert len(failing.requests) == 7


async def test_connections_end_with_whoever_used_them(urls: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with pool(urls) as servers:
            await assert_scores(servers)
            await until(lambda: servers.down == 0)
            raise ZeroDivisionError
    for server in servers._servers:
        assert server.client is not None
        with pytest.raises(RuntimeError, match="client has been closed"):
            await server.client.check()


async def test_a_straggler_is_overtaken_and_its_slot_freed(
    urls: list[str], scorers: list[FakeScorer]
) -> None:
    async with await warm_pool(urls) as servers:
        slow = max(scorers, key=lambda scorer: len(scorer.calls))  # its speed is known
        slow.held = asyncio.Event()
        await assert_scores(servers)
        await until(lambda: slow.cancelled == 1)
        assert servers.hedged == 1


async def test_hedging_never_becomes_the_load(
    urls: list[str], scorers: list[FakeScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await warm_pool(urls) as servers:
        monkeypatch.setattr("teacher.pool._SHORTEST_HEDGE_S", 0.02)
        slow = max(scorers, key=lambda scorer: len(scorer.calls))
        slow.held = asyncio.Event()
        while servers._may_hedge():
            await assert_scores(servers)
        await until(lambda: not any(server.outstanding for server in servers._servers))
        asked = asyncio.create_task(assert_scores(servers))
        await asyncio.wait([asked], timeout=0.5)
        assert not asked.done()  # it waits for the straggler
        assert 0 < servers.hedged < 0.1 * servers.requests + 1
        slow.held.set()
        await asked


async def test_without_hedging_a_straggler_is_waited_for(
    urls: list[str], scorers: list[FakeScorer]
) -> None:
    async with pool(urls) as servers:
        for _ in range(30):
            await assert_scores(servers)
        slow = max(scorers, key=lambda scorer: len(scorer.calls))
        slow.held = asyncio.Event()
        asked = asyncio.create_task(assert_scores(servers))
        await asyncio.wait([asked], timeout=0.7)
        assert not asked.done()
        slow.held.set()
        await asked


async def test_a_server_with_another_model_ends_the_run(scorers: list[FakeScorer]) -> None:
    other, good = FaultyTeacher(), FaultyTeacher()
    other.fault = {"fingerprint": "beef"}
    with listening(other) as one, listening(good) as two:
        async with pool([one, two], fingerprint="f00d") as servers:
            for _ in range(2):  # though the other could answer
                with pytest.raises(WorkerFailed, match=f"{one} is another model: .* beef, not f0"):
                    await servers.score([PAIR])
        async with pool([one], fingerprint="f00d") as alone:
            with pytest.raises(WorkerFailed, match="fingerprint is beef, not f00d"):
                await alone.score([PAIR])
        async with pool([one, two], fingerprint="cafe") as strict:
            with pytest.raises(WorkerFailed, match="f00d, not cafe"):
                await strict.score([PAIR])


async def test_busy_servers_are_left_alone_and_said(scorers: list[FakeScorer]) -> None:
    with listening(fake_app(scorers[0], max_requests=0)) as busy:
        with listening(fake_app(scorers[1])) as free:
            async with pool([busy, free]) as servers:
                for _ in range(5):
                    await assert_scores(servers)
        async with pool([busy]) as alone:
            for _ in range(3):
                with pytest.raises(Unavailable, match="0 requests are held"):
                    await alone.score([PAIR])
            assert alone.down == 0


class Slow:
    """An application that lets whoever asks for its models wait until it may answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self.asked = app, 0
        self.may = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        while scope["method"] == "GET" and not self.may.is_set():
            await asyncio.sleep(0.005)
        await self._app(scope, receive, send)


async def test_a_server_that_nobody_has_looked_at_yet_is_waited_for(
    scorers: list[FakeScorer],
) -> None:
    first, second = Slow(fake_app(scorers[0], max_requests=0)), Slow(fake_app(scorers[1]))
    first.may.set()
    with listening(first) as busy, listening(second) as late:
        async with pool([busy, late]) as servers:
            asked = asyncio.create_task(assert_scores(servers))
            await until(lambda: first.asked > 1 and second.asked == 1)
            await asyncio.wait([asked], timeout=0.3)
            assert not asked.done()
            second.may.set()
            await asked


async def test_a_server_that_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher.pool._CHECK_TIMEOUT_S", 2 * DEADLINE_S)
    faulty = FaultyTeacher()
    only = Slow(faulty)
    only.may.set()
    with listening(only) as url:
        async with pool([url]) as servers:
            await assert_scores(servers)
            faulty.fault = "half body"
            only.may.clear()  # nor does it say what it is
            with pytest.raises(Unavailable, match="cannot be reached"):
                async with asyncio.timeout(DEADLINE_S):
                    await servers.score([PAIR])


async def test_an_item_without_numbers_is_tried_elsewhere_before_it_is_bad(
    urls: list[str], scorers: list[FakeScorer]
) -> None:
    async with pool(urls) as servers:
        scorers[0].error = ScoringError(0, InvalidLogProbs("log-prob 0 of 2 is nan"))
        for _ in range(3):
            await assert_scores(servers)
        scorers[1].error = scorers[0].error
        with pytest.raises(NoLogProbs):
            await servers.score([PAIR])


async def test_an_item_that_is_refused_is_bad_at_once(
    urls: list[str], scorers: list[FakeScorer]
) -> None:
    async with pool(urls) as servers:
        with pytest.raises(BadItem, match="outside of the vocabulary"):
            await servers.score([(PAIR[0], np.array([500], np.int32))])
        assert servers.retried == 0


async def test_when_all_are_down_everyone_is_named() -> None:
    one, two = FaultyTeacher(), FaultyTeacher()
    one.fault, two.fault = 500, 401
    with listening(one) as first, listening(two) as second:
        async with pool([first, second]) as servers:
            with pytest.raises(Unavailable, match="this is fault 500") as raised:
                await servers.score([PAIR])
                await servers.score([PAIR])
            assert first in str(raised.value)
            assert second in str(raised.value)


FAULTS: Sequence[Any] = (
    None, 500, 503, 429, 404, "delay", "half body", b"garbage", {"fingerprint": "beef"},
    {"scores": []},
    {"scores": [{"logprobs": [float("nan"), -1.0], "perplexity": 1.0}]},
    {"scores": [{"logprobs": [-1.0], "perplexity": 1.0}]},
)  # fmt: skip


@pytest.fixture(scope="module")
def faulty_servers() -> Iterator[tuple[list[FaultyTeacher], list[str]]]:
    made = [FaultyTeacher() for _ in range(3)]
    with ExitStack() as stack:
        yield made, [stack.enter_context(listening(teacher)) for teacher in made]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_whatever_servers_do_a_score_is_right_or_an_error(
    faulty_servers: tuple[list[FaultyTeacher], list[str]], data: st.DataObject
) -> None:
    teachers, urls = faulty_servers
    for teacher in teachers:
        teacher.heal()
    async with pool(urls, fingerprint="f00d") as servers:
        await assert_scores(servers)
        for _ in range(5):
            for teacher in teachers:
                teacher.fault = data.draw(st.sampled_from(FAULTS))
            try:
                await assert_scores(servers)
            except (Unavailable, BadAnswer, BadItem):
                assert any(teacher.fault not in (None, "delay") for teacher in teachers)
            except WorkerFailed:
                assert any(teacher.fault == {"fingerprint": "beef"} for teacher in teachers)
                break


# ------------------------------------------------------------------------ other dialects


async def test_openais_dialect_carries_the_same(scorers: list[FakeScorer]) -> None:
    with listening(fake_app(scorers[0])) as url:
        async with CompletionsClient(
            Target(url, model=FAKE_CARD.id), timeout_s=DEADLINE_S, probe=Probe()
        ) as client:
            for top in (0, 3):
                for pair, scores in zip(
                    [PAIR] * 2, await client.score([PAIR] * 2, top), strict=True
                ):
                    wanted = fake_scores(pair[1].tolist(), top)
                    np.testing.assert_allclose(scores.logprobs, wanted.logprobs, rtol=1e-6)
                    np.testing.assert_array_equal(scores.top_ids, wanted.top_ids)
                    np.testing.assert_allclose(scores.top_logprobs, wanted.top_logprobs, rtol=1e-6)


# ----------------------------------------------------------------------- keys and trust


def test_keys_come_from_the_environment() -> None:
    config = TeacherConfig.model_validate(
        {
            "model": "m",
            "endpoints": ["http://a", {"url": "http://b", "key_env": "B_KEY", "model": "x"}],
        }
    )
    first, second = targets(config, {"B_KEY": "secret"})
    assert (first.url, first.key) == ("http://a", None)
    assert (second.key, second.model) == ("secret", "x")
    assert "secret" not in repr(second)
    with pytest.raises(MissingKey, match="B_KEY"):
        targets(config, {})


async def test_each_server_gets_its_own_key(scorers: list[FakeScorer]) -> None:
    with (
        listening(fake_app(scorers[0], ["key-a"])) as one,
        listening(fake_app(scorers[1], ["key-b"])) as two,
    ):
        right = Servers([Target(one, "key-a"), Target(two, "key-b")], timeout_s=DEADLINE_S)
        async with TeacherPool(right) as both:
            await assert_scores(both)
            await until(lambda: both.down == 0)
        swapped = Servers([Target(one, "key-b"), Target(two, "key-a")], timeout_s=DEADLINE_S)
        async with TeacherPool(swapped) as wrong:
            with pytest.raises(Unavailable, match="answered 401: a valid API key is needed"):
                await wrong.score([PAIR])


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "teacher")])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(host, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


async def test_a_private_authority_is_trusted_where_it_is_named(
    scorers: list[FakeScorer], tmp_path: Path
) -> None:
    cert, key = _certificate(tmp_path)
    with listening(fake_app(scorers[0]), ssl_certfile=cert, ssl_keyfile=key) as url:
        async with TeacherPool(
            Servers([Target(url, ca_file=cert)], timeout_s=DEADLINE_S)
        ) as trusting:
            await assert_scores(trusting)
        async with pool([url]) as stranger:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.score([PAIR])
