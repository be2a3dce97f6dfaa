"""What runs a model, vLLM or transformers: the choice, and loading it for the latter.

Never imports vLLM, which need not be installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from services.config import EngineConfig, Resources
from services.models import load_model

if TYPE_CHECKING:  # a caller that only wants the choice never loads torch
    from transformers import PreTrainedModel

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # for builds of a CUDA major version, by NVIDIA's notes
_DRIVER = Path("/proc/driver/nvidia/version")


class EngineError(ValueError):
    """The configured engine cannot be had; the message says what to change."""


def choose(
    engine: EngineConfig, section: str, resources: Resources
) -> Literal["vllm", "transformers"]:
    """The kind of engine that `auto` means for an actor with these resources.

    Args:
        engine: the settings.
        section: where they stand in the run's config, for messages.
        resources: what Ray reserves for the actor.

    Raises:
        EngineError: vLLM is asked for and not installed, or transformers is given arguments.
    """
    kind = engine.kind
    if kind == "auto":
        on_gpu = engine.on(resources).startswith("cuda")
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


def require_gpu(engine: EngineConfig, section: str, resources: Resources) -> None:
    """Refuses to run on the CPU what reserved a GPU.

    Raises:
        EngineError: torch sees no GPU; with the versions of the driver and of CUDA.
    """
    if not resources.gpus or engine.device.startswith("cpu"):
        return
    if trouble := gpu_trouble():
        raise EngineError(f"{section}: {resources.gpus:g} GPU is reserved, but {trouble}")


def gpu_trouble() -> str:
    """Why torch cannot compute on a GPU here, with the versions of driver and CUDA; empty if it
    can."""
    import torch

    driver, cuda = driver_version(), torch.version.cuda
    build = f"torch {torch.__version__} is built for " + (
        f"CUDA {cuda}" if cuda else "the CPU only"
    )
    have = f"the NVIDIA driver here is {driver or 'none'} and {build}"
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as error:  # a GPU that is broken, full, or too old for this build
            return f"{have}, and the GPU takes nothing: {str(error).partition(chr(10))[0]}"
        return ""
    oldest = OLDEST_DRIVER.get(int((cuda or "0").partition(".")[0]), 0)
    if not driver:
        return have
    if not cuda:
        return f"{have}: install the build for CUDA (docs/install.md)"
    if int(driver.partition(".")[0]) < oldest:
        return f"{have}, which wants driver {oldest} or newer"
    return f"{have}, yet torch sees no GPU: see nvidia-smi, and CUDA_VISIBLE_DEVICES"


def driver_version() -> str:
    """Of NVIDIA's driver on this machine; empty where there is none."""
    if _DRIVER.exists():
        said = _DRIVER.read_text(encoding="utf-8")
    elif command := shutil.which("nvidia-smi"):  # Windows' driver shows no file to Linux
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, encoding="utf-8").stdout
    else:
        return ""
    match = re.search(r"\d{3,}(\.\d+)+", said)
    return match[0] if match else ""


def load(engine: EngineConfig, model: str, resources: Resources) -> PreTrainedModel:
    """The model of a directory, in evaluation mode, on the device and in the precision that the
    transformers engine is configured for.

    Raises:
        services.models.ModelError: there is no such model.
    """
    return load_model(model, dtype=engine.precision(resources), device=engine.on(resources))
