"""The cache on real Redis: what it returns is what was scored, and it stays within its bound."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest_asyncio
from redis.asyncio import Redis

from services.redis_server import EmbeddedRedis
from teacher.cache import CachedScorer, connect
from tests.teacher.fakes import FakeScorer, fake_scores

IDS = [[1, 2, 3, 4], [5, 6], [7]]
STARTS = [2, 1, 1]


@pytest_asyncio.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(redis_server.url)
    found = [key async for key in client.scan_iter("{scope-scores}*")]
    if found:
        await client.delete(*found)
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
    cached = CachedScorer(
        scorer, redis, "f00d", max_bytes=10_000, count=lambda *both: counted.append(both)
    )
    for top in (0, 2):
        await _check(cached, top)
        await _check(cached, top)
    assert counted == [(0, 3), (3, 0)] * 2
    assert len(scorer.calls) == 2
    await cached.score([IDS[0], [9, 9]], [1, 1])  # another start, and other tokens
    assert counted[-1] == (0, 2)
    other = CachedScorer(scorer, redis, "beef", max_bytes=10_000)
    await _check(other, 0)
    assert len(scorer.calls) == 4


async def test_what_was_used_longest_ago_goes_first(redis: Redis, scorer: FakeScorer) -> None:
    size = 8 + 4 * 10  # of one entry
    cached = CachedScorer(scorer, redis, "f00d", max_bytes=3 * size)

    async def ask(number: int) -> bool:
        """Whether it had to be scored."""
        before = len(scorer.calls)
        await cached.score([[number] * 11], [1])
        return len(scorer.calls) > before

    assert [await ask(n) for n in (1, 2, 3)] == [True] * 3
    assert not await ask(1)  # now the newest
    assert await ask(4)
    assert [await ask(n) for n in (1, 3, 4)] == [False] * 3
    assert await ask(2)
    assert int(await redis.get("{scope-scores}:bytes") or 0) == 3 * size


async def test_a_broken_entry_is_scored_again(redis: Redis, scorer: FakeScorer) -> None:
    cached = CachedScorer(scorer, redis, "f00d", max_bytes=10_000)
    await _check(cached, 2)
    async for key in redis.scan_iter("{scope-scores}:f00d:*"):
        await redis.setrange(key, 8, b"\xff" * 8)  # NaN
    await _check(cached, 2)
    assert len(scorer.calls) == 2


async def test_without_redis_everything_is_scored(scorer: FakeScorer) -> None:
    gone = connect("unix:///no/such/socket")
    cached = CachedScorer(scorer, gone, "f00d", max_bytes=10_000)
    await _check(cached, 1)
    await _check(cached, 1)
    assert len(scorer.calls) == 2
    await cached.close()
