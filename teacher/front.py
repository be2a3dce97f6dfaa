"""Several teachers behind one address: `model` chooses which one's own application answers.

    key ─▶ place ─▶ body ─▶ model ─▶ that application: request and answer pass as they are
    401    503      413     404

`GET /v1/models` lists all that answer, `/ready` is true when all are; of other routes `?model=` has
that model's. Knows nothing of Ray: `teacher.serve` brings the way to each application.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

import pydantic_core
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from teacher import wire
from teacher.admission import Admission
from teacher.api import Health
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

_LOOK_S = 30.0  # how long a model may take to say what it is
_OWN_HOP = frozenset({b"content-length", b"transfer-encoding", b"connection", b"host"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, whole."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, whole."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Away(Exception):
    """The model's application cannot be asked now; the message says why."""


Ask: TypeAlias = Callable[[Asked], Awaitable[Answered]]


def build_front(
    teachers: Mapping[str, Ask], keys: KeyRing, *, max_body_bytes: int, admission: Admission
) -> FastAPI:
    """The application in front of those of `teachers`.

    Args:
        teachers: by the names that requests call their models by; the first answers requests
            that name none. Each raises `Away` when it cannot be asked.
        keys: who may ask; each application asks for them again, to know its callers.
        max_body_bytes: longest body of a request to any of them.
        admission: what this process holds at once.
    """
    front = _Front(teachers, max_body_bytes, admission)
    app = FastAPI(title="SCOPE teachers", openapi_url=None)
    shape_errors(app)
    if keys:
        app.add_middleware(BearerAuth, keys=keys)
    app.add_api_route("/health", front.health, methods=["GET"])
    app.add_api_route("/ready", front.ready, methods=["GET"])
    app.add_api_route("/v1/models", front.models, methods=["GET"])
    app.add_api_route(
        "/{path:path}", front.forward, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]
    )
    return app


@dataclass(frozen=True, slots=True)
class _Front:
    teachers: Mapping[str, Ask]
    max_body_bytes: int
    admission: Admission

    async def health(self) -> Health:
        """This process is alive."""
        return Health()

    async def forward(self, request: Request) -> Response:
        """The answer of the model that is asked for."""
        try:
            with self.admission.request():
                body = await read_body(request, self.max_body_bytes)
                named = _model(request, body)
                answer = await unless_gone(
                    request, self._ask(choose(named, self.teachers), _asked(request, body))
                )
        except ClientDisconnect:
            return Response(status_code=GONE)
        response = Response(answer.body, answer.status)
        kept = [header for header in answer.headers if header[0].lower() not in _OWN_HOP]
        response.raw_headers = [*response.raw_headers, *kept]
        return response

    async def ready(self, request: Request) -> Health:
        """Every model can score."""
        await asyncio.gather(*(self._look(name, request) for name in self.teachers))
        return Health()

    async def models(self, request: Request) -> Response:
        """The cards of all models that answer."""
        looks = (self._look(name, request) for name in self.teachers)
        answers = await asyncio.gather(*looks, return_exceptions=True)
        away = [answer for answer in answers if isinstance(answer, BaseException)]
        cards: list[Any] = []
        for answer in answers:
            if isinstance(answer, Answered):
                cards += json.loads(answer.body)["data"]
        if not cards:
            raise away[0]
        return Response(json.dumps({"object": "list", "data": cards}), media_type=JSON)

    async def _look(self, name: str, request: Request) -> Answered:
        """What `name` answers to `request`.

        Raises:
            ApiError: no success, or not soon.
        """
        try:
            async with asyncio.timeout(_LOOK_S):
                answer = await self._ask(name, _asked(request, b""))
        except TimeoutError:
            raise _not_ready(name, f"it did not answer within {_LOOK_S:g} s") from None
        if answer.status != HTTPStatus.OK:
            raise _not_ready(name, f"it answered {answer.status}")
        return answer

    async def _ask(self, name: str, asked: Asked) -> Answered:
        try:
            return await self.teachers[name](asked)
        except Away as error:
            raise _not_ready(name, str(error)) from error


def _not_ready(name: str, why: str) -> ApiError:
    message = f"the model {name!r} cannot be asked now: {why}"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", message, None)


def _model(request: Request, body: bytes) -> str | None:
    """The model that a request names. What cannot be read is left to an application to refuse."""
    if not body:
        return request.query_params.get("model")
    if media_type(request) == wire.MEDIA_TYPE:
        return wire.model_of(body)
    try:
        parsed = pydantic_core.from_json(body)
    except ValueError:
        return None
    named = parsed.get("model") if isinstance(parsed, dict) else None
    return named if isinstance(named, str) else None


def _asked(request: Request, body: bytes) -> Asked:
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    headers = [(name, value) for name, value in request.headers.raw if name not in _OWN_HOP]
    return Asked(request.method, path, tuple(headers), body)


async def ask_app(app: ASGIApp, asked: Asked) -> Answered:
    """What `app` answers, in this process. When the caller is cancelled, `app` sees that whoever
    asked has gone away, and may end in its own way."""
    length = (b"content-length", str(len(asked.body)).encode())
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [*asked.headers, length],
        "client": None,
        "server": None,
    }
    gone = asyncio.Event()
    unread = [asked.body]
    sent: list[Message] = []

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    task = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait({task})
        raise
    start, *parts = sent
    body = b"".join(part.get("body", b"") for part in parts)
    return Answered(start["status"], tuple(map(tuple, start["headers"])), body)
