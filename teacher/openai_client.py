"""Asking a server that speaks OpenAI's completions and vLLM's `prompt_logprobs`: any `vllm serve`.

Such a server does not tell which weights it holds. It is held to the name that it serves, and to
what the right model says of a fixed sequence of tokens (`Probe`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from services.errors import BadItem
from services.trajectory import LogProbs
from teacher.client import BadAnswer, Http, OtherModel, Pair, Target
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores, valid_scores

_PATH = "/v1/completions"
PROBE = [3 + 7 * i % 250 for i in range(32)]  # ids that every vocabulary has
SAME = 0.1  # nats that two servers of one model may differ on average: bfloat16, other kernels
_NO_NUMBER = -9999.0  # what vLLM writes for minus infinity


class Probe:
    """What every server must say of the fixed sequence: `right`, or where nobody could tell
    before, what the first one says. Answers may be `tolerance` nats off on average."""

    def __init__(self, right: LogProbs | None = None, tolerance: float = SAME) -> None:
        self._right = right
        self._tolerance = tolerance

    def compare(self, url: str, logprobs: LogProbs) -> None:
        """
        Raises:
            OtherModel: another model answers there.
        """
        if self._right is None:
            self._right = logprobs
        difference = apart(logprobs, self._right)
        if difference > self._tolerance:
            raise OtherModel(
                f"the teacher at {url} is another model: its log-probs of a fixed sequence are "
                f"{difference:.2f} nats off"
            )


def apart(ours: LogProbs, theirs: LogProbs) -> float:
    """How many nats two answers to the probe differ on average."""
    return float(np.abs(ours - theirs).mean())


class _Entry(BaseModel):
    logprob: float


class _Choice(BaseModel):
    index: int
    prompt_logprobs: list[dict[int, _Entry] | None]


class _Completion(BaseModel):
    model: str
    choices: list[_Choice]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class CompletionsClient(AbstractAsyncContextManager["CompletionsClient", None]):
    """See `teacher.client.Client`.

    Args:
        target: where it is.
        timeout_s: for one request as a whole, answer included.
        probe: shared by all servers of one teacher.
    """

    def __init__(self, target: Target, *, timeout_s: float, probe: Probe) -> None:
        # vLLM answers 400 for a sequence that is too long or holds unknown tokens.
        self._http = Http(target, timeout_s=timeout_s, item_faults=(400, 413, 422))
        self._model = target.model
        self._probe = probe

    @property
    def fingerprint(self) -> str:
        """The name of the model: its weights are not told."""
        return f"name:{self._model}" if self._model else ""

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def check(self) -> None:
        """See `Client`."""
        self._probe.compare(self._http.url, await self.probe())

    async def probe(self) -> LogProbs:
        """What it says of the fixed sequence.

        Raises:
            Unavailable, BadAnswer: it does not answer, or not as it should.
        """
        response = await self._http.ask("GET", "/v1/models")
        names = [model.id for model in self._http.read(_Models, "/v1/models", response).data]
        if self._model is None:
            self._model = names[0]
        elif self._model not in names:
            raise BadAnswer(f"the teacher at {self._http.url} does not serve {self._model!r}")
        ids = np.array(PROBE, np.int32)
        (scores,) = await self.score([(ids[:1], ids[1:])])
        return scores.logprobs

    async def refusal(self, top: int) -> str:
        """Why it does not give so many of the most likely tokens; empty where it does.

        Raises:
            Unavailable: it does not answer.
        """
        ids = np.array(PROBE, np.int32)
        try:
            await self.score([(ids[:1], ids[1:])], top)
        except (BadItem, BadAnswer) as error:  # refused, or fewer than were asked for
            return str(error)
        return ""

    async def score(
        self, sequences: Sequence[Pair], top: int = 0, more: More = NO_MORE
    ) -> list[TokenScores]:
        """See `Client`."""
        if more:
            raise BadItem(f"the teacher at {self._http.url} gives no candidates and no entropy")
        body = {
            "model": self._model,
            "prompt": [
                [*prompt.tolist(), *completion.tolist()] for prompt, completion in sequences
            ],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top,
        }
        headers = {"Content-Type": "application/json"}
        response = await self._http.ask("POST", _PATH, json.dumps(body).encode(), headers)
        answer = self._http.read(_Completion, _PATH, response)
        if answer.model != self._model:
            raise BadAnswer(f"the teacher at {self._http.url} answered as {answer.model!r}")
        by_index = {choice.index: choice.prompt_logprobs for choice in answer.choices}
        if by_index.keys() != set(range(len(sequences))):
            raise BadAnswer(
                f"the teacher at {self._http.url} gave {len(answer.choices)} choices for "
                f"{len(sequences)} sequences"
            )
        return [self._scores(by_index[i], pair, i, top) for i, pair in enumerate(sequences)]

    def _scores(
        self, entries: Sequence[Mapping[int, _Entry] | None], pair: Pair, index: int, top: int
    ) -> TokenScores:
        prompt, completion = pair
        try:
            if len(entries) != len(prompt) + len(completion):
                raise InvalidLogProbs(
                    f"{len(entries)} tokens instead of {len(prompt) + len(completion)}"
                )
            return _valid(entries[len(prompt) :], completion.tolist(), top)
        except InvalidLogProbs as error:
            raise BadAnswer(
                f"the teacher at {self._http.url} scored sequence {index} wrongly: {error}"
            ) from error


def _valid(
    entries: Sequence[Mapping[int, _Entry] | None], ids: Sequence[int], top: int
) -> TokenScores:
    """
    Raises:
        InvalidLogProbs: these are not the scores of `ids`.
    """
    own, top_ids, top_logprobs = [], [], []
    for position, (entry, id_) in enumerate(zip(entries, ids, strict=True)):
        if entry is None or id_ not in entry or len(entry) < top:
            raise InvalidLogProbs(f"no log-prob of token {position}")
        best = sorted(entry.items(), key=lambda item: -item[1].logprob)[:top]
        own.append(entry[id_].logprob)
        top_ids.append([other for other, _ in best])
        top_logprobs.append([value.logprob for _, value in best])
    if min([*own, *(row[-1] for row in top_logprobs if row)], default=0.0) <= _NO_NUMBER:
        raise InvalidLogProbs("a log-prob is minus infinity")
    return valid_scores(own, len(ids), top_ids, top_logprobs, top)
