"""vLLM's GPU sampler, without a GPU."""

from __future__ import annotations

import pytest

from tests.gpu_emulation.conftest import run_module

pytestmark = pytest.mark.slow


def test_log_probs_are_those_of_the_softmax_and_tokens_are_drawn_from_it(vllm: None) -> None:
    exact = pytest.approx(0, abs=1e-4)
    found = run_module("sampler", TRITON_INTERPRET="1", VLLM_LOGGING_LEVEL="ERROR")
    assert found.pop("frequencies") < 4  # standard errors, the largest of eight
    assert found == {
        "sampling": {"temperature": exact, "of the sampled": exact},
        "scoring": {
            "of the prompt": exact, "of the most likely": exact, "of named ones": exact,
            "other tokens": 0,
        },
    }  # fmt: skip
