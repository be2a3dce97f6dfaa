"""The verifier's settings: who judges what, and which mistakes are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from verifier.config import VerifierConfig


def test_a_data_source_may_have_a_kind_of_its_own() -> None:
    config = VerifierConfig(kind="math", kinds={"letters": "exact"}, answer_marker="=>")
    assert config.kind_of("letters") == "exact"
    assert config.kind_of("deepmath") == "math"
    assert config.used_kinds == {"exact", "math"}


@pytest.mark.parametrize(
    "mistake",
    [
        {"answer_marker": "=>"},  # nothing reads it: the kind is math
        {"kind": "exact", "answer_marker": ""},
        {"kind": "codes"},
        {"kind": "os.system"},
        {"code": {"sandbox": "none"}},
        {"code": {"time_s": 0}},
        {"answer_from": "anywhere"},
        {"deadline_s": 0},
        {"memory_mb": 64},
        {"judges": 0},
        {"overlong": "correct"},
        {"dead_line_s": 5},
    ],
)
def test_a_mistake_is_refused(mistake: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VerifierConfig.model_validate(mistake)
