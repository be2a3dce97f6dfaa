"""What is asked of a teacher and what it answers, whatever form they travel in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.trajectory import LogProbs, TokenIds

MAX_CANDIDATES = 1024  # at each place, whatever the model's limit
ROUNDING = 1e-4  # nats by which float arithmetic may lift a log-prob of a sure token above 0
_LARGEST_EXPONENT = 700.0  # exp of more does not fit a JSON number


@dataclass(frozen=True, slots=True, eq=False)
class More:
    """What is asked of each place besides its token's log-prob and the most likely tokens."""

    entropy: bool = False
    """Over the whole vocabulary."""
    candidates: Sequence[TokenIds] = ()
    """Token ids [T, m] to be scored in the places of each sequence, with one `m`; none: of none."""

    def __bool__(self) -> bool:
        return self.entropy or bool(self.candidates)

    @property
    def width(self) -> int:
        """m"""
        return self.candidates[0].shape[1] if self.candidates else 0

    def of(self, indices: Sequence[int]) -> More:
        """The same of some of the sequences."""
        return More(self.entropy, [self.candidates[i] for i in indices if self.candidates])


NO_MORE = More()


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
    more: More = NO_MORE

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
    version: int | None = None
    """Of the student's weights that made them; None where the model never changes."""
    chunks: TokenIds | None = None
    """[T] which tokens share a log-prob, where the teacher has another tokenizer (see
    `services.trajectory.ScoredGroup`)."""
    candidates: LogProbs | None = None  # [T, m] of those that were named; None: none were
    entropy: LogProbs | None = None  # [T] over the vocabulary; None: it was not asked for

    @classmethod
    def empty(cls, top: int, more: More = NO_MORE) -> TokenScores:
        """Of no tokens."""
        none = valid_scores((), 0, top=top)
        return with_more(none, np.empty((0, more.width)), (), more)

    @property
    def perplexity(self) -> float:
        """exp of the negated mean log-prob; 1 for no tokens, as a product of nothing."""
        mean_nll = -float(self.logprobs.mean(dtype=np.float64)) if len(self.logprobs) else 0.0
        return math.exp(min(mean_nll, _LARGEST_EXPONENT))


class Question(NamedTuple):
    """What a teacher is asked about one answer of `L` tokens of the student's."""

    ids: TokenIds  # [T] the teacher's tokens
    answered: Callable[[TokenScores], TokenScores] = lambda scores: scores
    """Makes its scores [T] those of the student's tokens [L]."""
    candidates: TokenIds | None = None
    """[T, k] the student's most likely tokens, where the rollout recorded them, as the teacher has
    them."""


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
        raise InvalidLogProbs("an alternative that is not a token id")
    if (np.diff(values, axis=1) > 0).any():
        raise InvalidLogProbs("alternatives that are not in order of their log-probs")
    return TokenScores(kept, ids.astype(np.int32), _valid(values, "alternative"))


def with_more(
    scores: TokenScores,
    candidates: Sequence[Sequence[float]] | npt.NDArray[np.floating],
    entropy: Sequence[float] | npt.NDArray[np.floating],
    more: More,
) -> TokenScores:
    """`scores` with what else was asked of its tokens; whatever was not is left out.

    Raises:
        InvalidLogProbs: there is not one number for each, or one cannot be what it is said to be.
    """
    count = len(scores.logprobs)
    if more.candidates:
        try:
            values = np.asarray(candidates, np.float64)
        except ValueError as error:  # rows of different lengths
            raise InvalidLogProbs(f"candidates that are no table: {error}") from error
        if count and values.shape != (count, more.width):
            raise InvalidLogProbs(f"candidates of shape {values.shape} for ({count}, {more.width})")
        values = values.reshape(count, more.width)
        scores = replace(scores, candidates=_valid(values, "candidate"))
    if more.entropy:
        spread = np.asarray(entropy, np.float64)
        if spread.shape != (count,):
            raise InvalidLogProbs(f"{len(spread)} entropies for {count} completion tokens")
        scores = replace(scores, entropy=-_valid(-spread, "negative entropy"))
    return scores


def _no_alternatives(count: int, top: int) -> tuple[TokenIds, LogProbs]:
    return np.empty((count, top), np.int32), np.empty((count, top), np.float32)


def _valid(values: npt.NDArray[np.float64], what: str) -> LogProbs:
    # float32 is what is trained on: a value that overflows it is as useless as an infinity.
    wrong = ~(np.abs(values) <= np.finfo(np.float32).max) | (values > ROUNDING)
    if wrong.any():
        index = np.unravel_index(int(np.argmax(wrong)), values.shape)
        raise InvalidLogProbs(f"{what} {index[0]} of {len(values)} is {values[index]}")
    return np.minimum(values, 0.0).astype(np.float32)
