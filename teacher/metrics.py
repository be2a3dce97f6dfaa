"""What one server process counts, in Prometheus' text form. Nothing in it names a key or a text."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_PREFIX = "scope_teacher_"
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one process; several replicas are told apart by whoever scrapes them."""

    def __init__(self) -> None:
        self._registry = made = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}requests",
            "Answers, by route and status.",
            ["route", "status"],
            registry=made,
        )
        self.seconds = Histogram(
            f"{_PREFIX}request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"], buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.read = Counter(
            f"{_PREFIX}read_tokens", "Tokens of scored sequences.", ["model"], registry=made
        )
        self.scored = Counter(
            f"{_PREFIX}scored_tokens", "Tokens that got a log-prob.", ["model"], registry=made
        )
        self.cached = Counter(
            f"{_PREFIX}cache_sequences",
            "Sequences looked for in the score cache.",
            ["model", "outcome"], registry=made,
        )  # fmt: skip
        self.cancelled = Counter(
            f"{_PREFIX}cancelled_requests", "Requests whose caller went away.", registry=made
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Shows `value` as it is whenever somebody looks."""
        Gauge(_PREFIX + name, text, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """Everything, as it is now."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware: counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, and counts what comes back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # The pattern that matched and not the path: anybody can invent paths.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status or "none").inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started)
