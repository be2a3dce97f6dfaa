"""What is asked of a teacher and what it answers, whatever form they travel in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.trajectory import LogProbs, TokenIds

ROUNDING = 1e-4  # nats by which float arithmetic may lift a log-prob of a sure token above 0
_LARGEST_EXPONENT = 700.0  # exp of more does not fit a JSON number


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Sequences whose tokens from `starts` on are to be scored, with the `top` most likely
    tokens at each place."""

    model: str | None
    sequences: list[list[int]]
    starts: list[int]
    top: int
    path: Callable[[int, int | None], str]
    """Names a sequence, or a token in it, by its path in the request's body."""
    top_field: str = "top_logprobs"
    """Where in the body `top` stands."""

    @property
    def tokens(self) -> int:
        """All tokens that a forward has to see."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What the teacher says of `T` tokens of one sequence: nats, temperature 1."""

    logprobs: LogProbs  # [T]
    top_ids: TokenIds  # [T, k], the most likely first
    top_logprobs: LogProbs  # [T, k]

    @classmethod
    def empty(cls, top: int) -> TokenScores:
        """Of no tokens."""
        none = np.empty((0, top))
        return cls(np.empty(0, np.float32), none.astype(np.int32), none.astype(np.float32))

    @property
    def perplexity(self) -> float:
        """exp of the negated mean log-prob; 1 for no tokens, as a product of nothing."""
        mean_nll = -float(self.logprobs.mean(dtype=np.float64)) if len(self.logprobs) else 0.0
        return math.exp(min(mean_nll, _LARGEST_EXPONENT))


class InvalidLogProbs(ValueError):
    """Numbers that cannot be the log-probs of a sequence; the message says why."""


def valid_scores(
    logprobs: Sequence[float] | npt.NDArray[np.floating],
    count: int,
    top_ids: Sequence[Sequence[int]] | npt.NDArray[np.integer] = (),
    top_logprobs: Sequence[Sequence[float]] | npt.NDArray[np.floating] = (),
    top: int = 0,
) -> TokenScores:
    """The scores of `count` tokens, rounding above 0 removed.

    Raises:
        InvalidLogProbs: there are not `count` of them (or not `top` alternatives of each), one
            is not finite or is positive, or the alternatives are not in order.
    """
    own = np.asarray(logprobs, dtype=np.float64)
    if own.shape != (count,):
        raise InvalidLogProbs(f"{len(logprobs)} log-probs for {count} completion tokens")
    kept = _valid(own, "log-prob")
    if top == 0 or count == 0:
        return TokenScores(kept, *_no_alternatives(count, top))
    try:
        ids = np.asarray(top_ids, dtype=np.int64)
        values = np.asarray(top_logprobs, dtype=np.float64)
    except ValueError as error:  # rows of different lengths
        raise InvalidLogProbs(f"alternatives that are no table: {error}") from error
    if ids.shape != (count, top) or values.shape != (count, top):
        raise InvalidLogProbs(
            f"alternatives of shape {ids.shape} and {values.shape} for ({count}, {top})"
        )
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise InvalidLogProbs("an alternative that is no token id")
    if (np.diff(values, axis=1) > 0).any():
        raise InvalidLogProbs("alternatives that are not in order of their log-probs")
    return TokenScores(kept, ids.astype(np.int32), _valid(values, "alternative"))


def _no_alternatives(count: int, top: int) -> tuple[TokenIds, LogProbs]:
    return np.empty((count, top), np.int32), np.empty((count, top), np.float32)


def _valid(values: npt.NDArray[np.float64], what: str) -> LogProbs:
    # float32 is what is trained on: a value that overflows it is as useless as an infinity.
    wrong = ~(np.abs(values) <= np.finfo(np.float32).max) | (values > ROUNDING)
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), values.shape)
        raise InvalidLogProbs(f"{what} {place[0]} of {len(values)} is {values[place]}")
    return np.minimum(values, 0.0).astype(np.float32)
