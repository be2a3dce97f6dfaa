"""A teacher with the student's weights: it follows the weight store, as rollout workers do.

weight store ─ long poll ─▶ a version that is due ─▶ load it, check its probe, average
                                requests in work end ──┘        └──▶ others go on
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import torch
from torch import Tensor

from services import packed
from services.weights import WeightFeed, Weights, WeightsMismatch, check_probe, copy_weights
from teacher.config import TeacherConfig
from teacher.packed_scorer import PackedScorer
from teacher.scorer import ScorerDied
from teacher.scores import NO_MORE, More, TokenScores

_POLL_S = 2.0  # how long the store holds a request for newer weights


class FollowingScorer:
    """Scores with the weights that the learner published, or with their moving average. All
    sequences of one call are scored by one version, which every score tells.

    Args:
        scorer: what computes. Its weights are replaced before anything is scored.
        feed: where the learner's weights come from.
        config: how often they are taken over (`refresh_steps`), and what of them (`ema`).
    """

    def __init__(self, scorer: PackedScorer, feed: WeightFeed, config: TeacherConfig) -> None:
        self._scorer = scorer
        self._feed = feed
        self._config = config
        self._version: int | None = None  # None before the first, and while one is loaded
        self._average: dict[str, Tensor] = {}  # float32; none where the weights are a copy
        self._usual: float | None = None  # see `check_probe`
        self._scoring = 0  # calls
        self._changed = asyncio.Condition()
        self._following: asyncio.Task[None] | None = None
        self._ended, self._why = False, "see the replica's log"

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`. Waits for the first weights.

        Raises:
            ScorerDied: the weights can no longer be followed.
        """
        async with self._one_version() as version:
            scores = await self._scorer.score(sequences, starts, top, more)
        return [replace(score, version=version) for score in scores]

    async def check(self) -> None:
        """See `teacher.scorer.Scorer`. Before the first weights came it only waits."""
        self._follow()

    async def close(self) -> None:
        """Follows no longer, and lets the thread end."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        await self._scorer.close()

    def _follow(self) -> None:
        if self._following is None:
            self._following = asyncio.create_task(self._keep_up())
        if self._ended:
            raise ScorerDied(f"the teacher cannot follow the student: {self._why}")

    @asynccontextmanager
    async def _one_version(self) -> AsyncIterator[int]:
        """Holds the weights as they are."""
        self._follow()
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or self._version is not None)
            self._follow()  # it may have ended meanwhile
            assert self._version is not None
            version, self._scoring = self._version, self._scoring + 1
        try:
            yield version
        finally:
            async with self._changed:
                self._scoring -= 1
                self._changed.notify_all()

    async def _keep_up(self) -> None:
        """Until cancelled, or until weights come that are not the learner's."""
        try:
            while True:
                weights = await self._feed.next(_POLL_S)
                if weights is not None and self._due(weights):
                    await self._take_over(weights)
        except WeightsMismatch as error:
            self._why = str(error)
        finally:
            async with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _due(self, weights: Weights) -> bool:
        """Whether to take these: a learner that went back to a checkpoint publishes older ones."""
        if self._version is None:
            return True
        return not 0 <= weights.version - self._version < self._config.refresh_steps

    async def _take_over(self, weights: Weights) -> None:
        async with self._changed:
            # Until these have passed, nobody may score: where they fail, nobody ever will.
            before, self._version = self._version, None
            await self._changed.wait_for(lambda: not self._scoring)
        await self._scorer.change(lambda: self._load(weights, before))
        async with self._changed:
            self._version = weights.version
            self._changed.notify_all()

    @torch.no_grad()
    def _load(self, weights: Weights, before: int | None) -> None:
        model = self._scorer.model
        copy_weights(model, weights)
        (logprobs,) = packed.score(model, [weights.probe_ids], [1])
        mean = check_probe(weights, logprobs, self._config.probe_tolerance, self._usual)
        self._usual = mean if self._usual is None else self._usual
        if not self._config.ema:
            return
        steps = 0 if before is None else weights.version - before
        if steps <= 0:  # the first, or those of a learner that went back
            named = model.named_parameters()
            self._average = {name: one.detach().float().clone() for name, one in named}
            return
        # Versions that were published while the last were loaded are made up for.
        kept = self._config.ema ** (steps / self._config.refresh_steps)
        for name, parameter in model.named_parameters():
            self._average[name].lerp_(parameter.float(), 1.0 - kept)
            parameter.copy_(self._average[name])
