"""The teacher's seams in memory: a scorer whose answers one can compute by hand, and a server
that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher import wire
from teacher.admission import Admission, RateLimit
from teacher.api import Limits, ModelCard, SequenceScore, Tokens
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.scorer import ScorerDied
from teacher.scores import NO_MORE, More, TokenScores, valid_scores, with_more
from tests.waiting import DEADLINE_S

_DELAY_S = 0.05
FAKE_CARD = ModelCard(
    id="fake-teacher",
    fingerprint="f00d",
    context_length=64,
    tokens=Tokens(tokenizer="7e57", tokenizer_size=100, end_tokens=[1], chat_template="c4a7"),
    limits=Limits(
        max_sequence_tokens=16,
        max_request_tokens=48,
        max_top_logprobs=5,
        vocab_size=100,
        gives=["candidates", "entropy"],
    ),
)


class FakeScorer:
    """Scores every token as minus a hundredth of its id (`scale` times), so that ids from 0 on are
    the most likely ones everywhere; or raises what it is told to. While `held` is set it does not
    answer."""

    def __init__(self, scale: float = 1.0) -> None:
        self._scale = scale
        self.error: Exception | None = None
        self.calls: list[tuple[list[list[int]], list[int]]] = []
        self.held: asyncio.Event | None = None
        self.cancelled = 0

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        self.calls.append(([list(ids) for ids in sequences], list(starts)))
        if self.error is not None:
            raise self.error
        if self.held is not None:
            try:
                await self.held.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        pairs = enumerate(zip(sequences, starts, strict=True))
        return [
            fake_scores(ids[start:], top, self._scale, more.of([index]))
            for index, (ids, start) in pairs
        ]

    async def check(self) -> None:
        if self.error is not None:
            raise ScorerDied("told to")

    async def close(self) -> None: ...


def fake_scores(
    ids: Sequence[int], top: int = 0, scale: float = 1.0, more: More = NO_MORE
) -> TokenScores:
    """What `FakeScorer` says of `ids`: an entropy of half their negated log-prob, too."""
    best = np.tile(np.arange(top), (len(ids), 1))
    own, others = -np.array(ids) / 100 * scale, -best / 100 * scale
    named = -np.array(more.candidates[0]) / 100 * scale if more.candidates else ()
    return with_more(valid_scores(own, len(ids), best, others, top), named, -own / 2, more)


def fake_app(
    scorer: FakeScorer,
    keys: Sequence[str] = (),
    *,
    max_requests: int = 100,
    max_tokens: int = 1000,
    max_body_bytes: int = 10_000,
    rate_limit: RateLimit | None = None,
    card: ModelCard = FAKE_CARD,
) -> FastAPI:
    """The real application around a fake model."""
    return build_app(
        [Teacher(card, scorer)],
        KeyRing(keys),
        max_body_bytes=max_body_bytes,
        admission=Admission(max_requests=max_requests, max_tokens=max_tokens),
        rate_limit=rate_limit,
    )


class FaultyTeacher:
    """An ASGI teacher that answers honestly while `fault` is None, and otherwise:

    an `int`: with that status; `bytes`: with that body; a `dict`: with those fields of the
    honest answer replaced; `"silence"`: never; `"half body"`: and breaks off in the middle;
    `"delay"`: honestly, but late.
    Asked about its models it does not lie, and finds no fault with an item.
    """

    def __init__(self) -> None:
        self.heal()

    def heal(self) -> None:
        """Honest again, as if nobody had asked yet."""
        self.fault: int | bytes | dict[str, Any] | str | None = None
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = dict(scope["headers"])
        self.authorizations.append(headers.get(b"authorization", b"").decode())
        asked = scope["method"] == "POST"
        if asked:
            self.requests.append(_request(body, headers))
        told = self.fault if asked or self.fault not in (413, 422) else None
        if not asked and isinstance(told, bytes | dict):
            told = None
        if told == "silence":
            while message["type"] != "http.disconnect":
                message = await receive()
            return
        if told == "delay":
            await asyncio.sleep(_DELAY_S)
        status = told if isinstance(told, int) else 200
        answer = self._answer(asked, told)
        length = len(answer) + (100 if told == "half body" else 0)
        length_header = (b"content-length", str(length).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length_header]})
        await send({"type": "http.response.body", "body": answer})

    def _answer(self, asked: bool, told: int | bytes | dict[str, Any] | str | None) -> bytes:
        if isinstance(told, bytes):
            return told
        if isinstance(told, int):
            message = {"type": "fault", "message": f"this is fault {told}", "param": "x.0"}
            return json.dumps({"error": message}).encode()
        honest: dict[str, Any] = {"object": "list", "data": [FAKE_CARD.model_dump()]}
        if asked:
            asked = self.requests[-1]
            top, spread = asked.get("top_logprobs", 0), asked.get("entropy", False)
            scores = []
            for one in asked["sequences"]:
                named = [np.array(one["candidates"])] if one.get("candidates") else []
                said = fake_scores(one["completion"], top, 1.0, More(spread, named))
                scores.append(SequenceScore.of(said, top).model_dump())
            honest = {"model": FAKE_CARD.id, "fingerprint": "f00d", "scores": scores}
        changed = told if isinstance(told, dict) else {}
        return json.dumps({**honest, **changed}).encode()


def _request(body: bytes, headers: dict[bytes, bytes]) -> dict[str, Any]:
    """A score request in whatever form, as JSON."""
    if headers.get(b"content-type", b"").decode() != wire.MEDIA_TYPE:
        asked: dict[str, Any] = json.loads(body)
        return asked
    query = wire.decode_request(body)
    pairs = zip(query.sequences, query.starts, strict=True)
    sequences: list[dict[str, Any]] = [
        {"prompt": ids[:i], "completion": ids[i:]} for ids, i in pairs
    ]
    for sequence, ids in zip(sequences, query.more.candidates, strict=False):
        sequence["candidates"] = ids.tolist()
    entropy = {"entropy": True} if query.more.entropy else {}
    return {"sequences": sequences, "top_logprobs": query.top, **entropy}


@contextmanager
def listening(app: ASGIApp, port: int = 0, **settings: Any) -> Iterator[str]:
    """Serves `app` over real HTTP on a free port of this machine; yields its URL. Ends at once,
    whatever it holds."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_level="critical", **settings)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        scheme = "https" if "ssl_certfile" in settings else "http"
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"  # the kernel queues early callers
        server.should_exit = server.force_exit = True
        thread.join(timeout=DEADLINE_S)
        assert not thread.is_alive()
