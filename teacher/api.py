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

from pydantic import BaseModel, ConfigDict, Field

from teacher.scores import Query, TokenScores

MAX_SEQUENCES = 1024  # in one request
MAX_TOP = 1024  # alternatives of one token, whatever the model's limit
_INT32_MAX = 2**31 - 1

TokenId = Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)]


class Request(BaseModel):
    """Base of what clients send: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class ScoreSequence(Request):
    """One sequence. The prompt is never empty: the first token has nothing before it."""

    prompt: list[TokenId] = Field(min_length=1)
    completion: list[TokenId]


class ScoreRequest(Request):
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

    def query(self) -> Query:
        """The same, without the form."""
        return Query(
            model=self.model,
            sequences=[[*s.prompt, *s.completion] for s in self.sequences],
            starts=[len(s.prompt) for s in self.sequences],
            top=self.top_logprobs,
            path=self._path,
        )

    def _path(self, sequence: int, token: int | None) -> str:
        if token is None:
            return f"sequences.{sequence}"
        prompt = len(self.sequences[sequence].prompt)
        part, place = ("prompt", token) if token < prompt else ("completion", token - prompt)
        return f"sequences.{sequence}.{part}.{place}"


class SequenceScore(BaseModel):
    """Log-prob of each completion token, and exp of their negated mean. The perplexity of an
    empty completion is 1: a product of no probabilities."""

    logprobs: list[float]
    perplexity: float
    top_ids: list[list[int]] | None = None
    """The most likely tokens in each completion token's place, the first the most likely."""
    top_logprobs: list[list[float]] | None = None

    @classmethod
    def of(cls, scores: TokenScores, top: int) -> SequenceScore:
        """`scores` in this form. Nothing is checked again: it takes longer than the rest."""
        return cls.model_construct(
            logprobs=scores.logprobs.tolist(),
            perplexity=scores.perplexity,
            top_ids=scores.top_ids.tolist() if top else None,
            top_logprobs=scores.top_logprobs.tolist() if top else None,
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

    @classmethod
    def of(
        cls, model: str, fingerprint: str, scores: Sequence[TokenScores], top: int
    ) -> ScoreResponse:
        """The answer that holds `scores`."""
        made = [SequenceScore.of(score, top) for score in scores]
        return cls.model_construct(model=model, fingerprint=fingerprint, scores=made)


class Limits(BaseModel):
    """What one request may hold: 413 and 422 are answered past it."""

    max_sequences: int = MAX_SEQUENCES
    max_sequence_tokens: int
    max_request_tokens: int
    """Of all sequences of a request together."""
    max_top_logprobs: int
    vocab_size: int
    """Token ids are below it."""


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
