"""A GPU is used where it was reserved, and nowhere else."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import ray
import torch

from services import engines
from services.config import EngineConfig, Resources

NO_GPU, ONE_GPU = Resources(), Resources(gpus=0.5)


@ray.remote(num_gpus=0)
class Bystander:
    """An actor that reserved nothing, on a node whose GPUs it can see."""

    def __init__(self) -> None:
        torch.cuda.is_available = lambda: True  # what such a node's torch says

    def decide(self) -> tuple[str | None, str, str]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        kind = engines.choose(EngineConfig(), "rollout.engine", NO_GPU)
        model = engines.load(EngineConfig(), "examples/arithmetic/student", NO_GPU)
        return visible, kind, f"{model.device.type} {model.dtype}"


def decided_on_a_node_with_gpus() -> tuple[str | None, str, str]:
    """What `Bystander` decides, on a Ray of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False)
    try:
        return ray.get(Bystander.remote().decide.remote())
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_an_actor_that_reserved_no_gpu_computes_on_the_cpu() -> None:
    # In a process of its own: this one may be the driver of the session's Ray already.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        visible, kind, where = processes.submit(decided_on_a_node_with_gpus).result()
    assert visible == "0,1"  # Ray hides them not
    assert (kind, where) == ("transformers", "cpu torch.float32")


def test_auto_is_vllm_where_a_gpu_is_reserved() -> None:
    assert engines.choose(EngineConfig(), "rollout.engine", ONE_GPU) == "vllm"
    assert engines.choose(EngineConfig(device="cpu"), "teacher.engine", ONE_GPU) == "transformers"


def test_a_reserved_gpu_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(engines.EngineError, match=r"0\.5 GPU is reserved, but the NVIDIA driver"):
        engines.require_gpu(EngineConfig(), "teacher.engine", ONE_GPU)
    engines.require_gpu(EngineConfig(), "teacher.engine", NO_GPU)
    engines.require_gpu(EngineConfig(device="cpu"), "teacher.engine", ONE_GPU)
