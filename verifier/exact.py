"""Is the answer, as text, the reference? For tasks with one way to write the answer."""

from __future__ import annotations

from services.trajectory import Verdict


def judge(completion: str, reference: str, marker: str | None = None) -> Verdict:
    """Compares the stripped answer with the stripped reference, character by character.

    Args:
        completion: what the student wrote.
        reference: the answer; an empty one cannot be judged by, so the verdict is `unknown`.
        marker: what follows its last occurrence is the answer; None takes the whole text.
    """
    expected = reference.strip()
    if not expected:
        return Verdict("unknown", "the reference is empty")
    if marker is None:
        answer = completion
    else:
        _, marked, answer = completion.rpartition(marker)
        if not marked:
            return Verdict("incorrect", "no answer found")
    answer = answer.strip()
    if not answer:
        return Verdict("incorrect", "no answer found")
    if answer == expected:
        return Verdict("correct", "equals the reference")
    return Verdict("incorrect", "differs from the reference")
