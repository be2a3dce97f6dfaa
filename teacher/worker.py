"""The teacher's stage: verified groups in, groups with a teacher's log-probs out.

verified ──▶ only the trajectories that the objective needs ──REST──▶ the prompt's teacher
   scored ◀── all of the group, with checked log-probs ◀──────────────┘
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, TypeAlias

import numpy as np

from services.stage import BadItem, Busy, Connection, Stage, new_consumer
from services.trajectory import (
    Outcome,
    ScoredGroup,
    TopTokens,
    VerifiedGroup,
    decode,
    encode,
)
from teacher.pool import Servers, TeacherPool
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
        teachers: each of the run's by its name; none where the objective asks none.
        need: which trajectories the objective wants scored.
        top: how many of the most likely tokens it wants with each.
        name: of this worker. Each incarnation adds a suffix, because a restarted worker must
            not share a consumer in Redis with the one that it replaces.
        capacity: groups in flight.
    """

    def __init__(
        self,
        connection: Connection,
        teachers: Mapping[str, Servers],
        need: Need,
        top: int,
        name: str,
        *,
        capacity: int,
    ) -> None:
        self._top = top
        self.consumer = new_consumer(name)
        self._connection = connection
        self._capacity = capacity
        self._outcomes = _OUTCOMES[need]
        self._teachers = {name: TeacherPool(servers) for name, servers in teachers.items()}
        self._stopping = asyncio.Event()
        self._busy = Busy()
        several = teachers if len(teachers) > 1 else ()
        self._busy_with = {name: Busy() for name in several}
        self._asked: Counter[str] = Counter(requests=0, sequences=0, tokens=0)
        for name in several:
            self._asked.update({f"sequences_{name}": 0, f"tokens_{name}": 0})

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
            capacity=self._capacity,
            config=self._connection.config,
            stopping=self._stopping,
            details=self._details,
        )
        try:
            await stage.run()
        finally:
            for pool in self._teachers.values():
                await pool.aclose()
            await lane.redis.aclose()

    async def stop(self) -> None:
        """Asks `run` to return once it has finished what it holds."""
        self._stopping.set()

    def _details(self) -> dict[str, float]:
        pools = self._teachers.values()
        return {
            "workers": 1.0,
            **self._asked,
            "asking_s": self._busy.seconds,
            **{f"asking_s_{name}": busy.seconds for name, busy in self._busy_with.items()},
            "retried": sum(pool.retried for pool in pools),
            "hedged": sum(pool.hedged for pool in pools),
            "servers_down": sum(pool.down for pool in pools),
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
        scored_by = ""
        if asked:
            prompt, name = group.rollout.prompt.token_ids, group.rollout.prompt.teacher
            pool = self._pool(name)
            with self._busy, self._busy_with.get(name, nullcontext()):
                scores = await pool.score(
                    [(prompt, trajectories[place].token_ids) for place in asked], self._top
                )
            scored_by = pool.fingerprint
            logprobs.update(zip(asked, (score.logprobs for score in scores), strict=True))
            if self._top:
                found = (TopTokens(score.top_ids, score.top_logprobs) for score in scores)
                top.update(zip(asked, found, strict=True))
            completions = sum(len(trajectories[place].token_ids) for place in asked)
            tokens = len(prompt) * len(asked) + completions
            self._asked.update(requests=1, sequences=len(asked), tokens=tokens)
            if name in self._busy_with:
                self._asked.update({f"sequences_{name}": len(asked), f"tokens_{name}": tokens})
        return encode(ScoredGroup(group, logprobs, scored_by, top))

    def _pool(self, name: str) -> TeacherPool:
        if name not in self._teachers:
            raise BadItem(f"this run has no teacher {name!r}, only {', '.join(self._teachers)}")
        return self._teachers[name]
