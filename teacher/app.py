"""The teacher's REST application: checks requests, asks the scorer, shapes every error alike.

    key ─▶ place ─▶ body (JSON | safetensors) ─▶ limits ─▶ share, room ─▶ scorer ─▶ answer
    401    503      413 415 422                  404 413   429    503     500       as asked for

Knows nothing of Ray: `teacher.serve` deploys it, tests run it as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from teacher import wire
from teacher.admission import Admission, RateLimit, RateLimited, Refused
from teacher.api import (
    MAX_SEQUENCES,
    ErrorBody,
    ErrorDetail,
    ErrorType,
    Health,
    ModelCard,
    ModelList,
    ScoreRequest,
    ScoreResponse,
)
from teacher.auth import BearerAuth, KeyRing
from teacher.completions import CompletionRequest, CompletionResponse
from teacher.metrics import MEDIA_TYPE as METRICS_TYPE
from teacher.metrics import Measured, Metrics
from teacher.scorer import Scorer, ScorerDied, ScoringError
from teacher.scores import Query, TokenScores

log = logging.getLogger(__name__)

_GONE = 499  # nginx's: nobody is there any more to read it
_JSON = "application/json"

ResultT = TypeVar("ResultT")
BodyT = TypeVar("BodyT", bound=BaseModel)
Shape: TypeAlias = Callable[[ModelCard, list[TokenScores]], Response]


@dataclass(frozen=True, slots=True)
class Teacher:
    """One model that is served."""

    card: ModelCard
    scorer: Scorer


class ApiError(Exception):
    """A request that is refused, with the status and the body that say why."""

    def __init__(self, status: HTTPStatus, type_: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(type=type_, message=message, param=param)


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
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(Refused, _on_refusal)
    app.add_exception_handler(ScoringError, _on_scoring_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
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
                query, shape = read(await self._body(request), _media_type(request))
                teacher = self._choose(query)
                if self.rate_limit:
                    self.rate_limit.spend(getattr(request.state, "caller", ""), query.tokens)
                with self.admission.scoring(query.tokens):
                    scores = await _unless_gone(
                        request, teacher.scorer.score(query.sequences, query.starts, query.top)
                    )
                answer = shape(teacher.card, scores)
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            return Response(status_code=_GONE)
        self.metrics.read.labels(teacher.card.id).inc(query.tokens)
        scored = sum(len(score.logprobs) for score in scores)
        self.metrics.scored.labels(teacher.card.id).inc(scored)
        return answer

    async def _body(self, request: Request) -> bytes:
        """All of the body, given up as soon as it is too long."""
        length = request.headers.get("content-length", "0")
        body = bytearray()
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self._too_long()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise self._too_long()
        return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self.max_body_bytes} bytes"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_long", message, None)

    def _choose(self, query: Query) -> Teacher:
        """The teacher that is asked for, if it can score this at all."""
        name = query.model if query.model is not None else next(iter(self.teachers))
        if name not in self.teachers:
            known = ", ".join(repr(id_) for id_ in self.teachers)
            message = f"this server has no model {name!r}, only {known}"
            raise ApiError(HTTPStatus.NOT_FOUND, "unknown_model", message, "model")
        teacher = self.teachers[name]
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
    for index, ids in enumerate(query.sequences):
        if len(ids) > limits.max_sequence_tokens:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_long",
                f"{len(ids)} tokens, more than the {limits.max_sequence_tokens} of one sequence",
                query.path(index, None),
            )
        if max(ids) >= limits.vocab_size:
            place = next(i for i, id_ in enumerate(ids) if id_ >= limits.vocab_size)
            raise ApiError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "unknown_token",
                f"token id {ids[place]} is outside of the vocabulary of {limits.vocab_size}",
                query.path(index, place),
            )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the caller goes away.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    """Returns when the caller goes away; to be awaited when the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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

    @router.get("/metrics", responses={**refused, 200: {"content": {"text/plain": {}}}})
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

        def read(body: bytes, media_type: str) -> tuple[Query, Shape]:
            query = _score_query(body, media_type)
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

        def read(body: bytes, media_type: str) -> tuple[Query, Shape]:
            asked = _parse(CompletionRequest, body, media_type)
            return asked.query(), lambda card, scores: _json(asked.response(card.id, scores))

        return await service.answer(request, read)

    return router


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _takes(model: type[BaseModel], others: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body of a route that parses it by itself, for the OpenAPI document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    content = {_JSON: {"schema": _inlined(schema, schema.pop("$defs", {}))}, **(others or {})}
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


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()


def _score_query(body: bytes, media_type: str) -> Query:
    if media_type != wire.MEDIA_TYPE:
        return _parse(ScoreRequest, body, media_type).query()
    try:
        return wire.decode_request(body)
    except wire.WireError as error:
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", str(error), None
        ) from error


def _score_answer(card: ModelCard, scores: list[TokenScores], top: int, binary: bool) -> Response:
    if binary:
        answer = wire.encode_answer(card.id, card.fingerprint, scores, top)
        return Response(answer, media_type=wire.MEDIA_TYPE)
    return _json(ScoreResponse.of(card.id, card.fingerprint, scores, top), exclude_none=True)


def _parse(kind: type[BodyT], body: bytes, media_type: str) -> BodyT:
    """A JSON body; the error names the first field that is wrong, by its path."""
    if media_type != _JSON:
        message = f"the body is {media_type!r}, not {_JSON}"
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
    return Response(model.model_dump_json(exclude_none=exclude_none), media_type=_JSON)


# -------------------------------------------------------------------------------- errors


def _answer(status: int, detail: ErrorDetail, headers: Any = None) -> JSONResponse:
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers=headers)


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error.status, error.detail)


async def _on_refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    status, type_ = HTTPStatus.SERVICE_UNAVAILABLE, "overloaded"
    if isinstance(error, RateLimited):
        status, type_ = HTTPStatus.TOO_MANY_REQUESTS, "rate_limited"
    detail = ErrorDetail(type=type_, message=str(error))
    return _answer(status, detail, {"Retry-After": str(error.retry_after_s)})


async def _on_scoring_error(_: Request, error: Exception) -> JSONResponse:
    """The model's own fault, which asking again does not mend: clients tell it by its type."""
    assert isinstance(error, ScoringError)
    log.error("%s", error)
    where = f"sequences.{error.sequence}"
    detail = ErrorDetail(type=ErrorType.NO_LOGPROBS, message=str(error), param=where)
    return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, detail)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).name.lower()
    detail = ErrorDetail(type=kind, message=str(error.detail))
    return _answer(error.status_code, detail, error.headers)


async def _on_fault(_: Request, __: Exception) -> JSONResponse:
    """A fault of ours. Starlette raises it again after this answer, so that the server logs its
    trace, which the client never sees."""
    detail = ErrorDetail(type="server_error", message="the teacher failed; its log says why")
    return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, detail)
