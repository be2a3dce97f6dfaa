"""What a server takes on: past its bounds a caller is told at once when to come again, instead of
being kept until it gives up."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_WINDOW_S = 30.0  # over which the speed of scoring is measured
_SHORTEST_S, _LONGEST_S = 1, 30  # what callers are asked to wait


class Refused(Exception):
    """Not now. `retry_after_s` is a guess at when."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = max(_SHORTEST_S, min(_LONGEST_S, math.ceil(retry_after_s)))


class Overloaded(Refused):
    """The server holds as much as it may."""


class RateLimited(Refused):
    """This key has used up its share."""


class Admission:
    """Counts what one process holds, and refuses what would be more.

    Args:
        max_requests: held at once, worked on or waiting; refused before their body is read.
        max_tokens: of the sequences that are held. One request that is larger goes alone.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._finished: deque[tuple[float, int]] = deque()
        self.requests = 0
        self.tokens = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Holds a place for one request.

        Raises:
            Overloaded: there is none.
        """
        if self.requests >= self._max_requests:
            raise Overloaded(f"{self.requests} requests are held already", self._wait_s())
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def scoring(self, tokens: int) -> Iterator[None]:
        """Holds room for sequences of `tokens` tokens in all.

        Raises:
            Overloaded: there is not so much.
        """
        if self.tokens and self.tokens + tokens > self._max_tokens:
            raise Overloaded(f"{self.tokens} tokens are waiting already", self._wait_s())
        self.tokens += tokens
        try:
            yield
            self._finished.append((time.monotonic(), tokens))
        finally:
            self.tokens -= tokens

    def _wait_s(self) -> float:
        """How long what is held will take, at the speed of the last half minute."""
        now = time.monotonic()
        while self._finished and self._finished[0][0] < now - _WINDOW_S:
            self._finished.popleft()
        done = sum(tokens for _, tokens in self._finished)
        if not done:
            return _SHORTEST_S
        return self.tokens * (now - self._finished[0][0]) / done


class RateLimit:
    """A share of tokens a second for each key, saved up for a minute at most.

    A request is let in while its key owes nothing, and may leave it with a debt: so one of any
    size is served, and the average holds.
    """

    _SAVED_S = 60.0

    def __init__(self, tokens_per_s: float) -> None:
        self._rate = tokens_per_s
        self._accounts: dict[str, tuple[float, float]] = {}  # key -> (credit, when)

    def spend(self, key: str, tokens: int) -> None:
        """Books `tokens` on `key`.

        Raises:
            RateLimited: it is in debt.
        """
        now = time.monotonic()
        most = self._rate * self._SAVED_S
        credit, when = self._accounts.get(key, (most, now))
        credit = min(most, credit + (now - when) * self._rate)
        if credit <= 0:
            self._accounts[key] = (credit, now)
            raise RateLimited(
                f"this key has used up its {self._rate:g} tokens/s", -credit / self._rate
            )
        self._accounts[key] = (credit - tokens, now)
