"""OpenAI's completions as a way to score: given tokens come back with their log-probs.

What of that API scores is served: `prompt` as token ids with `echo` and `logprobs`, or vLLM's
`prompt_logprobs`; at most one token is generated, the most likely one, because OpenAI's clients
commonly ask for one and drop it. What would change the answer and is not served is refused;
whatever else a client sends is ignored, as vLLM does.

A token is written as vLLM writes it under `return_tokens_as_token_ids`: `token_id:17`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from teacher.api import MAX_SEQUENCES, MAX_TOP, TokenId
from teacher.scores import Query, TokenScores

_ANY_TOKEN = 0  # stands where a token is generated: what follows it is never looked at


def _several(prompt: object) -> object:
    """One prompt or several as several."""
    if isinstance(prompt, str):
        raise PydanticCustomError("text", "nothing is tokenised here: send token ids")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], list):
        return [prompt]
    return prompt


_ONE_OR_SEVERAL = {
    "anyOf": [
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}
Prompts = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_SEQUENCES),
    BeforeValidator(_several),
    WithJsonSchema(_ONE_OR_SEVERAL),
]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_TOP)]


class CompletionRequest(BaseModel):
    """What is to be scored. Sampling settings are accepted and do nothing: log-probs are at
    temperature 1, and the one token that may be generated is the most likely one."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [{"prompt": [5, 9, 12, 7, 1], "max_tokens": 0, "echo": True, "logprobs": 1}]
        },
    )

    model: str | None = None
    prompt: Prompts
    """One list of token ids, or several."""
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=1)]
    """Tokens to generate: none, or one."""
    echo: bool | None = False
    """Whether the prompt's tokens stand in `logprobs` too."""
    logprobs: Count | None = None
    """For each token its log-prob and so many of the most likely ones in its place."""
    prompt_logprobs: Count | None = None
    """vLLM's: the same for the prompt's tokens, in a field of their own."""
    n: Literal[1] | None = 1
    best_of: Literal[1] | None = None
    stream: Literal[False] | None = False
    suffix: Literal[""] | None = None

    @property
    def _prompt_wanted(self) -> bool:
        return self.prompt_logprobs is not None or bool(self.echo and self.logprobs is not None)

    def query(self) -> Query:
        """What has to be scored for it."""
        return Query(
            model=self.model,
            sequences=[prompt + [_ANY_TOKEN] * self.max_tokens for prompt in self.prompt],
            starts=[1 if self._prompt_wanted else len(prompt) for prompt in self.prompt],
            top=max(self.logprobs or 0, self.prompt_logprobs or 0, self.max_tokens),
            top_field="logprobs",
            path=lambda prompt, token: f"prompt.{prompt}" + ("" if token is None else f".{token}"),
        )

    def response(self, model: str, scores: Sequence[TokenScores]) -> CompletionResponse:
        """The answer, from the scores of `query`."""
        choices = [
            self._choice(index, prompt, score)
            for index, (prompt, score) in enumerate(zip(self.prompt, scores, strict=True))
        ]
        prompt_tokens = sum(map(len, self.prompt))
        generated = self.max_tokens * len(self.prompt)
        return CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model,
            choices=choices,
            usage=Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=generated,
                total_tokens=prompt_tokens + generated,
            ),
        )

    def _choice(self, index: int, prompt: list[int], scores: TokenScores) -> Choice:
        ids, own = prompt[1:] if self._prompt_wanted else [], scores.logprobs.tolist()
        if self.max_tokens:
            ids = [*ids, int(scores.top_ids[-1, 0])]
            own[-1] = float(scores.top_logprobs[-1, 0])
        tops = list(zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True))
        positions = [Position(*position) for position in zip(ids, own, tops, strict=True)]
        given = positions[: len(prompt) - 1] if self._prompt_wanted else []
        made = positions[len(given) :]
        logprobs = None
        if self.logprobs is not None:
            shown = [*given, *made] if self.echo else made
            logprobs = ChoiceLogprobs.of(prompt[0] if self.echo else None, shown, self.logprobs)
        of_prompt = None
        if (k := self.prompt_logprobs) is not None:
            of_prompt = [None, *(position.entries(k) for position in given)]
        return Choice(index=index, logprobs=logprobs, prompt_logprobs=of_prompt)


class Position:
    """One scored token and the alternatives in its place."""

    def __init__(self, id_: int, logprob: float, top: tuple[list[int], list[float]]) -> None:
        self.id, self.logprob, self._top = id_, logprob, top

    def ranked(self, k: int) -> list[tuple[int, float, int | None]]:
        """The token itself and the `k` most likely ones: id, log-prob, rank (None where it is
        past those that are known)."""
        ids, values = self._top[0], self._top[1]
        own = (self.id, self.logprob, ids.index(self.id) + 1 if self.id in ids else None)
        best = zip(ids[:k], values[:k], range(1, k + 1), strict=False)
        return [own, *(entry for entry in best if entry[0] != self.id)]

    def entries(self, k: int) -> dict[str, PromptLogprob]:
        """In the form of `prompt_logprobs`."""
        return {
            str(id_): PromptLogprob(logprob=value, rank=rank, decoded_token=_name(id_))
            for id_, value, rank in self.ranked(k)
        }


class PromptLogprob(BaseModel):
    """One entry of vLLM's `prompt_logprobs`."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class ChoiceLogprobs(BaseModel):
    """OpenAI's log-probs of a text, token by token. Nothing is detokenised, so every offset is 0.
    The first token of an echoed prompt has no log-prob."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]

    @classmethod
    def of(cls, first: int | None, positions: Sequence[Position], k: int) -> ChoiceLogprobs:
        """Of the scored `positions`, behind the unscored `first` token if there is one."""
        none = [] if first is None else [None]
        tokens = ([] if first is None else [_name(first)]) + [_name(p.id) for p in positions]
        tops = [{_name(id_): value for id_, value, _ in p.ranked(k)} for p in positions]
        return cls(
            text_offset=[0] * len(tokens),
            token_logprobs=[*none, *(p.logprob for p in positions)],
            tokens=tokens,
            top_logprobs=[*none, *tops],
        )


class Choice(BaseModel):
    """One prompt's answer."""

    index: int
    text: str = ""
    finish_reason: Literal["length"] = "length"
    logprobs: ChoiceLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Usage(BaseModel):
    """Tokens that were read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """One choice for each prompt, in order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "cmpl-4c3d2e1f",
                    "object": "text_completion",
                    "created": 1764000000,
                    "model": "teacher",
                    "choices": [
                        {
                            "index": 0,
                            "text": "",
                            "finish_reason": "length",
                            "logprobs": {
                                "text_offset": [0, 0],
                                "token_logprobs": [None, -0.25],
                                "tokens": ["token_id:5", "token_id:9"],
                                "top_logprobs": [None, {"token_id:9": -0.25}],
                            },
                        }
                    ],
                    "usage": {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2},
                }
            ]
        }
    )

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


def _name(id_: int) -> str:
    return f"token_id:{id_}"
