"""What was scored before: a scorer in front of a scorer, with its memory in Redis.

    score ─▶ all sequences looked up at once ─▶ the others scored ─▶ remembered

A key holds the model's fingerprint, the token ids and what was asked of them, so another model, or
another question, never finds it. An entry has the form of the teacher's binary answers. Redis keeps
its own bound (`maxmemory`, `allkeys-lru`), so it must be one that holds nothing else. When it does
not answer, everything is scored as if there were no memory.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.errors import WireError
from services.redis_server import RedisUnavailable, info_of
from teacher import wire
from teacher.scorer import Scorer
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores, valid_scores, with_more

log = logging.getLogger(__name__)

T = TypeVar("T")

_SPACE = "{scope-scores}"  # braces: one slot of a Redis Cluster

_TIMEOUT_S = 2.0
_PAUSE_S = 10.0  # in which a Redis that did not answer is not asked again


def connect(url: str) -> Redis:
    """A Redis that is given up at once when it does not answer: scoring goes on without it."""
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
    )


def unbounded(url: str) -> str:
    """What keeps the Redis at `url` from being a cache: a sentence, empty if nothing does."""
    try:
        memory = info_of(url, "memory")
    except RedisUnavailable as error:
        return f"the score cache is not used while its Redis is away: {error}"
    if memory is None:
        return ""  # it does not say
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if memory.get("maxmemory") and policy.startswith("allkeys-"):
        return ""
    return (
        f"the score cache's Redis never evicts a score (maxmemory {memory.get('maxmemory', 0)}, "
        f"maxmemory-policy {policy}): it grows until it refuses scores; give the cache a Redis of "
        "its own with maxmemory and maxmemory-policy allkeys-lru"
    )


class CachedScorer:
    """See the module, and `teacher.scorer.Scorer`.

    Args:
        scorer: scores what is not remembered.
        redis: where it is remembered.
        fingerprint: of the scorer's model.
        count: told how many of a call's sequences were found, and how many were not.
    """

    def __init__(
        self,
        scorer: Scorer,
        redis: Redis,
        fingerprint: str,
        *,
        count: Callable[[int, int], None] = lambda results, missed: None,
    ) -> None:
        self._scorer = scorer
        self._redis = redis
        self._fingerprint = fingerprint
        self._count = count
        self.check = scorer.check
        self._resume_at = 0.0

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`."""
        keys = [
            self._key(ids, start, top, more.of([index]))
            for index, (ids, start) in enumerate(zip(sequences, starts, strict=True))
        ]
        counts = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        results = await self._look_up(keys, counts, top, more)
        missing = [index for index, scores in enumerate(results) if scores is None]
        self._count(len(keys) - len(missing), len(missing))
        if missing:
            made = await self._scorer.score(
                [sequences[index] for index in missing],
                [starts[index] for index in missing],
                top,
                more.of(missing),
            )
            await self._remember([keys[index] for index in missing], made)
            for index, scores in zip(missing, made, strict=True):
                results[index] = scores
        return [scores for scores in results if scores is not None]

    async def close(self) -> None:
        """See `teacher.scorer.Scorer`."""
        await self._redis.aclose()
        await self._scorer.close()

    def _key(self, ids: Sequence[int], start: int, top: int, more: More) -> str:
        asked = hashlib.sha256(np.asarray([start, top, *ids], "<i4").tobytes())
        if more:
            asked.update(np.asarray([more.entropy, more.width], "<i4").tobytes())
            for table in more.candidates:
                asked.update(table.astype("<i4").tobytes())
        return f"{_SPACE}:{self._fingerprint}:{asked.hexdigest()}"

    async def _look_up(
        self, keys: Sequence[str], counts: Sequence[int], top: int, more: More
    ) -> list[TokenScores | None]:
        values = await self._unless_down(lambda: self._redis.mget(keys))
        if values is None:
            return [None] * len(keys)
        return [
            _decode(value, count, top, more) if isinstance(value, bytes) else None
            for value, count in zip(values, counts, strict=True)
        ]

    async def _remember(self, keys: Sequence[str], scores: Sequence[TokenScores]) -> None:
        entries = {key: _encode(score) for key, score in zip(keys, scores, strict=True)}
        await self._unless_down(lambda: self._redis.mset(entries))

    async def _unless_down(self, command: Callable[[], Awaitable[T]]) -> T | None:
        """What the command returns; None while Redis does not answer."""
        if time.monotonic() < self._resume_at:
            return None
        try:
            return await command()
        except RedisError as error:
            log.warning("the score cache is not used for now: %s", error)
            self._resume_at = time.monotonic() + _PAUSE_S
            return None


def _encode(scores: TokenScores) -> bytes:
    return wire.encode_answer("", "", [scores], scores.top_ids.shape[1])


def _decode(value: bytes, count: int, top: int, more: More) -> TokenScores | None:
    """None for what is not an entry: it is scored again, and overwritten."""
    try:
        results = wire.decode_answer(value)
        ((logprobs,), (ids,), (values,)) = results.logprobs, results.top_ids, results.top_logprobs
        scores = valid_scores(logprobs, count, ids, values, top)
        (candidates,), (entropy,) = results.candidates or [()], results.entropy or [()]
        return with_more(scores, candidates, entropy, more)
    except (WireError, InvalidLogProbs, ValueError):
        return None
