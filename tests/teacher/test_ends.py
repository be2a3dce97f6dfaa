"""A base student and a chat teacher: each ends with a token of its own."""

from __future__ import annotations

import numpy as np

from services.trajectory import Finish, Trajectory
from teacher.ends import Ends
from teacher.scores import TokenScores

ENDS = Ends(student=(1, 9), teacher=7)


def answer(ids: list[int], finish: Finish = "stop") -> Trajectory:
    return Trajectory(np.array(ids, np.int32), np.zeros(len(ids), np.float32), finish, "")


def test_only_ends_that_the_teacher_does_not_know_are_another_s() -> None:
    assert Ends.between([1, 9], [7, 8]) == ENDS
    assert Ends.between([1, 9], [9, 1]) is None
    assert Ends.between([1, 9], [9]) == Ends((1,), 9)


def test_the_end_is_scored_as_the_teacher_s_own_and_nothing_else_changes() -> None:
    original = answer([4, 1, 5, 9])  # 1 within the answer is a token like others
    assert ENDS.asked(original).ids.tolist() == [4, 1, 5, 7]
    assert ENDS.asked(original).ids.dtype == np.int32
    assert original.token_ids.tolist() == [4, 1, 5, 9]
    assert ENDS.asked(answer([4, 9], "length")).ids.tolist() == [4, 9]  # cut off, not ended
    assert ENDS.asked(answer([4, 5])).ids.tolist() == [4, 5]
    assert ENDS.asked(answer([])).ids.tolist() == []


def test_the_ends_trade_places_among_the_most_likely_tokens() -> None:
    values = np.array([[-0.1, -2.0, -3.0], [-0.5, -1.0, -4.0]], np.float32)
    ids = np.array([[7, 3, 1], [2, 9, 7]], np.int32)
    found = ENDS.answered(TokenScores(values[:, 0], ids, values))
    assert found.top_ids.tolist() == [[1, 3, 7], [2, 9, 1]]
    assert found.top_logprobs is values
