"""The teacher's REST application: checks requests, asks the scorer, shapes every error alike.

    key ─▶ place ─▶ body (JSON | safetensors) ─▶ limits ─▶ share, room ─▶ scorer ─▶ answer
    401    503      413 415 422                  404 413   429    503     500       as asked for

Knows nothing of Ray: `teacher.serve` deploys it, tests run it as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

from services.errors import WireError
from teacher import wire
from teacher.admission import Admission, RateLimit
from teacher.api import (
    MAX_SEQUENCES,
    ErrorBody,
    Health,
    Limits,
    ModelCard,
    ModelList,
    ScoreRequest,
    ScoreResponse,
)
from teacher.asgi import (
    GONE,
    JSON,
    ApiError,
    choose,
    media_type,
    read_body,
    shape_errors,
    unless_gone,
)
from teacher.auth import BearerAuth, KeyRing
from teacher.completions import CompletionRequest, CompletionResponse
from teacher.metrics import MEDIA_TYPE as METRICS_TYPE
from teacher.metrics import Measured, Metrics
from teacher.scorer import Scorer, ScorerDied
from teacher.scores import More, Query, TokenScores

BodyT = TypeVar("BodyT", bound=BaseModel)
Shape: TypeAlias = Callable[[ModelCard, list[TokenScores]], Response]


@dataclass(frozen=True, slots=True)
class Teacher:
    """One model that is served."""

    card: ModelCard
    scorer: Scorer


def build_app(
    teachers: Sequence[Teacher],
    keys: KeyRing,
    *,
    max_body_bytes: int,
    admission: Admission,
    rate_limit: RateLimit | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The application around the scorers of one process.

    Args:
        teachers: what is served; the first answers requests that name no model.
        keys: who may ask; an empty ring asks nobody for a key.
        max_body_bytes: longest body of a request.
        admission: what the process holds at once.
        rate_limit: the share of each key; None is no limit.
        metrics: where everything is counted.
    """
    service = _Service(
        {teacher.card.id: teacher for teacher in teachers},
        admission,
        rate_limit,
        metrics or Metrics(),
        max_body_bytes,
    )
    app = FastAPI(title="SCOPE teacher", description="Log-probs of given tokens under a teacher.")
    shape_errors(app)
    if keys:
        app.add_middleware(BearerAuth, keys=keys)
    app.add_middleware(Measured, metrics=service.metrics)
    app.include_router(_open_routes(service))
    app.include_router(_secured_routes(service, secured=bool(keys)))
    return app


# ------------------------------------------------------------------------------- service


@dataclass(frozen=True, slots=True)
class _Service:
    """What a request goes through, whatever its form."""

    teachers: dict[str, Teacher]
    admission: Admission
    rate_limit: RateLimit | None
    metrics: Metrics
    max_body_bytes: int

    def __post_init__(self) -> None:
        self.metrics.gauge("held_requests", "Held at once.", lambda: self.admission.requests)
        self.metrics.gauge("held_tokens", "Of held sequences.", lambda: self.admission.tokens)

    async def answer(
        self,
        request: Request,
        read: Callable[[bytes, str], tuple[Query, Shape]],
    ) -> Response:
        """The answer to `request`, whose body `read` understands and whose scores it shapes."""
        try:
            with self.admission.request():
                query, shape = read(
                    await read_body(request, self.max_body_bytes), media_type(request)
                )
                teacher = self._choose(query)
                if self.rate_limit:
                    self.rate_limit.spend(getattr(request.state, "caller", ""), query.tokens)
                with self.admission.scoring(query.tokens):
                    scoring = teacher.scorer.score(
                        query.sequences, query.starts, query.top, query.more
                    )
                    scores = await unless_gone(request, scoring)
                answer = shape(teacher.card, scores)
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            return Response(status_code=GONE)
        except asyncio.CancelledError:
            # Serve tells a replica in two ways that the caller is gone: by a message, and by
            # cancelling the call. Either may come first.
            self.metrics.cancelled.inc()
            raise
        self.metrics.read.labels(teacher.card.id).inc(query.tokens)
        scored = sum(len(score.logprobs) for score in scores)
        self.metrics.scored.labels(teacher.card.id).inc(scored)
        return answer

    def _choose(self, query: Query) -> Teacher:
        """The teacher that is asked for, if it can score this at all."""
        teacher = self.teachers[choose(query.model, self.teachers)]
        _check(query, teacher.card)
        return teacher


def _check(query: Query, card: ModelCard) -> None:
    """Refuses what the schemas let through but this model cannot score."""
    limits = card.limits
    if len(query.sequences) > MAX_SEQUENCES:
        message = f"{len(query.sequences)} sequences, more than {MAX_SEQUENCES}"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", message, None)
    if query.tokens > limits.max_request_tokens:
        message = f"{query.tokens} tokens, more than the {limits.max_request_tokens} of one request"
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", message, None)
    if query.top > limits.max_top_logprobs:
        message = f"{query.top} alternatives, more than {limits.max_top_logprobs}"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_many", message, query.top_field)
    _check_more(query.more, card.limits)
    for index, ids in enumerate(query.sequences):
        if len(ids) > limits.max_sequence_tokens:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_long",
                f"{len(ids)} tokens, more than the {limits.max_sequence_tokens} of one sequence",
                query.path(index, None),
            )
        if max(ids) >= limits.vocab_size:
            position = next(i for i, id_ in enumerate(ids) if id_ >= limits.vocab_size)
            raise ApiError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "unknown_token",
                f"token id {ids[position]} is outside of the vocabulary of {limits.vocab_size}",
                query.path(index, position),
            )


