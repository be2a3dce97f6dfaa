"""The Triton kernels of the output layer, without a GPU."""

from __future__ import annotations

import pytest

from tests.gpu_emulation.conftest import run_module

pytestmark = pytest.mark.slow


def test_they_give_what_torch_gives_in_float64() -> None:
    assert run_module("head", TRITON_INTERPRET="1") == {
        "values": pytest.approx(0, abs=1e-4),  # of logits of 200, in float32
        "gradient": pytest.approx(0, abs=1e-4),
    }


def test_they_compile_for_the_gpus_that_are_used() -> None:
    assert run_module("head", TRITON_INTERPRET="0") == {
        capability: ["ptx", "cubin"] * 2 for capability in ("80", "86", "89", "90")
    }
