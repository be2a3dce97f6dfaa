"""What vLLM is started with where nobody says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.families import tiny
from rollout.config import RolloutConfig, SamplingEngineConfig
from services.config import Resources
from services.engines import EngineError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm")]


def made(student: Path, **settings: object) -> object:
    from rollout.vllm_engine import engine_args  # imports vLLM

    return engine_args(RolloutConfig.model_validate(settings), str(student))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as our defaults are concerned; vLLM itself is the CPU's here."""
    monkeypatch.setattr("services.vllm_core.on_cpu", lambda: False)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("gpus", "share"), [(0.25, 0.23), (1, 0.92)])
def test_an_engine_takes_the_share_of_a_gpu_that_its_role_reserves(
    student: Path, gpus: float, share: float
) -> None:
    args = made(student, resources=Resources(gpus=gpus))
    assert args.gpu_memory_utilization == share  # type: ignore[attr-defined]


@pytest.mark.usefixtures("on_a_gpu")
def test_more_memory_than_the_role_reserves_is_refused(student: Path) -> None:
    engine = SamplingEngineConfig(args={"gpu_memory_utilization": 0.5})
    with pytest.raises(EngineError, match=r"is 0.5, and the role reserves 0.25 of a GPU"):
        made(student, resources=Resources(gpus=0.25), engine=engine)


@pytest.mark.parametrize(
    ("longest", "args", "length"),
    [(14_336, {}, 14_336), (40, {}, 65), (None, {}, None), (40, {"max_model_len": 200}, 200)],
    ids=["the run's longest", "the probe and a token", "the model's context", "the user's"],
)
def test_a_sequence_is_as_long_as_somebody_needs(
    student: Path, longest: int | None, args: dict[str, int], length: int | None
) -> None:
    from rollout.vllm_engine import engine_args  # imports vLLM

    config = RolloutConfig(engine=SamplingEngineConfig(args=args))
    assert engine_args(config, str(student), longest).max_model_len == length


def test_vllm_has_defaults_for_the_usage_that_it_is_told() -> None:
    """For each GPU; for an engine without one it takes 128 sequences a step on all of them."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from services import vllm_core

    for table in AsyncEngineArgs.get_batch_defaults(world_size=1):
        assert vllm_core._USAGE in table and None not in table


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["-rotary_embedding"]),
        ({"custom_ops": ["none", "+silu_and_mul"]}, ["none", "+silu_and_mul", "-rotary_embedding"]),
        ({"custom_ops": ["+rotary_embedding"]}, ["+rotary_embedding"]),
    ],
)
def test_rotary_embeddings_are_pytorchs_on_a_cpu(
    student: Path, given: dict[str, object], expected: list[str]
) -> None:
    """vLLM's own kernel there rotates one head alone of models like LFM2."""
    engine = SamplingEngineConfig(args={"compilation_config": {"backend": "eager", **given}})
    config = made(student, engine=engine).compilation_config  # type: ignore[attr-defined]
    assert (config.backend, config.custom_ops) == ("eager", expected)


def test_linear_attention_in_float32_is_refused_on_a_cpu(tmp_path: Path) -> None:
    tiny("qwen3_next").save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"bfloat16 alone: set rollout\.engine\.dtype"):
        made(tmp_path)
    made(tmp_path, engine=SamplingEngineConfig(dtype="bfloat16"))


def test_code_that_vllm_cannot_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself says why in its log alone."""
    from vllm import ModelRegistry

    from services.vllm_core import _cause

    refused = "Model architectures ['Qwen3ForCausalLM'] failed to be inspected."
    assert _cause(refused) == refused  # it can be imported now
    absent = replace(ModelRegistry.models["Qwen3ForCausalLM"], module_name="absent_vision.models")
    monkeypatch.setitem(ModelRegistry.models, "Qwen3ForCausalLM", absent)
    said = _cause(refused)
    assert "its code of Qwen3ForCausalLM cannot be imported: No module named 'absent_vis" in said
    assert f"install what fits torch {torch.__version__}" in said
