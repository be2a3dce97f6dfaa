"""The Triton kernels between a layer's matrices, without a GPU."""

from __future__ import annotations

import pytest

from tests.gpu_emulation.conftest import run_module

pytestmark = pytest.mark.slow


def test_they_give_what_torch_gives_in_float64_and_so_do_their_gradients() -> None:
    exact, rounded = pytest.approx(0, abs=2e-6), pytest.approx(0, abs=0.01)
    assert run_module("layers", TRITON_INTERPRET="1") == {
        "norm": {"float32": exact, "bfloat16": rounded, "many": exact},
        "product": {"float32": exact, "bfloat16": rounded},
        "rotation": {"float32": exact, "bfloat16": rounded},
    }


def test_they_compile_for_the_gpus_that_are_used() -> None:
    assert run_module("layers", TRITON_INTERPRET="0") == {
        capability: ["ptx", "cubin"] * 5 for capability in ("80", "86", "89", "90")
    }
