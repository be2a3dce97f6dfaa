"""The cache on real Redis: what it returns is what was scored, and it stays within its bound."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from services.redis_server import EmbeddedRedis
from teacher.cache import CachedScorer, connect, unbounded
from teacher.scores import More
from tests.teacher.fakes import FakeScorer, fake_scores

IDS = [[1, 2, 3, 4], [5, 6], [7]]
STARTS = [2, 1, 1]


@pytest.fixture(scope="module")
def cache_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One of its own: its memory is set to be full."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("cache"))
    server.start()
    yield server
    server.stop()


@pytest_asyncio.fixture
async def redis(cache_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(cache_server.url)
    await client.config_set("maxmemory", 0)
    await client.flushall()
    yield client
    await client.aclose()


async def _check(cached: CachedScorer, top: int) -> None:
    scores = await cached.score(IDS, STARTS, top)
    for ids, start, score in zip(IDS, STARTS, scores, strict=True):
        wanted = fake_scores(ids[start:], top)
        np.testing.assert_array_equal(score.logprobs, wanted.logprobs)
        np.testing.assert_array_equal(score.top_ids, wanted.top_ids)
        np.testing.assert_array_equal(score.top_logprobs, wanted.top_logprobs)


async def test_each_score_is_paid_for_once_and_each_question_is_its_own(
    redis: Redis, scorer: FakeScorer
) -> None:
    counted: list[tuple[int, int]] = []
    cached = CachedScorer(scorer, redis, "f00d", count=lambda *both: counted.append(both))
    for top in (0, 2):
        await _check(cached, top)
        await _check(cached, top)
    assert counted == [(0, 3), (3, 0)] * 2
    assert len(scorer.calls) == 2
    await cached.score([IDS[0], [9, 9]], [1, 1])  # another start, and other tokens
    assert counted[-1] == (0, 2)
    other = CachedScorer(scorer, redis, "beef")
    await _check(other, 0)
    assert len(scorer.calls) == 4


async def test_what_else_was_asked_is_remembered_with_its_question(
    redis: Redis, scorer: FakeScorer
) -> None:
    cached = CachedScorer(scorer, redis, "f00d")
    first, other = ([np.full((2, 2), i, np.int32)] for i in (3, 4))
    for more in (More(True, first), More(False, first), More(False, other), More(True)):
        for _ in range(2):
            (score,) = await cached.score(IDS[:1], STARTS[:1], 0, more)
            wanted = fake_scores([3, 4], 0, 1.0, more)
            np.testing.assert_array_equal(score.candidates, wanted.candidates)
            np.testing.assert_array_equal(score.entropy, wanted.entropy)
    assert len(scorer.calls) == 4


async def test_a_full_redis_evicts_and_every_score_stays_right(
    redis: Redis, scorer: FakeScorer, caplog: pytest.LogCaptureFixture
) -> None:
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", used + 200_000)
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    cached = CachedScorer(scorer, redis, "f00d")
    for number in range(100):  # 4 kB each
        ids = [number] * 1_001
        (score,) = await cached.score([ids], [1])
        np.testing.assert_array_equal(score.logprobs, fake_scores(ids[1:], 0).logprobs)
    assert (await redis.info("stats"))["evicted_keys"] > 0
    assert 0 < await redis.dbsize() < 100
    assert not caplog.records


async def test_a_redis_that_is_full_and_evicts_nothing_loses_no_score(
    redis: Redis, scorer: FakeScorer, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.config_set("maxmemory", 1)
    await redis.config_set("maxmemory-policy", "noeviction")
    await _check(CachedScorer(scorer, redis, "f00d"), 2)
    assert "the score cache is not used for now" in caplog.text


async def test_a_redis_that_evicts_nothing_is_named(
    redis: Redis, cache_server: EmbeddedRedis
) -> None:
    await redis.config_set("maxmemory", 0)
    await redis.config_set("maxmemory-policy", "noeviction")
    said = unbounded(cache_server.url)
    assert "never evicts a score (maxmemory 0, maxmemory-policy noeviction)" in said
    await redis.config_set("maxmemory", 10 << 20)
    assert "maxmemory-policy allkeys-lru" in unbounded(cache_server.url)
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    assert unbounded(cache_server.url) == ""
    assert "away" in unbounded("unix:///no/such/socket")


async def test_a_broken_entry_is_scored_again(redis: Redis, scorer: FakeScorer) -> None:
    cached = CachedScorer(scorer, redis, "f00d")
    await _check(cached, 2)
    async for key in redis.scan_iter("{scope-scores}:f00d:*"):
        await redis.setrange(key, await redis.strlen(key) - 8, b"\xff" * 8)  # NaN
    await _check(cached, 2)
    assert len(scorer.calls) == 2


async def test_without_redis_everything_is_scored(scorer: FakeScorer) -> None:
    gone = connect("unix:///no/such/socket")
    cached = CachedScorer(scorer, gone, "f00d")
    await _check(cached, 1)
    await _check(cached, 1)
    assert len(scorer.calls) == 2
    await cached.close()
