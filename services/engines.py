"""What runs a model, vLLM or transformers: the choice, and loading it for the latter.

Never imports vLLM, which need not be installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from services.config import EngineConfig
from services.models import load_model

if TYPE_CHECKING:  # a caller that only wants the choice never loads torch
    from transformers import PreTrainedModel


class EngineError(ValueError):
    """The configured engine cannot be had; the message says what to change."""


def choose(engine: EngineConfig, section: str) -> Literal["vllm", "transformers"]:
    """The kind of engine that `auto` means here.

    Args:
        engine: the settings.
        section: where they stand in the run's config, for messages.

    Raises:
        EngineError: vLLM is asked for and not installed, or transformers is given arguments.
    """
    kind = engine.kind
    if kind == "auto":
        on_gpu = not engine.device.startswith("cpu") and _has_gpu()
        kind = "vllm" if on_gpu and find_spec("vllm") else "transformers"
    if kind == "vllm" and not find_spec("vllm"):
        raise EngineError(
            f"{section}.kind is 'vllm', and vLLM is not installed: install the extra 'vllm' "
            f"(GPU) or run make install (CPU), or set {section}.kind to 'transformers'"
        )
    if kind == "transformers" and engine.args:
        raise EngineError(
            f"{section}.args: the transformers engine takes no arguments, got "
            f"{', '.join(sorted(engine.args))}"
        )
    return kind


def vllm_can_check(engine: EngineConfig) -> bool:
    """Whether `engine.args` are for a vLLM that is installed here. Where the kind is `auto` they
    are: nothing else takes any, and the machine that has the GPUs may be another one."""
    wanted = engine.kind == "vllm" or (engine.kind == "auto" and bool(engine.args))
    return wanted and find_spec("vllm") is not None


def load(engine: EngineConfig, model: str) -> PreTrainedModel:
    """The model of a directory, in evaluation mode, on the device and in the precision that the
    transformers engine is configured for.

    Raises:
        services.models.ModelError: there is no such model.
    """
    device = ("cuda" if _has_gpu() else "cpu") if engine.device == "auto" else engine.device
    dtype = engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return load_model(model, dtype=dtype, device=device)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
