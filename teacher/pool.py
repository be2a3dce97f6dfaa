"""Several servers of one teacher as one: whichever can answer does.

                     ┌─ least outstanding tokens ─▶ server A   up
    score ─▶ choose ─┤  slow? ask a second one  ─▶ server B   up
                     └─ failed? the next one        server C   down ◀── looked after

A server is used once it has been recognised (its dialect, and that it serves the right model).
Failures in a row, or no connection at all, take it out; it is asked for its models from then on,
ever less often, and comes back when it answers. So requests never wait for a server that is known
to be down, and a call fails only when every server has. A server that turns out to hold another
model ends the run, whatever the others say: somebody must decide which one is meant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from services.errors import BadItem, Unavailable, WorkerFailed
from services.tasks import end
from services.trajectory import LogProbs
from teacher.api import ModelCard
from teacher.client import (
    BadAnswer,
    Client,
    Http,
    NoLogProbs,
    OtherModel,
    Pair,
    Target,
    TeacherBusy,
    TeacherClient,
    Unreachable,
)
from teacher.config import TeacherConfig
from teacher.openai_client import SAME, CompletionsClient, Probe
from teacher.scores import NO_MORE, More, TokenScores

log = logging.getLogger(__name__)

_Question: TypeAlias = tuple[Sequence[Pair], int, More]  # what `Client.score` takes

_FAILURES = 3  # in a row take a server out
_FIRST_CHECK_S, _LAST_CHECK_S = 0.2, 10.0
_CHECK_TIMEOUT_S = 30.0
_SLOW = 0.95  # quantile of a server's speeds that counts as slow
_KNOWN = 20  # answers before a quantile means anything
_REMEMBERED = 200
_SHORTEST_HEDGE_S = 0.5
_HEDGED = 0.1  # of all requests at most: hedging must not become the load it is to mend


class MissingKey(WorkerFailed):
    """An API key is not where the config says."""


def targets(config: TeacherConfig, environment: Mapping[str, str]) -> list[Target]:
    """The configured servers with their keys.

    Raises:
        MissingKey: an environment variable is not set.
    """
    made = []
    for endpoint in config.endpoints:
        key = environment.get(endpoint.key_env) if endpoint.key_env else None
        if endpoint.key_env and not key:
            raise MissingKey(
                f"the key of {endpoint.url} must be in the environment variable "
                f"{endpoint.key_env}, which is not set"
            )
        made.append(Target(endpoint.url, key, endpoint.model, config.ca_file))
    return made


@dataclass(frozen=True, slots=True)
class Servers:
    """Where one teacher is, and how it is asked.

    Args:
        targets: its servers; at least one.
        timeout_s: for one request to one server, answer included.
        fingerprint: the model that must answer; None pins the first that does.
        hedge_factor: a request that takes so many times as long as a slow one is sent to a
            second server too; None never does.
        probe: what the right model says of the fixed sequence; None pins what the first server
            says that tells no fingerprint.
        tolerance: nats that another may be off that on average.
    """

    targets: Sequence[Target]
    timeout_s: float
    fingerprint: str | None = None
    hedge_factor: float | None = None
    probe: LogProbs | None = None
    tolerance: float = SAME


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What a server tells of its model: of this project a card, others what they say of the fixed
    sequence (`teacher.openai_client.PROBE`), if they score it."""

    url: str
    card: ModelCard | None = None
    probe: LogProbs | None = None
    failed: Exception | None = None  # Unavailable or BadAnswer: nobody knows what it is
    refusal: str = ""
    """What the others say to those that ask for the most likely tokens, if they give none."""


async def ask(servers: Servers, top: int = 0) -> list[ServerAnswer]:
    """Asks each server what it is, and whether it gives the `top` most likely tokens."""
    asked = (_ask_one(target, servers.timeout_s, top) for target in servers.targets)
    return await asyncio.gather(*asked)


async def _ask_one(target: Target, timeout_s: float, top: int) -> ServerAnswer:
    try:
        async with await _dialect(target, timeout_s, None, Probe()) as client:
            if isinstance(client, TeacherClient):
                return ServerAnswer(target.url, card=await client.info())
            assert isinstance(client, CompletionsClient)
            with suppress(Unavailable, BadAnswer, BadItem):
                probe = await client.probe()
                refusal = await client.refusal(top) if top else ""
                return ServerAnswer(target.url, probe=probe, refusal=refusal)
            return ServerAnswer(target.url)
    except (Unavailable, BadAnswer) as error:
        return ServerAnswer(target.url, failed=error)


