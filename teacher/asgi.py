"""What both applications of this room do with a request: read it within bounds, see whether its
caller is still there, and shape every error alike."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterable
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from services.tasks import beside
from teacher.admission import RateLimited, Refused
from teacher.api import ErrorBody, ErrorDetail, ErrorType
from teacher.scorer import ScoringError

log = logging.getLogger(__name__)

JSON = "application/json"
GONE = 499  # nginx's: nobody is there any more to read it

ResultT = TypeVar("ResultT")


class ApiError(Exception):
    """A request that is refused, with the status and the body that say why."""

    def __init__(self, status: HTTPStatus, type_: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(type=type_, message=message, param=param)


def media_type(request: Request) -> str:
    """Of the body; JSON where nothing is said."""
    return request.headers.get("content-type", JSON).partition(";")[0].strip().lower()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """All of the body, given up as soon as it is too long.

    Raises:
        ApiError: it is longer than `max_bytes`.
    """
    length = request.headers.get("content-length", "0")
    body = bytearray()
    if length.isdigit() and int(length) > max_bytes:
        raise _too_long(max_bytes)
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_long(max_bytes)
    return bytes(body)


def _too_long(max_bytes: int) -> ApiError:
    message = f"the body is longer than {max_bytes} bytes"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_long", message, None)


def choose(name: str | None, known: Iterable[str]) -> str:
    """The model that is asked: `name`, or the first.

    Raises:
        ApiError: there is no such model.
    """
    models = list(known)
    if name is None:
        return models[0]
    if name not in models:
        message = f"this server has no model {name!r}, only {', '.join(map(repr, models))}"
        raise ApiError(HTTPStatus.NOT_FOUND, "unknown_model", message, "model")
    return name


async def unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the caller goes away. To be awaited when the
    body has been read.

    Raises:
        ClientDisconnect: it did.
    """
    return await beside(work, _until_gone(request))


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


# -------------------------------------------------------------------------------- errors


def shape_errors(app: FastAPI) -> None:
    """Makes every error of `app` an `ErrorBody`."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(Refused, _on_refusal)
    app.add_exception_handler(ScoringError, _on_scoring_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)


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
