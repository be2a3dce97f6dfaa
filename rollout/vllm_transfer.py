"""How new weights reach vLLM's worker processes where the learner shares no NCCL with them.

    VLLMEngine ── flat buffer ──▶ file in shared memory ── mapped, not copied ──▶ every worker
        └───────── path and manifest, over vLLM's weight-transfer API ────────────────┘

vLLM's worker imports this module because `WorkerExtension` is named in the engine arguments;
importing it registers the transfer engine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from services.weights import Weights

BACKEND = "scope_shared_memory"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing needs to be agreed on beforehand."""


@dataclass
class MappedWeights(WeightTransferUpdateInfo):
    """Where the workers find one version: `services.weights.Weights` with its buffer in a file."""

    path: str
    version: int
    manifest: list[list[Any]]  # (name, torch dtype, shape) in the buffer's order


@contextmanager
def shared(weights: Weights) -> Iterator[dict[str, Any]]:
    """Puts the buffer where every process of this node can map it, and yields the fields of
    `MappedWeights`. The file is gone afterwards: finish the update inside of the block."""
    directory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.NamedTemporaryFile(prefix="scope-weights-", dir=directory) as file:
        weights.buffer.tofile(file)
        file.flush()
        manifest = [[name, dtype, list(shape)] for name, dtype, shape in weights.manifest]
        yield {"path": file.name, "version": weights.version, "manifest": manifest}


class SharedMemoryTransfer(WeightTransferEngine[NoInit, MappedWeights]):
    """Loads checkpoint-format weights from a mapped file, in place, on a CPU or a GPU."""

    init_info_cls = NoInit
    update_info_cls = MappedWeights

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Lets each layer take its weights in checkpoint format again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: MappedWeights) -> None:
        """Loads all parameters of the model. Layers whose vocabulary is padded read the mapping
        only when the update is finished."""
        manifest = tuple((name, dtype, tuple(shape)) for name, dtype, shape in update_info.manifest)
        buffer = np.memmap(update_info.path, dtype=np.uint8, mode="r")
        weights = Weights(update_info.version, manifest, buffer, (), ())
        self.model.load_weights(weights.tensors())

    def finish_weight_update(self) -> None:
        """Moves the loaded weights to where the kernels read them."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_vocabulary(self.model)

    def shutdown(self) -> None:
        """Holds nothing between updates."""


def repack_vocabulary(model: torch.nn.Module) -> None:
    """Makes the CPU's packed copies of the vocabulary matrices anew.

    On a CPU vLLM multiplies by copies in the kernels' own layout, made when the model is loaded.
    Reloading refreshes those of every linear layer, but an output matrix, tied or not, keeps
    multiplying by the old one."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Named in the engine arguments so that each of vLLM's workers imports this module."""


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