def _check_more(more: More, limits: Limits) -> None:
    for name, wanted in (("candidates", more.candidates), ("entropy", more.entropy)):
        if wanted and name not in limits.gives:
            message = f"this model's engine gives no {name}"
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "not_given", message, name)
    if more.width > limits.max_top_logprobs:
        message = f"{more.width} candidates, more than {limits.max_top_logprobs}"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_many", message, "candidates")
    highest = max((int(ids.max(initial=0)) for ids in more.candidates), default=0)
    if highest >= limits.vocab_size:
        message = f"candidate {highest} is outside of the vocabulary of {limits.vocab_size}"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown_token", message, "candidates")


# -------------------------------------------------------------------------------- routes


def _open_routes(service: _Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        """This process is alive."""
        return Health()

    @router.get("/ready", responses=_errors(503))
    async def ready() -> Health:
        """Every model can score."""
        try:
            await asyncio.gather(*(t.scorer.check() for t in service.teachers.values()))
        except ScorerDied as error:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", str(error), None) from error
        return Health()

    return router


def _secured_routes(service: _Service, *, secured: bool) -> APIRouter:
    # The dependency only documents the keys in the OpenAPI document; BearerAuth checks them.
    documented = [Security(HTTPBearer(auto_error=False))] if secured else []
    router = APIRouter(dependencies=documented)
    refused = _errors(401) if secured else {}
    scoring = _errors(404, 413, 415, 422, 429, 500, 503)

    @router.get("/metrics", response_class=PlainTextResponse, responses=refused)
    async def metrics() -> Response:
        """Prometheus' text form of what this process counts."""
        return Response(service.metrics.render(), media_type=METRICS_TYPE)

    @router.get("/v1/models", responses=refused)
    async def models() -> ModelList:
        """What is served, and what one request may hold."""
        return ModelList(data=[teacher.card for teacher in service.teachers.values()])

    @router.post(
        "/v1/score",
        response_model=ScoreResponse,
        responses={**refused, **scoring, 200: {"content": {wire.MEDIA_TYPE: _BINARY}}},
        openapi_extra=_takes(ScoreRequest, {wire.MEDIA_TYPE: _BINARY}),
    )
    async def score(request: Request) -> Response:
        """Log-probs of every completion token. Both forms of the body hold the same; the answer
        has the one that `Accept` names."""
        binary = wire.MEDIA_TYPE in request.headers.get("accept", "")

        def read(body: bytes, form: str) -> tuple[Query, Shape]:
            query = _score_query(body, form)
            return query, lambda card, scores: _score_answer(card, scores, query.top, binary)

        return await service.answer(request, read)

    @router.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses={**refused, **scoring},
        openapi_extra=_takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Log-probs for OpenAI's clients."""

        def read(body: bytes, form: str) -> tuple[Query, Shape]:
            asked = _parse(CompletionRequest, body, form)
            return asked.query(), lambda card, scores: _json(asked.response(card.id, scores))

        return await service.answer(request, read)

    return router


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _takes(model: type[BaseModel], others: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body of a route that parses it by itself, for the OpenAPI document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    content = {JSON: {"schema": _inlined(schema, schema.pop("$defs", {}))}, **(others or {})}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """`schema` with every reference replaced: FastAPI knows nothing of these definitions."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(part, definitions) for name, part in schema.items()}


def _score_query(body: bytes, form: str) -> Query:
    if form != wire.MEDIA_TYPE:
        return _parse(ScoreRequest, body, form).query()
    try:
        return wire.decode_request(body)
    except WireError as error:
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", str(error), None
        ) from error


def _score_answer(card: ModelCard, scores: list[TokenScores], top: int, binary: bool) -> Response:
    if binary:
        answer = wire.encode_answer(card.id, card.fingerprint, scores, top)
        return Response(answer, media_type=wire.MEDIA_TYPE)
    return _json(ScoreResponse.of(card.id, card.fingerprint, scores, top), exclude_none=True)


def _parse(kind: type[BodyT], body: bytes, form: str) -> BodyT:
    """A JSON body; the error names the first field that is wrong, by its path."""
    if form != JSON:
        message = f"the body is {form!r}, not {JSON}"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unknown_form", message, None)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    if first["type"] == "json_invalid":
        raise ApiError(status, "invalid_json", "the body is not valid JSON", None)
    path = ".".join(str(part) for part in first["loc"]) or None
    raise ApiError(status, "invalid_request", first["msg"], path)


def _json(model: BaseModel, *, exclude_none: bool = False) -> Response:
    return Response(model.model_dump_json(exclude_none=exclude_none), media_type=JSON)
