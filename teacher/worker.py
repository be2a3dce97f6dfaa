"""The teacher's stage: verified groups in, groups with the teacher's log-probs out.

verified ──▶ only the trajectories that the objective needs ──REST──▶ teacher
   scored ◀── all of the group, with checked log-probs ◀──────────────┘
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from services.stage import Busy, Connection, Stage, new_consumer
from services.trajectory import (
    Outcome,
    ScoredGroup,
    TopTokens,
    VerifiedGroup,
    decode,
    encode,
)
from teacher.client import Target
from teacher.config import TeacherConfig
from teacher.pool import TeacherPool
from teacher.scores import TokenScores

Need: TypeAlias = Literal["incorrect", "all", "none"]

# An unknown verdict enters no path of any objective, so it is never paid for.
_OUTCOMES: Mapping[Need, tuple[Outcome, ...]] = {
    "incorrect": ("incorrect",),
    "all": ("correct", "incorrect"),
    "none": (),
}


class TeacherWorker:
    """Moves groups from `verified` to `scored`.

    Args:
        connection: the run.
        config: capacity and time-outs.
        targets: the servers that hold the teacher.
        need: which trajectories the objective wants scored.
        top: how many of the most likely tokens it wants with each.
        expected_fingerprint: the only model whose scores are taken; None pins the first seen.
        name: of this worker. Each incarnation adds a suffix, because a restarted worker must
            not share a consumer in Redis with the one that it replaces.
    """

    def __init__(
        self,
        connection: Connection,
        config: TeacherConfig,
        targets: Sequence[Target],
        need: Need,
        expected_fingerprint: str | None,
        top: int,
        name: str,
    ) -> None:
        self._top = top
        self.consumer = new_consumer(name)
        self._connection = connection
        self._config = config
        self._outcomes = _OUTCOMES[need]
        self._teacher = TeacherPool(
            targets,
            timeout_s=config.request_timeout_s,
            fingerprint=expected_fingerprint,
            hedge_factor=config.hedge_factor,
        )
        self._stopping = asyncio.Event()
        self._busy = Busy()
        self._asked: Counter[str] = Counter(requests=0, sequences=0, tokens=0)

    async def run(self) -> None:
        """Works until `stop`; then finishes the groups that it holds.

        Raises:
            services.stage.PatienceExceeded: the teacher stayed unavailable for too long.
        """
        lane = self._connection.streams()
        stage = Stage(
            name="teacher",
            consumer=self.consumer,
            lanes=[lane],
            source="verified",
            target="scored",
            process=self._process,
            capacity=self._config.capacity,
            config=self._connection.config,
            stopping=self._stopping,
            details=self._details,
        )
        try:
            await stage.run()
        finally:
            await self._teacher.aclose()
            await lane.redis.aclose()

    async def stop(self) -> None:
        """Asks `run` to return once it has finished what it holds."""
        self._stopping.set()

    def _details(self) -> dict[str, float]:
        pool = self._teacher
        return {
            "workers": 1.0,
            **self._asked,
            "asking_s": self._busy.seconds,
            "retried": pool.retried,
            "hedged": pool.hedged,
            "servers_down": pool.down,
        }

    async def _process(self, payload: bytes) -> bytes:
        group = decode(VerifiedGroup, payload)
        trajectories = group.rollout.trajectories
        places = group.indices(*self._outcomes)
        logprobs = {place: np.empty(0, np.float32) for place in places}
        top: dict[int, TopTokens] = {}
        if self._top:
            none = TokenScores.empty(self._top)
            top = {place: TopTokens(none.top_ids, none.top_logprobs) for place in places}
        asked = [place for place in places if len(trajectories[place].token_ids)]
        if asked:
            prompt = group.rollout.prompt.token_ids
            with self._busy:
                scores = await self._teacher.score(
                    [(prompt, trajectories[place].token_ids) for place in asked], self._top
                )
            logprobs.update(zip(asked, (score.logprobs for score in scores), strict=True))
            if self._top:
                found = (TopTokens(score.top_ids, score.top_logprobs) for score in scores)
                top.update(zip(asked, found, strict=True))
            completions = sum(len(trajectories[place].token_ids) for place in asked)
            self._asked.update(
                requests=1, sequences=len(asked), tokens=len(prompt) * len(asked) + completions
            )
        teacher = self._teacher.fingerprint if asked else ""
        return encode(ScoredGroup(group, logprobs, teacher, top))
