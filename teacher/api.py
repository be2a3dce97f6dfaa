"""The teacher's schemas: what its routes take and give, and what errors look like.

    POST /v1/score        token ids in, natural-log probabilities of every completion token out
    POST /v1/completions  the same for OpenAI's clients (see `teacher.completions`)
    GET  /v1/models       the models that are served: their fingerprints and limits
    GET  /health, /ready  is the process alive; will it take work. They never need a key
    GET  /metrics         Prometheus' text form

Nothing is tokenised here: the ids that were sampled are the ids that are scored. Log-probs are
in nats, at temperature 1. Every error has the body `{"error": {"type", "message", "param"}}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.trajectory import TokenIds
from teacher.scores import MAX_CANDIDATES, More, Query, TokenScores

MAX_SEQUENCES = 1024  # in one request
MAX_TOP = 1024  # alternatives of one token, whatever the model's limit
_INT32_MAX = 2**31 - 1

TokenId = Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)]


class RequestBody(BaseModel):
    """Base of what clients send: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class ScoreSequence(RequestBody):
    """One sequence. The prompt is never empty: the first token has nothing before it."""

    prompt: list[TokenId] = Field(min_length=1)
    completion: list[TokenId]
    candidates: list[list[TokenId]] | None = None
    """Token ids to be scored in each completion token's place: as many in each, and in each
    sequence of a request."""


class ScoreRequest(RequestBody):
    """What is to be scored. `model` may be left out: the first that is served answers."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sequences": [{"prompt": [5, 9, 12], "completion": [7, 1]}], "top_logprobs": 2}
            ]
        }
    )

    model: str | None = None
    sequences: list[ScoreSequence] = Field(min_length=1, max_length=MAX_SEQUENCES)
    top_logprobs: int = Field(default=0, strict=True, ge=0, le=MAX_TOP)
    """So many of the most likely tokens at each place are returned too."""
    entropy: bool = Field(default=False, strict=True)
    """The entropy over the vocabulary at each place is returned too."""

    @model_validator(mode="after")
    def _tables(self) -> ScoreRequest:
        given = [s.candidates for s in self.sequences]
        if all(one is None for one in given):
            return self
        if any(
            one is None or len(one) != len(s.completion)
            for one, s in zip(given, self.sequences, strict=True)
        ):
            raise ValueError("candidates are needed in each completion token's place")
        widths = {len(row) for one in given for row in one or ()}
        if len(widths) > 1 or not widths <= set(range(1, MAX_CANDIDATES + 1)):
            raise ValueError(f"candidates are 1 to {MAX_CANDIDATES} ids, as many in each place")
        return self

    def query(self) -> Query:
        """The same, without the form."""
        return Query(
            model=self.model,
            sequences=[[*s.prompt, *s.completion] for s in self.sequences],
            starts=[len(s.prompt) for s in self.sequences],
            top=self.top_logprobs,
            path=self._path,
            more=More(self.entropy, self._candidates()),
        )

    def _candidates(self) -> list[TokenIds]:
        rows = [s.candidates for s in self.sequences if s.candidates is not None]
        width = next((len(row) for one in rows for row in one), 1)  # of no tokens: any will do
        return [np.array(one, np.int32).reshape(-1, width) for one in rows]

    def _path(self, sequence: int, token: int | None) -> str:
        if token is None:
            return f"sequences.{sequence}"
        prompt = len(self.sequences[sequence].prompt)
        part, index = ("prompt", token) if token < prompt else ("completion", token - prompt)
        return f"sequences.{sequence}.{part}.{index}"


class SequenceScore(BaseModel):
    """Log-prob of each completion token, and exp of their negated mean. The perplexity of an
    empty completion is 1: a product of no probabilities."""

    logprobs: list[float]
    perplexity: float
    top_ids: list[list[int]] | None = None
    """The most likely tokens in each completion token's place, the first the most likely."""
    top_logprobs: list[list[float]] | None = None
    candidate_logprobs: list[list[float]] | None = None
    """Of the candidates that were asked for, in their order."""
    entropy: list[float] | None = None
    """Over the vocabulary, in each completion token's place."""

    @classmethod
    def of(cls, scores: TokenScores, top: int) -> SequenceScore:
        """`scores` in this form. Nothing is checked again: it takes longer than the rest."""
        return cls.model_construct(
            logprobs=scores.logprobs.tolist(),
            perplexity=scores.perplexity,
            top_ids=scores.top_ids.tolist() if top else None,
            top_logprobs=scores.top_logprobs.tolist() if top else None,
            candidate_logprobs=None if scores.candidates is None else scores.candidates.tolist(),
            entropy=None if scores.entropy is None else scores.entropy.tolist(),
        )


