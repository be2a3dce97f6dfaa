"""The teacher's seams in memory: a scorer whose answers one can compute by hand, and a server
that misbehaves on demand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher.api import Limits, ModelCard

FAKE_CARD = ModelCard(
    id="fake-teacher",
    fingerprint="f00d",
    context_length=64,
    limits=Limits(max_sequence_tokens=16, vocab_size=100),
)


class FakeScorer:
    """Scores every token as minus a hundredth of its id; or raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    async def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[list[float]]:
        self.calls.append(([list(ids) for ids in sequences], list(starts)))
        if self.error is not None:
            raise self.error
        return [
            [-id_ / 100 for id_ in ids[start:]]
            for ids, start in zip(sequences, starts, strict=True)
        ]


class FaultyTeacher:
    """An ASGI teacher that answers honestly while `fault` is None, and otherwise:

    an `int`: with that status; `bytes`: with that body; a `dict`: with those fields of the
    honest answer replaced; `"silence"`: never; `"half body"`: and breaks off in the middle.
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
        self.requests.append(json.loads(body or b"{}"))
        if self.fault == "silence":
            while message["type"] != "http.disconnect":
                message = await receive()
            return
        status = self.fault if isinstance(self.fault, int) else 200
        answer = self._answer()
        length = len(answer) + (100 if self.fault == "half body" else 0)
        length_header = (b"content-length", str(length).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length_header]})
        await send({"type": "http.response.body", "body": answer})

    def _answer(self) -> bytes:
        if isinstance(self.fault, bytes):
            return self.fault
        if isinstance(self.fault, int):
            message = {"type": "fault", "message": f"this is fault {self.fault}", "param": "x.0"}
            return json.dumps({"error": message}).encode()
        honest = {
            "model": "fake",
            "fingerprint": "f00d",
            "scores": [
                {"logprobs": [-id_ / 100 for id_ in sequence["completion"]], "perplexity": 1.0}
                for sequence in self.requests[-1].get("sequences", [])
            ],
        }
        changed = self.fault if isinstance(self.fault, dict) else {}
        return json.dumps({**honest, **changed}).encode()


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """Serves `app` over real HTTP on a free port of this machine; yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"  # the kernel queues early callers
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()
