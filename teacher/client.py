"""Asking a teacher over REST, and believing nothing that it says until it is checked.

Every failure is typed by whose fault it is, because that decides what becomes of the item:

* `Unavailable`: the teacher is down (`Unreachable`), busy (`TeacherBusy`), slow, or refuses our
  key. The item waits.
* `BadAnswer`: it answered, with something that cannot be log-probs of what was asked. The item is
  tried again and then given up. As another model (`OtherModel`): the run ends.
* `BadItem`: the teacher can never score this item: too long, with unknown tokens, or (`NoLogProbs`)
  its model computes no numbers for it.

No value is ever made up: a call returns checked log-probs for every sequence, or raises.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from services.errors import BadItem, Unavailable, WireError
from services.trajectory import TokenIds
from teacher import wire
from teacher.api import ErrorBody, ErrorDetail, ErrorType, ModelCard, ModelList, ScoreResponse
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores, valid_scores, with_more

Pair: TypeAlias = tuple[TokenIds, TokenIds]  # prompt [P], completion [T]

_QUOTED = 300  # characters of an unexpected answer that an error message shows

AnswerT = TypeVar("AnswerT", bound=BaseModel)


class TeacherBusy(Unavailable):
    """The teacher has enough to do, and says when to come again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unreachable(Unavailable):
    """Nobody answers there, or the connection broke."""


class BadAnswer(RuntimeError):
    """The teacher answered with something that is not a score of what was asked."""


class OtherModel(BadAnswer):
    """It serves another model than the run's teacher."""


class NoLogProbs(BadItem):
    """The teacher's model computes no numbers for this item, and would not another time."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a teacher is, and how to ask it.

    Args:
        url: with its route prefix and no trailing path.
        key: API key, or None where the teacher asks for none.
        model: the name that it serves the teacher under; None is its first (or only) model.
        ca_file: certificates of a private authority, as PEM.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    ca_file: Path | None = None


class Client(AbstractAsyncContextManager["Client", None], Protocol):
    """One server that scores, in whatever dialect. Its connections are closed with its context."""

    @property
    def fingerprint(self) -> str:
        """What identifies the model that answers; empty while none has."""
        ...

    async def score(
        self, sequences: Sequence[Pair], top: int = 0, more: More = NO_MORE
    ) -> list[TokenScores]:
        """Scores of every completion token, with the `top` most likely tokens in its place.

        Args:
            sequences: pairs of prompt and completion token ids.
            more: what else is asked of each place.

        Returns:
            One a sequence, in order; log-probs are finite and not above 0.

        Raises:
            Unavailable, BadAnswer, BadItem: see the module.
        """
        ...

    async def check(self) -> None:
        """Returns if the server answers, and as the right model.

        Raises:
            Unavailable, BadAnswer: see the module.
        """
        ...


class Http(AbstractAsyncContextManager["Http", None]):
    """One server over kept-alive connections, which are closed with its context: what went wrong
    is typed, nothing else is done."""

    def __init__(
        self, target: Target, *, timeout_s: float, item_faults: Collection[int] = (413, 422)
    ) -> None:
        """
        Args:
            timeout_s: for one request as a whole, answer included.
            item_faults: statuses by which this server says that an item cannot be scored.
        """
        self.url = target.url.rstrip("/")
        self._timeout_s = timeout_s
        self._item_faults = item_faults
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {target.key}"} if target.key else {},
            timeout=None,  # httpx times each read; `ask` bounds the whole request
            limits=httpx.Limits(max_connections=None),
            verify=_trust(target.ca_file),
        )

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """A successful answer.

        Raises:
            Unavailable, BadItem: see the module.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(
                    method, self.url + path, content=content, headers=headers
                )
        except TimeoutError as error:
            raise Unavailable(
                f"the teacher at {self.url} did not answer within {self._timeout_s:g} s"
            ) from error
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise Unreachable(f"the teacher at {self.url} cannot be reached: {said}") from error
        if response.status_code != HTTPStatus.OK:
            raise self._refusal(response, asked=content is not None)
        return response

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def bad_answer(self, path: str, why: object, response: httpx.Response) -> BadAnswer:
        """The error for an answer that is no answer."""
        return BadAnswer(
            f"the teacher at {self.url} answered {path} with something else: {why} in "
            f"{_quote(response)}"
        )

    def read(self, kind: type[AnswerT], path: str, response: httpx.Response) -> AnswerT:
        """The JSON answer as a `kind`.

        Raises:
            BadAnswer: it is not one.
        """
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise self.bad_answer(path, error.errors()[0]["msg"], response) from error

    def _refusal(self, response: httpx.Response, *, asked: bool) -> Exception:
        status, detail = response.status_code, _detail(response)
        message = f"the teacher at {self.url} answered {status}: " + (
            detail.message + (f" ({detail.param})" if detail.param else "")
            if detail
            else _quote(response)  # not our server: a proxy, or Ray Serve itself
        )
        if detail and detail.type == ErrorType.NO_LOGPROBS:
            return NoLogProbs(message)
        if asked and status in self._item_faults:
            return BadItem(message)
        retry_after = response.headers.get("retry-after", "")
        if status in (429, 503) and retry_after.isdigit():
            return TeacherBusy(message, float(retry_after))
        return Unavailable(message)


