"""How new weights reach vLLM's worker processes where the learner shares no NCCL with them.

    VLLMEngine ── flat buffer ──▶ file in shared memory ── mapped, not copied ──▶ every worker
        │                   written once a node, before anything pauses                 ▲
        └───────── path and manifest, over vLLM's weight-transfer API ──────────────────┘

vLLM's worker imports this module because `WorkerExtension` is named in the engine arguments;
importing it registers the transfer engine.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from services.weights import Weights

BACKENDS = {"store": "scope_shared_memory", "nccl": "scope_nccl", "ipc": "scope_ipc"}
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "scope-weights-"


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
def shared(weights: Weights, directory: Path | None = None) -> Iterator[dict[str, Any]]:
    """Puts the buffer where every process of this node can map it, and yields the fields of
    `MappedWeights`. Engines of one node that load the same weights share a file, which the first
    writes and the last removes: finish the update inside of the block, which does not hold on to
    `weights`."""
    usable = os.access(_SHARED_MEMORY, os.W_OK)
    directory = directory or (_SHARED_MEMORY if usable else Path(tempfile.gettempdir()))
    path = directory / f"{_PREFIX}{weights.serial}"
    manifest = [[name, dtype, list(shape)] for name, dtype, shape in weights.manifest]
    update = {"path": str(path), "version": weights.version, "manifest": manifest}
    file = _written(path, weights.buffer)
    del weights  # or the object store could not give up this version while the block runs
    try:
        yield update
    finally:
        os.close(file)
        _sweep(directory)


def _written(path: Path, buffer: npt.NDArray[np.uint8]) -> int:
    """A descriptor of the file with `buffer` in it. Its lock is shared by all who use the file,
    and ends with their processes, however these end."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with suppress(BlockingIOError):  # somebody writes or uses it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_size != buffer.nbytes:  # new, or its writer was killed
                os.ftruncate(file, 0)
                with open(file, "wb", closefd=False) as stream:
                    stream.write(buffer.data)
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for a writer
        if os.fstat(file).st_nlink and os.fstat(file).st_size == buffer.nbytes:
            return file
        os.close(file)  # removed in between, or its writer was killed just now


def _sweep(directory: Path) -> None:
    """Removes the files of this kind that no process uses: our own, or those of killed ones."""
    for path in directory.glob(f"{_PREFIX}*"):
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # removed meanwhile, or another user's
            continue
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(file)


class DirectWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what a model writes into its parameters by itself, past their `weight_loader`s, as
    gpt-oss does with its experts and sinks: vLLM 0.32 holds a model that takes new weights on the
    meta device, where such a write is lost, and would put the old tensors back.

    Args:
        model: one whose layers take their weights in checkpoint format now.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = {
            _storage(tensor): (layer, name, tensor)  # held, so that no other gets its storage
            for layer in model.modules()
            for name, tensor in layer.named_parameters(recurse=False)
            if tensor.is_meta
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operation while weights are loaded."""
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            self._keep(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _keep(self, part: torch.Tensor, values: torch.Tensor) -> None:
        """Does for a layer what its loaders do, and puts it in place when it is complete."""
        layer, name, _ = self._owners.get(_storage(part), (None, "", None))
        if layer is None or values.is_meta:
            return
        info = get_layerwise_info(layer)
        if not info.can_load() or any(name == loaded for loaded, _ in info.loaded_weights):
            return  # a loader's trial, after it took note
        materialize_layer(layer, info)
        whole = getattr(layer, name).data
        whole.as_strided(part.size(), part.stride(), part.storage_offset()).copy_(values)
        info.load_numel += part.numel()
        if info.load_numel >= (info.load_numel_total or 0):
            _layerwise_process(layer, info)


def _storage(tensor: torch.Tensor) -> int:
    """Tells the memory of tensors on the meta device apart, which has no addresses."""
    return int(tensor.untyped_storage()._cdata)


class _KeepingDirectWrites:
    """What a transfer engine of vLLM's receives with."""

    model: torch.nn.Module

    def receive_weights(self, update_info: Any) -> None:
        """See `DirectWrites`."""
        with DirectWrites(self.model):
            super().receive_weights(update_info)  # type: ignore[misc]


class NCCLTransfer(_KeepingDirectWrites, NCCLWeightTransferEngine):
    """vLLM's own, from GPU to GPU."""


class IPCTransfer(_KeepingDirectWrites, IPCWeightTransferEngine):
    """vLLM's own, within a GPU."""


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
        # Copied where it is written to: all but the first of several ranks of gpt-oss zero biases.
        buffer = np.memmap(update_info.path, dtype=np.uint8, mode="c")
        weights = Weights(update_info.version, manifest, buffer, (), ())
        with DirectWrites(self.model):
            self.model.load_weights(weights.tensors())

    def finish_weight_update(self) -> None:
        """Moves the loaded weights to where the kernels read them."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_vocabulary(self.model)
            repack_experts(self.model)

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


def repack_experts(model: torch.nn.Module) -> None:
    """Puts experts' new weights into the layout of the CPU's kernels, which vLLM 0.32 does when a
    model is loaded and leaves out when it is reloaded: the kernels would read them as packed."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)


class WorkerExtension:
    """Named in the engine arguments so that each of vLLM's workers imports this module."""


for _name, _engine in (
    ("store", SharedMemoryTransfer), ("nccl", NCCLTransfer), ("ipc", IPCTransfer),
):  # fmt: skip
    WeightTransferEngineFactory.register_engine(BACKENDS[_name], _engine)
