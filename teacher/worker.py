"""The teacher's stage: verified groups in, groups with a teacher's log-probs out.

verified ──▶ only the trajectories that the objective needs ──REST──▶ the prompt's teacher
   scored ◀── all of the group, with checked log-probs ◀──────────────┘
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from services.errors import BadItem
from services.stage import BusyTime
from services.teacher_need import SCORED, TeacherNeed
from services.trajectory import Prompt, ScoredGroup, TopTokens, Trajectory, VerifiedGroup
from services.worker import Post, StepWorker
from teacher.pool import Servers, TeacherPool
from teacher.retokenizer import Untranslatable, unsaid
from teacher.scores import More, Question, TokenScores
from teacher.wire import version_of

log = logging.getLogger(__name__)


class Translator(Protocol):
    """Asks a teacher in its own tokens about answers in the student's."""

    def asked(self, trajectory: Trajectory, before: int) -> Question:
        """What it is asked about an answer of at least one token, of which it reads `before` tokens
        before it.

        Raises:
            Untranslatable: it has no tokens for the answer.
        """


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """What a worker of the teacher's stage is told.

    Args:
        need: which trajectories the objective wants scored.
        top: how many of the most likely tokens it wants with each.
        teachers: each of the run's by its name; none where the objective asks none.
        translators: of those teachers, by name, that have other tokens than the student.
        student_top: whether it wants the log-probs of the tokens that the rollout recorded as the
            student's most likely.
        entropy: whether it wants the teacher's, over the vocabulary.
    """

    need: TeacherNeed
    top: int = 0
    teachers: Mapping[str, Servers] = field(default_factory=dict)
    translators: Mapping[str, Translator] = field(default_factory=dict)
    student_top: bool = False
    entropy: bool = False


class TeacherWorker(StepWorker[VerifiedGroup, ScoredGroup, TeacherSettings]):
    """Asks each group's teacher."""

    takes = VerifiedGroup
    settings_class = TeacherSettings

    def __init__(self, post: Post, settings: TeacherSettings) -> None:
        super().__init__(post, settings)
        teachers = settings.teachers
        self._teachers = {name: TeacherPool(servers) for name, servers in teachers.items()}
        several = teachers if len(teachers) > 1 else ()
        self._busy_with = {name: BusyTime() for name in several}
        self._refused: Counter[str] = Counter()  # answers, by the reason
        self._asked: Counter[str] = Counter(requests=0, sequences=0, tokens=0, context_tokens=0)
        for name in several:
            self._asked.update({f"sequences_{name}": 0, f"tokens_{name}": 0})

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """The connections to its teachers."""
        async with AsyncExitStack() as pools:
            for pool in self._teachers.values():
                await pools.enter_async_context(pool)
            yield

    def details(self) -> dict[str, float]:
        """What was asked, how long that took, and what went wrong with servers."""
        pools = self._teachers.values()
        return {
            **self._asked,
            "asking_s": self.busy.seconds,
            **{f"asking_s_{name}": busy.seconds for name, busy in self._busy_with.items()},
            "retried": sum(pool.retried for pool in pools),
            "hedged": sum(pool.hedged for pool in pools),
            "servers_down": sum(pool.down for pool in pools),
            **({"refused": self._refused.total()} if self.settings.translators else {}),
        }

    async def process(self, group: VerifiedGroup) -> ScoredGroup:
        """Asks for the trajectories of the group that the objective needs, in one request."""
        trajectories, top = group.rollout.trajectories, self.settings.top
        needed = group.indices(*SCORED[self.settings.need])
        scores = dict.fromkeys(needed, TokenScores.empty(top))
        if self.settings.student_top and any(trajectories[i].top is None for i in needed):
            raise BadItem("the rollout recorded no most likely tokens of the student")
        questions: dict[int, Question] = {}
        for index in needed:
            if len(trajectories[index].token_ids):
                try:
                    questions[index] = self._question(group.prompt, trajectories[index])
                except Untranslatable as error:
                    scores[index] = unsaid(len(trajectories[index].token_ids))
                    self._refuse(group.prompt, str(error))
        scored_by, version = "", None
        if questions:
            pool = self._pool(group.prompt.teacher)
            pairs = [(group.prompt.teacher_ids, question.ids) for question in questions.values()]
            with self.busy, self._busy_with.get(group.prompt.teacher, nullcontext()):
                scored = await pool.score(pairs, top, self._more(questions.values()))
            for (index, question), score in zip(questions.items(), scored, strict=True):
                scores[index] = question.answered(score)
            scored_by, version = pool.fingerprint, version_of(scored)
            self._count(group.prompt.teacher, sum(len(p) + len(c) for p, c in pairs), len(pairs))
            self._asked["context_tokens"] += sum(len(p) for p, _ in pairs)
        tables = {i: TopTokens(s.top_ids, s.top_logprobs) for i, s in scores.items()} if top else {}
        if self.settings.student_top:
            tables = {i: _of_student(trajectories[i], score) for i, score in scores.items()}
        none = np.empty(0, np.float32)
        chunks = {i: s.chunks for i, s in scores.items() if s.chunks is not None}
        if chunks:  # an empty answer has none
            chunks |= {i: np.empty(0, np.int32) for i in scores.keys() - chunks.keys()}
        return ScoredGroup(
            group,
            {index: score.logprobs for index, score in scores.items()},
            scored_by,
            tables,
            version,
            chunks,
            {i: none if s.entropy is None else s.entropy for i, s in scores.items()}
            if self.settings.entropy
            else {},
        )

    def _more(self, questions: Iterable[Question]) -> More:
        named = [one.candidates for one in questions if one.candidates is not None]
        return More(self.settings.entropy, named if self.settings.student_top else [])

    def _question(self, prompt: Prompt, trajectory: Trajectory) -> Question:
        translator = self.settings.translators.get(prompt.teacher)
        if translator is None:
            return Question(trajectory.token_ids, candidates=trajectory.top)
        return translator.asked(trajectory, len(prompt.teacher_ids))

    def _refuse(self, prompt: Prompt, reason: str) -> None:
        self._refused[reason] += 1
        if self._refused[reason] == 1:  # of each reason one
            log.warning(
                "the teacher %s cannot be asked about an answer to prompt %s: %s",
                prompt.teacher, prompt.id, reason,
            )  # fmt: skip

    def _count(self, teacher: str, tokens: int, sequences: int) -> None:
        self._asked.update(requests=1, sequences=sequences, tokens=tokens)
        if teacher in self._busy_with:
            self._asked.update({f"sequences_{teacher}": sequences, f"tokens_{teacher}": tokens})

    def _pool(self, name: str) -> TeacherPool:
        if name not in self._teachers:
            raise BadItem(f"this run has no teacher {name!r}, only {', '.join(self._teachers)}")
        return self._teachers[name]


def _of_student(trajectory: Trajectory, scores: TokenScores) -> TopTokens:
    """What the teacher says of the tokens that the student finds most likely."""
    assert trajectory.top is not None
    nothing = np.empty(trajectory.top.shape, np.float32)  # only where the answer has no token
    return TopTokens(trajectory.top, nothing if scores.candidates is None else scores.candidates)
