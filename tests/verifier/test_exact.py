"""Text answers: what follows the last marker, stripped, must be the reference."""

from __future__ import annotations

import pytest

from verifier.exact import judge


@pytest.mark.parametrize(
    ("completion", "reference", "marker", "outcome"),
    [
        ("42", "42", None, "correct"),
        (" 42\n", "42 ", None, "correct"),
        ("042", "42", None, "incorrect"),
        ("Paris", "paris", None, "incorrect"),
        ("", "42", None, "incorrect"),
        ("so => 42", "42", "=>", "correct"),
        ("=> 41 no, => 42", "42", "=>", "correct"),
        ("=> 42 no, => 41", "42", "=>", "incorrect"),
        ("42", "42", "=>", "incorrect"),
        ("42 =>", "42", "=>", "incorrect"),
        ("anything", " ", None, "unknown"),
    ],
)
def test_verdicts(completion: str, reference: str, marker: str | None, outcome: str) -> None:
    assert judge(completion, reference, marker).outcome == outcome


def test_a_missing_answer_is_named() -> None:
    assert judge("no marker here", "42", "=>").reason == "no answer found"