class TeacherClient(AbstractAsyncContextManager["TeacherClient", None]):
    """A server of this project: `/v1/score`.

    Args:
        target: where it is.
        timeout_s: for one request as a whole, answer included.
        fingerprint: the model that must answer; None pins the first that does.
        binary: whether to ask in safetensors or in JSON.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout_s: float,
        fingerprint: str | None = None,
        binary: bool = True,
    ) -> None:
        self._http = Http(target, timeout_s=timeout_s)
        self._model = target.model
        self._fingerprint = fingerprint
        self._binary = binary

    @property
    def fingerprint(self) -> str:
        """The pinned model; empty while none has answered."""
        return self._fingerprint or ""

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def check(self) -> None:
        """See `Client`."""
        await self.info()

    async def info(self) -> ModelCard:
        """The model that is asked.

        Raises:
            Unavailable, BadAnswer: see the module.
        """
        response = await self._http.ask("GET", "/v1/models")
        cards = self._http.read(ModelList, "/v1/models", response).data
        matching = [card for card in cards if self._model in (None, card.id)]
        if not matching:
            raise BadAnswer(f"the teacher at {self._http.url} does not serve {self._model!r}")
        self._pin(matching[0].fingerprint)
        return matching[0]

    async def score(
        self, sequences: Sequence[Pair], top: int = 0, more: More = NO_MORE
    ) -> list[TokenScores]:
        """See `Client`."""
        path = "/v1/score"
        response = await self._http.ask("POST", path, *self._request(sequences, top, more))
        answer = self._answer(path, response)
        if len(answer.logprobs) != len(sequences):
            raise BadAnswer(
                f"the teacher at {self._http.url} gave {len(answer.logprobs)} scores for "
                f"{len(sequences)} sequences"
            )
        checked = []
        for index, (_, completion) in enumerate(sequences):
            try:
                score = valid_scores(
                    answer.logprobs[index],
                    len(completion),
                    answer.top_ids[index],
                    answer.top_logprobs[index],
                    top,
                )
                candidates = answer.candidates[index] if answer.candidates else ()
                entropy = answer.entropy[index] if answer.entropy else ()
                checked.append(with_more(score, candidates, entropy, more))
            except InvalidLogProbs as error:
                raise BadAnswer(
                    f"the teacher at {self._http.url} scored sequence {index} wrongly: {error}"
                ) from error
        self._pin(answer.fingerprint)
        return [replace(score, version=answer.version) for score in checked]

    def _request(
        self, sequences: Sequence[Pair], top: int, more: More
    ) -> tuple[bytes, dict[str, str]]:
        if self._binary:
            body = wire.encode_request(sequences, top=top, model=self._model, more=more)
            return body, {"Content-Type": wire.MEDIA_TYPE, "Accept": wire.MEDIA_TYPE}
        return wire.json_request(sequences, top=top, model=self._model, more=more), {
            "Content-Type": "application/json"
        }

    def _answer(self, path: str, response: httpx.Response) -> wire.Answer:
        """In the form that the server chose."""
        if response.headers.get("content-type") == wire.MEDIA_TYPE:
            try:
                return wire.decode_answer(response.content)
            except WireError as error:
                raise self._http.bad_answer(path, error, response) from error
        read = self._http.read(ScoreResponse, path, response)
        return wire.Answer(
            model=read.model,
            fingerprint=read.fingerprint,
            logprobs=[score.logprobs for score in read.scores],
            top_ids=[score.top_ids or () for score in read.scores],
            top_logprobs=[score.top_logprobs or () for score in read.scores],
            version=read.version,
            candidates=[score.candidate_logprobs or () for score in read.scores],
            entropy=[score.entropy or () for score in read.scores],
        )

    def _pin(self, fingerprint: str) -> None:
        """Holds the teacher to one model: scores of two are not comparable."""
        if not fingerprint:
            raise BadAnswer(f"the teacher at {self._http.url} does not say which model it is")
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise OtherModel(
                f"the teacher at {self._http.url} is another model: its fingerprint is "
                f"{fingerprint}, not {self._fingerprint}"
            )


@functools.cache  # reading all authorities takes longer than a request
def _trust(ca_file: Path | None) -> ssl.SSLContext:
    """The authorities that may vouch for a server."""
    return ssl.create_default_context(cafile=ca_file)


def _detail(response: httpx.Response) -> ErrorDetail | None:
    """What the server said about a refusal, if it says it as ours and OpenAI's do."""
    try:
        return ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        return None


def _quote(response: httpx.Response) -> str:
    return repr(response.content[:_QUOTED].decode(errors="replace"))
