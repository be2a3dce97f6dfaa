"""A judge that never ends with what it is told to work on, for tests of deadlines and kills."""

from __future__ import annotations

from services.trajectory import Verdict


def judge(completion: str, reference: str) -> Verdict:
    """Correct, if it comes to a verdict."""
    while completion == "bomb":
        pass
    return Verdict("correct" if completion == reference else "incorrect", "it came to an end")
