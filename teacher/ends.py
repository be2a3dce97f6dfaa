"""The end of an answer under a teacher that ends its own with another token than the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.trajectory import TokenIds, Trajectory
from teacher.scores import Question, TokenScores


@dataclass(frozen=True, slots=True)
class Ends:
    """End tokens that mean the same: those of the student that do not end the teacher's answers,
    and the one with which the teacher ends its own."""

    student: tuple[int, ...]
    teacher: int

    @staticmethod
    def between(student: Sequence[int], teacher: Sequence[int]) -> Ends | None:
        """None where the teacher ends with all of the student's."""
        others = tuple(end for end in student if end not in teacher)
        return Ends(others, teacher[0]) if others else None

    def asked(self, trajectory: Trajectory, before: int = 0) -> Question:
        """What the teacher scores: its own end, where the student chose to end."""
        ids = trajectory.token_ids
        if trajectory.finish == "stop" and len(ids) and int(ids[-1]) in self.student:
            ids = np.append(ids[:-1], np.int32(self.teacher))
        top = trajectory.top
        return Question(ids, self.answered, None if top is None else self.traded(top))

    def answered(self, scores: TokenScores) -> TokenScores:
        """Where the teacher would end, the student ends: the two trade places among the most
        likely tokens, so that a divergence compares like with like."""
        return replace(scores, top_ids=self.traded(scores.top_ids))

    def traded(self, ids: TokenIds) -> TokenIds:
        """Both ends in each other's place, in ids of any shape."""
        own = self.student[0]
        ends, others = ids == self.teacher, ids == own
        return np.where(ends, own, np.where(others, self.teacher, ids)).astype(np.int32)
