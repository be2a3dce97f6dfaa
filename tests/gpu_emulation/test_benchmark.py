"""The parts of `benchmarks/gpu.sh` run on a GPU, with its kernels: the day that one can be had is
no day for finding out that they do not."""

from __future__ import annotations

import pytest

from benchmarks.gpu_parts import REGIMES
from tests.gpu_emulation.benchmark import PARTS
from tests.gpu_emulation.conftest import run_module

pytestmark = pytest.mark.slow


def test_every_part_runs_the_kernels_of_a_gpu(preloaded: dict[str, str]) -> None:
    called = run_module("benchmark", **preloaded)
    assert [*called] == [*PARTS]
    assert called["matrix rate"] == ["mm bfloat16"]
    for name in REGIMES:
        assert {"_varlen_attn_backward bfloat16", "add_slope bfloat16"} <= set(called[name])
    assert {name for name in called["scoring"] if "attn" in name} == {"_varlen_attn bfloat16"}
