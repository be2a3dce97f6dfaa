"""Episodes: a group of trajectories in which the student and its environment take turns.

    n first turns, sampled together ─▶ each on its own: step ─▶ new messages ─▶ n = 1 more turn ─▶ …

What was sampled stays as it was, and only the world's messages are rendered and appended, behind a
mask. Every turn has random numbers of its own, fixed by the group's seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from rollout.config import EnvironmentConfig
from rollout.continuation import Continuation
from rollout.engine import Completion, Sampled
from rollout.environment import Environment, EnvironmentFailed, Over, Reply
from rollout.environments import Environments
from services.tasks import together
from services.trajectory import (
    Episode,
    Finish,
    Message,
    Prompt,
    RolloutGroup,
    Sampling,
    TokenIds,
    Trajectory,
)

Sample: TypeAlias = Callable[[Sequence[int], Sampling], Awaitable[Sampled]]


class Episodes:
    """Plays the episodes of one worker.

    Args:
        sample: of the worker's engine.
        tokenizer: the student's.
        end_tokens: the ids that end a turn.
        config: limits, and what is done with templates that rewrite.
        environments: who answers.
    """

    def __init__(
        self,
        sample: Sample,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        config: EnvironmentConfig,
        environments: Environments,
    ) -> None:
        self._sample = sample
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._config = config
        self._environments = environments
        self._continuation = Continuation(
            tokenizer, end_tokens, keeps_rewritten=config.rewritten == "keep"
        )
        self._places = asyncio.Semaphore(config.concurrent)

    async def group(self, prompt: Prompt) -> RolloutGroup:
        """All trajectories of one prompt, each played to its end.

        Raises:
            EnvironmentFailed: an environment took too long, or answered what is no answer.
            Exception: whatever an environment or the engine raises.
        """
        first = await self._sample(prompt.token_ids.tolist(), self._limited(prompt.sampling))
        played = await together(
            self._play(prompt, index, completion, first.weight_version)
            for index, completion in enumerate(first.completions)
        )
        oldest = min(turns.oldest for turns, _, _ in played)
        return RolloutGroup(
            prompt,
            tuple(self._trajectory(*one, group_version=oldest) for one in played),
            oldest,
        )

    async def _play(
        self, prompt: Prompt, index: int, completion: Completion, version: int
    ) -> tuple[_Turns, Finish, Over]:
        """One episode from its first turn on."""
        sampling, start = prompt.sampling, prompt.token_ids.tolist()
        turns, said = _Turns(), [*prompt.messages]
        async with self._environments.begin(prompt) as environment:
            while True:
                turns.add(completion, version)
                if completion.finish == "length":
                    return turns, "length", Over()
                text = self._text(completion)
                reply = await self._step(environment, said, text, turns)
                if isinstance(reply, Over):
                    return turns, "stop", reply
                if turns.count == self._config.max_turns:
                    return turns, "length", Over()
                heard = self._continuation.ids(said, reply.messages)
                left = sampling.max_tokens - len(turns.token_ids) - len(heard)
                if left < 1:
                    return turns, "length", Over()
                turns.hear(heard)
                said += [{"role": "assistant", "content": text}, *reply.messages]
                seed = turn_seed(sampling.seed, index, turns.count)
                more = replace(sampling, n=1, max_tokens=left, seed=seed)
                sampled = await self._sample([*start, *turns.token_ids], self._limited(more))
                (completion,), version = sampled.completions, sampled.weight_version

    async def _step(
        self, environment: Environment, said: Sequence[Message], text: str, turns: _Turns
    ) -> Reply | Over:
        limit_s = self._config.deadline_s
        async with self._places:
            began = time.monotonic()
            try:
                async with asyncio.timeout(limit_s) as limit:
                    reply = await environment.step(tuple(said), text)
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise EnvironmentFailed(
                    f"the environment took longer than environment.deadline_s ({limit_s:g} s)"
                ) from error
            turns.waited_s += time.monotonic() - began
        if not isinstance(reply, Over):
            _check(reply)
            turns.errors += reply.failed
        return reply

    def _limited(self, sampling: Sampling) -> Sampling:
        most = self._config.turn_tokens or sampling.max_tokens
        return replace(sampling, max_tokens=min(most, sampling.max_tokens))

    def _text(self, completion: Completion, *, plain: bool = False) -> str:
        ids = completion.token_ids.tolist()
        if not plain and ids[-1] in self._end_tokens:
            ids.pop()
        text = self._tokenizer.decode(ids, skip_special_tokens=plain)
        assert isinstance(text, str)  # a list only for a list of sequences
        return text

    def _trajectory(
        self, turns: _Turns, finish: Finish, end: Over, *, group_version: int
    ) -> Trajectory:
        assert turns.last is not None
        return Trajectory(
            token_ids=np.array(turns.token_ids, np.int32),
            logprobs=np.array(turns.logprobs, np.float32),
            finish=finish,
            text=self._text(turns.last, plain=True) if end.note is None else end.note,
            version_runs=() if turns.runs == [(0, group_version)] else tuple(turns.runs),
            mask=None if all(turns.mask) else np.array(turns.mask, np.bool_),
            episode=Episode(turns.count, turns.errors, turns.waited_s, end.verdict),
            top=np.concatenate(turns.tops) if turns.tops else None,
        )


@dataclass
class _Turns:
    """A trajectory while it grows: the student's turns, and the world's tokens between them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)  # see services.trajectory.Trajectory
    tops: list[TokenIds] = field(default_factory=list)
    count: int = 0
    errors: int = 0
    waited_s: float = 0.0
    last: Completion | None = None

    @property
    def oldest(self) -> int:
        """The oldest version that sampled any of its tokens."""
        return min(version for _, version in self.runs)

    def add(self, completion: Completion, version: int) -> None:
        """A turn of the student's, sampled from `version` unless it has runs of its own."""
        for start, run in completion.version_runs or [(0, version)]:
            if not self.runs or self.runs[-1][1] != run:
                self.runs.append((len(self.token_ids) + start, run))
        self._append(completion.token_ids.tolist(), completion.logprobs.tolist(), sampled=True)
        if completion.top is not None:
            self.tops.append(completion.top)
        self.count, self.last = self.count + 1, completion

    def hear(self, token_ids: Sequence[int]) -> None:
        """What the world says."""
        self._append(token_ids, [0.0] * len(token_ids), sampled=False)
        if self.tops:  # nothing was sampled here: any tokens
            k = self.tops[0].shape[1]
            self.tops.append(np.tile(np.arange(k, dtype=np.int32), (len(token_ids), 1)))

    def _append(self, ids: Sequence[int], logprobs: Sequence[float], *, sampled: bool) -> None:
        self.token_ids += ids
        self.logprobs += logprobs
        self.mask += [sampled] * len(ids)


def turn_seed(seed: int, index: int, turn: int) -> int:
    """The seed of one trajectory's turn `turn` > 0. Two bits short, as those of prompts are."""
    state = np.random.SeedSequence(seed, spawn_key=(index, turn)).generate_state(1, np.uint64)
    return int(state[0]) >> 2


def _check(reply: Reply) -> None:
    """Refuses what is no answer: an episode never goes on with nothing."""
    if not isinstance(reply, Reply) or not reply.messages:
        raise EnvironmentFailed(f"the environment answered {reply!r}: no messages, and not Over")
    for message in reply.messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise EnvironmentFailed(f"the environment answered {message!r}: a message is its role "
                                    "and content, as text")  # fmt: skip
