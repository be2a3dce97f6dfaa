"""Asking a teacher over REST, and believing nothing that it says until it is checked.

Every failure is typed by whose fault it is, because that decides what becomes of the item:

* `Unavailable`: the teacher is down, busy, slow, or refuses our key. The item waits.
* `BadAnswer`: it answered, with something that cannot be log-probs of what was asked, or as
  another model. The item is tried again and then given up.
* `BadItem`: the teacher can never score this item: too long, or with unknown tokens.

No value is ever made up: a call returns checked log-probs for every sequence, or raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from services.stage import BadItem, Unavailable
from services.trajectory import LogProbs, TokenIds
from teacher.api import (
    ErrorBody,
    InvalidLogProbs,
    ModelCard,
    ModelList,
    ScoreResponse,
    valid_logprobs,
)

_ITEM_FAULTS = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
_QUOTED = 300  # characters of an unexpected answer that an error message shows

AnswerT = TypeVar("AnswerT", bound=BaseModel)


class BadAnswer(RuntimeError):
    """The teacher answered with something that is not a score of what was asked."""


class TeacherClient:
    """One teacher's REST API, over kept-alive connections.

    Args:
        url: where the teacher is, with its route prefix and no trailing path.
        key: API key, or None where the teacher asks for none.
        timeout_s: for one request as a whole, answer included.
        fingerprint: the model that must answer; None pins the first that does.
    """

    def __init__(
        self, url: str, key: str | None, *, timeout_s: float, fingerprint: str | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._fingerprint = fingerprint
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # httpx times each read; `_ask` bounds the whole request
            limits=httpx.Limits(max_connections=None),
        )

    @property
    def fingerprint(self) -> str:
        """The pinned model; empty while none has answered."""
        return self._fingerprint or ""

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def info(self) -> ModelCard:
        """The model that is served.

        Raises:
            Unavailable, BadAnswer: see the module.
        """
        models = await self._ask(ModelList, "GET", "/v1/models")
        if len(models.data) != 1:
            raise BadAnswer(f"the teacher at {self._url} serves {len(models.data)} models, not one")
        self._pin(models.data[0].fingerprint)
        return models.data[0]

    async def score(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[LogProbs]:
        """Log-probs (nats, temperature 1) of every completion token.

        Args:
            sequences: pairs of prompt and completion token ids.

        Returns:
            One `[T]` array a sequence, in order, finite and not above 0.

        Raises:
            Unavailable, BadAnswer, BadItem: see the module.
        """
        body = {
            "sequences": [
                {"prompt": prompt.tolist(), "completion": completion.tolist()}
                for prompt, completion in sequences
            ]
        }
        answer = await self._ask(ScoreResponse, "POST", "/v1/score", body)
        if len(answer.scores) != len(sequences):
            raise BadAnswer(
                f"the teacher at {self._url} gave {len(answer.scores)} scores for "
                f"{len(sequences)} sequences"
            )
        checked = []
        for index, (score, (_, completion)) in enumerate(
            zip(answer.scores, sequences, strict=True)
        ):
            try:
                checked.append(valid_logprobs(score.logprobs, len(completion)))
            except InvalidLogProbs as error:
                raise BadAnswer(
                    f"the teacher at {self._url} scored sequence {index} wrongly: {error}"
                ) from error
        self._pin(answer.fingerprint)
        return checked

    def _pin(self, fingerprint: str) -> None:
        """Holds the teacher to one model: scores of two are not comparable."""
        if not fingerprint:
            raise BadAnswer(f"the teacher at {self._url} does not say which model it is")
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise BadAnswer(
                f"the teacher at {self._url} is another model: its fingerprint is "
                f"{fingerprint}, not {self._fingerprint}"
            )

    async def _ask(
        self, kind: type[AnswerT], method: str, path: str, body: object = None
    ) -> AnswerT:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, self._url + path, json=body)
        except TimeoutError as error:
            raise Unavailable(
                f"the teacher at {self._url} did not answer within {self._timeout_s:g} s"
            ) from error
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise Unavailable(f"the teacher at {self._url} cannot be reached: {said}") from error
        if response.status_code != HTTPStatus.OK:
            message = f"the teacher at {self._url} {_refusal(response)}"
            at_fault = BadItem if response.status_code in _ITEM_FAULTS else Unavailable
            raise at_fault(message)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise BadAnswer(
                f"the teacher at {self._url} answered {path} with something else: "
                f"{error.errors()[0]['msg']} in {_quote(response)}"
            ) from error


def _refusal(response: httpx.Response) -> str:
    """The status and what the server said about it, in one line."""
    try:
        detail = ErrorBody.model_validate_json(response.content).error
    except ValidationError:  # not our server: a proxy, or Ray Serve itself
        return f"answered {response.status_code}: {_quote(response)}"
    where = f" ({detail.param})" if detail.param else ""
    return f"answered {response.status_code}: {detail.message}{where}"


def _quote(response: httpx.Response) -> str:
    return repr(response.content[:_QUOTED].decode(errors="replace"))
