"""What was scored before: a scorer in front of a scorer, with its memory in Redis.

    score ─▶ all sequences looked up at once ─▶ the others scored ─▶ remembered

A key holds the model's fingerprint, the token ids and what was asked of them, so another model, or
another question, never finds it. The memory is bounded: what was used longest ago goes first. When
Redis does not answer, everything is scored as if there were no memory.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.trajectory import LogProbs, TokenIds
from teacher.scorer import Scorer
from teacher.scores import InvalidLogProbs, TokenScores, valid_scores

log = logging.getLogger(__name__)

_SPACE = "{scope-scores}"  # braces: one slot of a Redis Cluster
_HEADER = struct.Struct("<II")  # tokens, alternatives of each

_TIMEOUT_S = 2.0
_PAUSE_S = 10.0  # in which a Redis that did not answer is not asked again

_NOW = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
"""
# KEYS: the order of use, the count of bytes, then the entries.
_READ = f"""{_NOW}
local found = redis.call('MGET', unpack(KEYS, 3))
for i, value in ipairs(found) do
  if value then redis.call('ZADD', KEYS[1], 'XX', now, KEYS[i + 2]) end
end
return found
"""
# KEYS: as above. ARGV: most bytes, then the values.
_WRITE = f"""{_NOW}
local total = tonumber(redis.call('GET', KEYS[2]) or '0')
for i = 3, #KEYS do
  total = total - redis.call('STRLEN', KEYS[i]) + #ARGV[i - 1]
  redis.call('SET', KEYS[i], ARGV[i - 1])
  redis.call('ZADD', KEYS[1], now, KEYS[i])
end
while total > tonumber(ARGV[1]) do
  local oldest = redis.call('ZPOPMIN', KEYS[1])[1]
  if not oldest then break end
  total = total - redis.call('STRLEN', oldest)
  redis.call('DEL', oldest)
end
redis.call('SET', KEYS[2], math.max(total, 0))
"""


def connect(url: str) -> Redis:
    """A Redis that is given up at once when it does not answer: scoring goes on without it."""
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
    )


class CachedScorer:
    """See the module, and `teacher.scorer.Scorer`.

    Args:
        scorer: scores what is not remembered.
        redis: where it is remembered.
        fingerprint: of the scorer's model.
        max_bytes: of all that is remembered there, by whatever model.
        count: told how many of a call's sequences were found, and how many were not.
    """

    def __init__(
        self,
        scorer: Scorer,
        redis: Redis,
        fingerprint: str,
        *,
        max_bytes: int,
        count: Callable[[int, int], None] = lambda found, missed: None,
    ) -> None:
        self._scorer = scorer
        self._redis = redis
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._count = count
        self.check = scorer.check
        self._resume_at = 0.0
        self._read = redis.register_script(_READ)
        self._write = redis.register_script(_WRITE)

    async def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], top: int = 0
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`."""
        keys = [self._key(ids, start, top) for ids, start in zip(sequences, starts, strict=True)]
        counts = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        found = await self._look_up(keys, counts, top)
        missing = [place for place, scores in enumerate(found) if scores is None]
        self._count(len(keys) - len(missing), len(missing))
        if missing:
            made = await self._scorer.score(
                [sequences[place] for place in missing], [starts[place] for place in missing], top
            )
            await self._remember([keys[place] for place in missing], made)
            for place, scores in zip(missing, made, strict=True):
                found[place] = scores
        return [scores for scores in found if scores is not None]

    async def close(self) -> None:
        """See `teacher.scorer.Scorer`."""
        await self._redis.aclose()
        await self._scorer.close()

    def _key(self, ids: Sequence[int], start: int, top: int) -> str:
        digest = hashlib.sha256(np.asarray([start, top, *ids], "<i4").tobytes()).hexdigest()
        return f"{_SPACE}:{self._fingerprint}:{digest}"

    async def _look_up(
        self, keys: Sequence[str], counts: Sequence[int], top: int
    ) -> list[TokenScores | None]:
        values = await self._run(self._read, keys, [])
        if values is None:
            return [None] * len(keys)
        return [
            None if value is None else _decode(value, count, top)
            for value, count in zip(values, counts, strict=True)
        ]

    async def _remember(self, keys: Sequence[str], scores: Sequence[TokenScores]) -> None:
        await self._run(self._write, keys, [self._max_bytes, *map(_encode, scores)])

    async def _run(self, script: Any, keys: Sequence[str], values: Sequence[Any]) -> Any:
        """What the script returns; None while Redis does not answer."""
        if time.monotonic() < self._resume_at:
            return None
        try:
            return await script(keys=[f"{_SPACE}:used", f"{_SPACE}:bytes", *keys], args=values)
        except RedisError as error:
            log.warning("the score cache is not used for now: %s", error)
            self._resume_at = time.monotonic() + _PAUSE_S
            return None


def _encode(scores: TokenScores) -> bytes:
    tokens, top = scores.top_ids.shape
    parts = (scores.logprobs, scores.top_ids, scores.top_logprobs)
    return _HEADER.pack(tokens, top) + b"".join(part.tobytes() for part in parts)


def _decode(value: bytes, count: int, top: int) -> TokenScores | None:
    """None for what is no entry: it is scored again, and written over."""
    width = 4 * count
    if len(value) != _HEADER.size + width * (1 + 2 * top):
        return None
    if _HEADER.unpack_from(value) != (count, top):
        return None
    body = memoryview(value)[_HEADER.size :]
    logprobs: LogProbs = np.frombuffer(body[:width], np.float32)
    ids: TokenIds = np.frombuffer(body[width : width * (1 + top)], np.int32)
    values: LogProbs = np.frombuffer(body[width * (1 + top) :], np.float32)
    try:
        return valid_scores(
            logprobs, count, ids.reshape(count, top), values.reshape(count, top), top
        )
    except InvalidLogProbs:
        return None