async def _dialect(
    target: Target, timeout_s: float, fingerprint: str | None, probe: Probe
) -> Client:
    """A client that speaks as the server does: only ours tells fingerprints."""
    async with Http(target, timeout_s=timeout_s) as http:
        response = await http.ask("GET", "/v1/models")
    if b'"fingerprint"' in response.content:
        return TeacherClient(target, timeout_s=timeout_s, fingerprint=fingerprint)
    return CompletionsClient(target, timeout_s=timeout_s, probe=probe)


@dataclass(eq=False)
class _Server:
    target: Target
    client: Client | None = None  # None until it is recognised
    up: bool = False
    said: str = "was not asked yet"  # why it is not up
    outstanding: int = 0  # tokens
    failures: int = 0  # in a row
    checks: int = 0  # in vain
    busy_until: float = 0.0
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))  # s/token
    care: asyncio.Task[None] | None = None


class TeacherPool(AbstractAsyncContextManager["TeacherPool", None]):
    """See the module. All connections are closed with its context."""

    def __init__(self, servers: Servers) -> None:
        self._clients = AsyncExitStack()
        self._servers = [_Server(target) for target in servers.targets]
        self._timeout_s = servers.timeout_s
        self._fingerprint = servers.fingerprint
        self._hedge_factor = servers.hedge_factor
        self._probe = Probe(servers.probe, servers.tolerance)
        self._other: OtherModel | None = None
        self._changed = asyncio.Event()  # set and replaced whenever a server's state does
        self.requests = 0
        self.hedged = 0
        self.retried = 0

    @property
    def fingerprint(self) -> str:
        """The pinned model; empty while none has answered."""
        return self._fingerprint or ""

    @property
    def down(self) -> int:
        """Servers that are not used now."""
        return sum(not server.up for server in self._servers)

    async def __aexit__(self, *_: object) -> None:
        await end(server.care for server in self._servers if server.care is not None)
        await self._clients.aclose()

    async def score(
        self, sequences: Sequence[Pair], top: int = 0, more: More = NO_MORE
    ) -> list[TokenScores]:
        """See `teacher.client.Client.score`.

        Raises:
            Unavailable: no server can be used, or all that can have failed.
            WorkerFailed: one of them holds another model.
            BadAnswer, BadItem: see `teacher.client`; another server was asked before, if there
                is one, unless the item itself is at fault.
        """
        self.requests += 1
        failed: dict[_Server, Exception] = {}
        while self._other is None and (server := await self._choose(failed)) is not None:
            self.retried += bool(failed)
            try:
                return await self._ask(server, failed, (sequences, top, more))
            except (Unavailable, BadAnswer, NoLogProbs) as error:
                failed[server] = error
        if self._other is not None:
            raise WorkerFailed(str(self._other)) from self._other
        raise self._exhausted(failed)

    # ------------------------------------------------------------------------------ choosing

    async def _choose(self, failed: Collection[_Server]) -> _Server | None:
        """The best server that has not failed this call; waits while one may still come up."""
        for server in self._servers:
            if not server.up and server.care is None:
                self._look_after(server)
        while (best := self._best(failed)) is None and self._hopeful(failed):
            await self._changed.wait()
        return best

    def _best(self, excluded: Collection[_Server]) -> _Server | None:
        now = time.monotonic()
        free = [s for s in self._servers if s.up and s.busy_until <= now and s not in excluded]
        return min(free, key=lambda server: server.outstanding, default=None)

    def _hopeful(self, excluded: Collection[_Server]) -> bool:
        """Whether one of the others is being looked at for the first time since it worked."""
        others = (server for server in self._servers if server not in excluded)
        return any(not server.up and not server.checks for server in others)

    def _exhausted(self, failed: Mapping[_Server, Exception]) -> Exception:
        """What the call fails with. A server that had an answer says more about the item than
        those that had none."""
        for error in failed.values():
            if isinstance(error, BadAnswer | NoLogProbs):
                return error
        said = [str(error) for error in failed.values()]
        said += [server.said for server in self._servers if server not in failed]
        return Unavailable("; ".join(said))

    # -------------------------------------------------------------------------------- asking

    async def _ask(
        self,
        server: _Server,
        failed: dict[_Server, Exception],
        question: _Question,
    ) -> list[TokenScores]:
        """Asks `server`, and a second one when it is unusually slow; the first answer counts."""
        tokens = sum(len(prompt) + len(completion) for prompt, completion in question[0])
        asked = {self._request(server, tokens, question): server}
        try:
            await asyncio.wait(asked, timeout=self._slow_s(server, tokens))
            if not any(task.done() for task in asked) and self._may_hedge():
                other = self._best({server, *failed})
                if other is not None:
                    self.hedged += 1
                    asked[self._request(other, tokens, question)] = other
            return await _first_success(asked, failed)
        finally:
            for task in asked:
                task.cancel()

    def _request(
        self, server: _Server, tokens: int, question: _Question
    ) -> asyncio.Task[list[TokenScores]]:
        """One request to one server, counted from now on: others choose before it runs."""

        def done(_: object) -> None:
            server.outstanding -= tokens

        server.outstanding += tokens
        task = asyncio.create_task(self._timed(server, tokens, question))
        task.add_done_callback(done)
        return task

    async def _timed(self, server: _Server, tokens: int, question: _Question) -> list[TokenScores]:
        """One request; what becomes of it is remembered."""
        assert server.client is not None
        started = time.monotonic()
        try:
            scores = await server.client.score(*question)
        except TeacherBusy as error:
            server.busy_until = time.monotonic() + error.retry_after_s
            server.said = str(error)
            raise
        except (Unavailable, BadAnswer) as error:
            server.failures += 1
            self._other = error if isinstance(error, OtherModel) else self._other
            if server.up and (server.failures >= _FAILURES or isinstance(error, Unreachable)):
                self._take_out(server, error)
            raise
        server.failures = server.checks = 0
        server.speeds.append((time.monotonic() - started) / max(1, tokens))
        return scores

    def _slow_s(self, server: _Server, tokens: int) -> float | None:
        if self._hedge_factor is None or len(server.speeds) < _KNOWN or len(self._servers) == 1:
            return None
        slow = sorted(server.speeds)[int(_SLOW * len(server.speeds))]
        return max(_SHORTEST_HEDGE_S, self._hedge_factor * slow * tokens)

    def _may_hedge(self) -> bool:
        return self.hedged < _HEDGED * self.requests

    # ---------------------------------------------------------------------------- looking after

    def _take_out(self, server: _Server, error: Exception) -> None:
        log.warning("a teacher is not used for now: %s", error)
        server.up, server.said = False, str(error)
        self._look_after(server)

    def _look_after(self, server: _Server) -> None:
        server.care = asyncio.create_task(self._until_well(server))

    async def _until_well(self, server: _Server) -> None:
        """Asks a server that is down, ever less often, until it is well."""
        while not server.up:
            if server.checks:
                # By a count that outlives this task, as no retrying of tenacity's does: a server
                # that is well and fails the next request is asked later and later too.
                pause = min(_LAST_CHECK_S, _FIRST_CHECK_S * 2 ** (server.checks - 1))
                await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(_CHECK_TIMEOUT_S):
                    await self._recognise(server)
            except (Unavailable, BadAnswer) as error:
                server.said = str(error)
                self._other = error if isinstance(error, OtherModel) else self._other
            except TimeoutError:
                server.said = f"{server.target.url} did not say what it is"
            else:
                server.up, server.failures = True, 0
            server.checks += 1
            self._changed.set()
            self._changed = asyncio.Event()
        server.care = None

    async def _recognise(self, server: _Server) -> None:
        """Finds out how a server speaks, and that it serves the right model.

        Raises:
            Unavailable, BadAnswer: it does not answer, or not as it should.
        """
        if server.client is None:
            client = await _dialect(server.target, self._timeout_s, self._fingerprint, self._probe)
            server.client = await self._clients.enter_async_context(client)
        await server.client.check()
        if isinstance(server.client, TeacherClient):
            fingerprint = server.client.fingerprint
            if self._fingerprint is None:
                self._fingerprint = fingerprint
            elif fingerprint != self._fingerprint:
                raise OtherModel(f"{server.target.url} is another model: {fingerprint}")
        elif self._fingerprint is None:
            self._fingerprint = server.client.fingerprint


async def _first_success(
    asked: Mapping[asyncio.Task[list[TokenScores]], _Server], failed: dict[_Server, Exception]
) -> list[TokenScores]:
    """The first answer; or, when all have failed, the last error. Errors are put in `failed`."""
    pending = set(asked)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            try:
                return task.result()
            except (Unavailable, BadAnswer, BadItem) as error:
                failed[asked[task]] = last = error
    raise last
