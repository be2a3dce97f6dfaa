"""The teacher's REST application: checks requests, asks the scorer, shapes every error alike.

Knows nothing of Ray: `teacher.serve` deploys it, tests run it as it is.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from teacher.api import (
    ErrorBody,
    ErrorDetail,
    Health,
    ModelCard,
    ModelList,
    ScoreRequest,
    ScoreResponse,
    SequenceScore,
)
from teacher.auth import BearerAuth, KeyRing
from teacher.scorer import Scorer


class ApiError(Exception):
    """A request that is refused, with the status and the body that say why."""

    def __init__(self, status: HTTPStatus, type_: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(type=type_, message=message, param=param)


def build_app(scorer: Scorer, keys: KeyRing, info: ModelCard) -> FastAPI:
    """The application around one scorer.

    Args:
        scorer: computes the log-probs.
        keys: who may ask; an empty ring asks nobody for a key.
        info: the model that `scorer` holds, and what a request may contain.
    """
    app = FastAPI(title="SCOPE teacher", description="Log-probs of given tokens under the teacher.")
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    if keys:
        app.add_middleware(BearerAuth, keys=keys)
    app.include_router(_open_routes())
    app.include_router(_model_routes(scorer, info, secured=bool(keys)))
    return app


def _open_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        return Health()

    return router


def _model_routes(scorer: Scorer, info: ModelCard, *, secured: bool) -> APIRouter:
    # The dependency only documents the keys in the OpenAPI document; BearerAuth checks them.
    documented = [Security(HTTPBearer(auto_error=False))] if secured else []
    statuses = [400, 404, 413, 422, 500] + ([401] if secured else [])
    router = APIRouter(
        prefix="/v1",
        dependencies=documented,
        responses={status: {"model": ErrorBody} for status in statuses},
    )

    @router.get("/models")
    async def models() -> ModelList:
        return ModelList(data=[info])

    @router.post("/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        _check(request, info)
        logprobs = await scorer.score(
            [[*sequence.prompt, *sequence.completion] for sequence in request.sequences],
            [len(sequence.prompt) for sequence in request.sequences],
        )
        return ScoreResponse(
            model=info.id,
            fingerprint=info.fingerprint,
            scores=[SequenceScore.of(values) for values in logprobs],
        )

    return router


def _check(request: ScoreRequest, info: ModelCard) -> None:
    """Refuses what the schema lets through but this model cannot score."""
    if request.model not in (None, info.id):
        message = f"this server has no model {request.model!r}, only {info.id!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, "unknown_model", message, "model")
    limits = info.limits
    for index, sequence in enumerate(request.sequences):
        length = len(sequence.prompt) + len(sequence.completion)
        if length > limits.max_sequence_tokens:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too_long",
                f"{length} tokens, more than the {limits.max_sequence_tokens} of one sequence",
                f"sequences.{index}",
            )
        for name, ids in (("prompt", sequence.prompt), ("completion", sequence.completion)):
            if ids and max(ids) >= limits.vocab_size:
                place = next(i for i, id_ in enumerate(ids) if id_ >= limits.vocab_size)
                raise ApiError(
                    HTTPStatus.UNPROCESSABLE_ENTITY,
                    "unknown_token",
                    f"token id {ids[place]} is outside of the vocabulary of {limits.vocab_size}",
                    f"sequences.{index}.{name}.{place}",
                )


# -------------------------------------------------------------------------------- errors


def _answer(status: int, detail: ErrorDetail, headers: Any = None) -> JSONResponse:
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers=headers)


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error.status, error.detail)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    """The first field that is wrong, by its path in the body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":  # its "path" is an offset in the text
        detail = ErrorDetail(type="invalid_json", message="the body is not valid JSON")
    else:
        path = ".".join(str(part) for part in first["loc"][1:]) or None
        detail = ErrorDetail(type="invalid_request", message=first["msg"], param=path)
    return _answer(HTTPStatus.UNPROCESSABLE_ENTITY, detail)


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
