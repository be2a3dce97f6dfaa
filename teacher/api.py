"""The teacher's wire: schemas of requests and answers, and what a valid list of log-probs is.

    POST /v1/score    token ids in, natural-log probabilities of every completion token out
    GET  /v1/models   the one model that is served: its fingerprint and its limits
    GET  /health      200 once the model is loaded; the only path that never needs a key

Nothing is tokenised here: the ids that were sampled are the ids that are scored. Log-probs are
in nats, at temperature 1. Every error has the body `{"error": {"type", "message", "param"}}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from services.trajectory import LogProbs

MAX_SEQUENCES = 1024  # in one request
ROUNDING = 1e-4  # nats by which float arithmetic may lift a log-prob of a sure token above 0
_LARGEST_EXPONENT = 700.0  # exp of more does not fit a JSON number

TokenId = Annotated[int, Field(strict=True, ge=0)]


class Request(BaseModel):
    """Base of what clients send: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class ScoreSequence(Request):
    """One sequence. The prompt is never empty: the first token has nothing before it."""

    prompt: list[TokenId] = Field(min_length=1)
    completion: list[TokenId]


class ScoreRequest(Request):
    """`model` may be left out: a server has exactly one."""

    model: str | None = None
    sequences: list[ScoreSequence] = Field(min_length=1, max_length=MAX_SEQUENCES)
    top_logprobs: Literal[0] = 0

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _no_alternatives(cls, value: object) -> object:
        if value != 0:
            raise PydanticCustomError(
                "unsupported",
                "only 0 is supported: the log-probs of the completion's own tokens are returned, "
                "not those of alternatives",
            )
        return value


class SequenceScore(BaseModel):
    """Log-prob of each completion token, and exp of their negated mean. The perplexity of an
    empty completion is 1: a product of no probabilities."""

    logprobs: list[float]
    perplexity: float

    @classmethod
    def of(cls, logprobs: list[float]) -> SequenceScore:
        mean_nll = -sum(logprobs) / len(logprobs) if logprobs else 0.0
        perplexity = math.exp(min(mean_nll, _LARGEST_EXPONENT))
        return cls(logprobs=logprobs, perplexity=perplexity)


class ScoreResponse(BaseModel):
    """One score for each sequence, in the request's order."""

    model: str
    fingerprint: str
    scores: list[SequenceScore]


class Limits(BaseModel):
    """What one request may hold: 413 and 422 are answered past it."""

    max_sequences: int = MAX_SEQUENCES
    max_sequence_tokens: int
    vocab_size: int
    """Token ids are below it."""


class ModelCard(BaseModel):
    """The served model. The fingerprint changes with its weights or its architecture."""

    id: str
    fingerprint: str
    context_length: int
    limits: Limits


class ModelList(BaseModel):
    """All models of this server: always one."""

    data: list[ModelCard]


class Health(BaseModel):
    """The answer of a server that is ready."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """`param` is the path of the field at fault, such as `sequences.0.prompt.3`."""

    type: str
    message: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class InvalidLogProbs(ValueError):
    """Numbers that cannot be the log-probs of a sequence; the message says why."""


def valid_logprobs(values: Sequence[float], count: int) -> LogProbs:
    """`values` as `[count]` float32 log-probs, rounding above 0 removed.

    Raises:
        InvalidLogProbs: there are not `count` of them, or one is not finite or is positive.
    """
    logprobs = np.asarray(values, dtype=np.float64)
    if logprobs.shape != (count,):
        raise InvalidLogProbs(f"{len(values)} log-probs for {count} completion tokens")
    # float32 is what is trained on: a value that overflows it is as useless as an infinity.
    wrong = ~(np.abs(logprobs) <= np.finfo(np.float32).max) | (logprobs > ROUNDING)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidLogProbs(f"log-prob {place} of {count} is {logprobs[place]}")
    return np.minimum(logprobs, 0.0).astype(np.float32)
