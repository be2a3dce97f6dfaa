from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rollout.config import DataConfig, RolloutConfig, SamplingConfig


def test_one_file_or_several() -> None:
    one = DataConfig.model_validate({"path": "a.parquet", "max_prompt_tokens": 8})
    two = DataConfig.model_validate({"path": ["a.parquet", "b.jsonl"], "max_prompt_tokens": 8})
    assert one.files == ("a.parquet",)
    assert two.files == ("a.parquet", "b.jsonl")
    assert DataConfig.model_validate(two.model_dump(mode="json")) == two


@pytest.mark.parametrize(
    ("config", "change", "complaint"),
    [
        (SamplingConfig, {"max_tokens": 8, "top_p": 0.9}, "top_p"),
        (SamplingConfig, {"max_tokens": 8, "temperature": 0.0}, "greater than 0"),
        (SamplingConfig, {"max_tokens": 0}, "greater than or equal to 1"),
        (DataConfig, {"path": [], "max_prompt_tokens": 8}, "at least one file"),
        (DataConfig, {"path": "a.jsonl", "max_prompt_tokens": 8, "epoch": 2}, "epoch"),
        (RolloutConfig, {"probe_tolerance": 0}, "greater than 0"),
        (RolloutConfig, {"engine": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode"),
    ],
)
def test_what_cannot_work_is_refused(
    config: type[Any], change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config.model_validate(change)