class ScoreResponse(BaseModel):
    """One score for each sequence, in the request's order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "teacher",
                    "fingerprint": "0f1e2d3c4b5a6978",
                    "scores": [
                        {
                            "logprobs": [-0.25, -1.5],
                            "perplexity": 2.4,
                            "top_ids": [[7, 3], [4, 1]],
                            "top_logprobs": [[-0.25, -2.0], [-0.75, -1.5]],
                        }
                    ],
                }
            ]
        }
    )

    model: str
    fingerprint: str
    scores: list[SequenceScore]
    version: int | None = None
    """Of the student's weights that made the scores, where the model follows a student."""

    @classmethod
    def of(
        cls, model: str, fingerprint: str, scores: Sequence[TokenScores], top: int
    ) -> ScoreResponse:
        """The answer that holds `scores`."""
        made = [SequenceScore.of(score, top) for score in scores]
        version = scores[0].version if scores else None
        return cls.model_construct(
            model=model, fingerprint=fingerprint, scores=made, version=version
        )


class Limits(BaseModel):
    """What one request may hold: 413 and 422 are answered past it."""

    max_sequences: int = MAX_SEQUENCES
    max_sequence_tokens: int
    max_request_tokens: int
    """Of all sequences of a request together."""
    max_top_logprobs: int
    """The same bounds the candidates."""
    vocab_size: int
    """Token ids are below it."""
    gives: list[Literal["candidates", "entropy"]] = []
    """What its engine computes of each place besides log-probs and the most likely tokens."""


class Tokens(BaseModel):
    """What a student's tokens must agree with, as `services.models.Fingerprint` has it."""

    tokenizer: str
    tokenizer_size: int
    end_tokens: list[int]
    chat_template: str


class ModelCard(BaseModel):
    """A served model. The fingerprint changes with its weights or its architecture."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["scope"] = "scope"
    created: int = 0
    fingerprint: str
    context_length: int
    tokens: Tokens
    limits: Limits


class ModelList(BaseModel):
    """All models of this server; the first answers requests that name none."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "data": [
                        {
                            "id": "teacher",
                            "fingerprint": "0f1e2d3c4b5a6978",
                            "context_length": 32768,
                            "tokens": {
                                "tokenizer": "5a6978796a5b4c3d",
                                "tokenizer_size": 151669,
                                "end_tokens": [151645, 151643],
                                "chat_template": "8796a5b4c3d2e1f0",
                            },
                            "limits": {
                                "max_sequence_tokens": 32768,
                                "max_request_tokens": 1048576,
                                "max_top_logprobs": 64,
                                "vocab_size": 151936,
                            },
                        }
                    ],
                }
            ]
        }
    )

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of a server that is well."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """`param` is the path of the field at fault, such as `sequences.0.prompt.3`."""

    type: str
    message: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "type": "too_long",
                        "message": "40000 tokens, more than the 32768 of one sequence",
                        "param": "sequences.0",
                    }
                }
            ]
        }
    )

    error: ErrorDetail


class ErrorType:
    """Values of `ErrorDetail.type` that clients tell apart."""

    NO_LOGPROBS = "no_logprobs"
    """The model computed something that is no log-prob: asking again gives the same."""
