"""The model that is trained: whole on every rank or sharded over them, all of it or adapters.

The learner sees none of that. It runs forwards, gets gradients that are sums over all ranks, and
full tensors to publish. Whoever runs a forward here does so on all ranks, equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from services.packed import prepare
from services.weights import Manifest, manifest
from trainer import lora
from trainer.config import TrainerConfig


class Student:
    """A causal model with what its training needs.

    Args:
        model: trained in place; the same on all ranks. It may lie on the CPU if it is to be
            sharded: each layer moves to the device by itself.
        device: what computes.
    """

    def __init__(self, model: PreTrainedModel, config: TrainerConfig, device: torch.device) -> None:
        self.model, self.device = prepare(model), device
        self._lora = config.lora
        if config.lora:
            lora.attach(model, config.lora)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers recomputes activations in training mode only. Dropout stays off in both:
        # ρ and the log-ratio compare with models that have none (packed attention refuses it).
        model.train(config.gradient_checkpointing or bool(config.lora and config.lora.dropout))
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = is_sharded(config, self.ranks)
        if self.sharded:
            _shard(model, config, device, self.ranks)
        self._autocast = config.autocast == "bfloat16" and not self.sharded
        # Taken now: between forward and backward the modules hold full tensors in their stead.
        self._parameters = dict(model.named_parameters())
        self.trained = {n: p for n, p in self._parameters.items() if p.requires_grad}

    # ------------------------------------------------------------------ forward and backward

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`function(model, *arguments)` with the parameters whole and in the precision that is
        computed in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            if not self.sharded:
                return function(self.model, *arguments)
            run: Callable[..., Tensor] = self.model.run_sharded  # type: ignore[assignment]
            return run(function, *arguments)

    def rounds(self, mine: int) -> int:
        """How many forwards all must make, when this rank has work for `mine`: a sharded model
        is put together anew in each, so the ranks have to go together."""
        if not self.sharded or self.ranks == 1:
            return mine
        most = torch.tensor(mine, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def sums_at(self, last: bool) -> None:
        """Says before a backward whether it is the step's last: only then do gradients travel."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    def sum_gradients(self) -> None:
        """After the last backward: gradients become their sums over ranks. Replicas do it in one
        flat message (a rank without data adds zeros); shards have done it."""
        if self.sharded or self.ranks == 1:
            return
        parameters = list(self.trained.values())
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
        )
        dist.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)

    def clip_gradients(self, max_norm: float) -> float:
        """Scales gradients down to a norm of `max_norm`; returns the norm that they had."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        return float(_full(norm))

    # ---------------------------------------------------------------------------- publishing

    def manifest(self) -> Manifest:
        """Name, dtype and shape of what `tensors` gives."""
        return manifest(
            (name.replace(".base_layer.", "."), p)
            for name, p in self._parameters.items()
            if ".lora_" not in name
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of each parameter, adapters merged, one at a time."""
        with torch.no_grad():
            if self._lora:
                yield from lora.merged(self._parameters, self._lora, _full)
            else:
                yield from ((name, _full(p)) for name, p in self._parameters.items())

    def adapters(self) -> dict[str, Tensor]:
        """The adapters alone; empty when the whole model is trained."""
        with torch.no_grad():
            return lora.adapters(self._parameters, _full) if self._lora else {}


def is_sharded(config: TrainerConfig, ranks: int) -> bool:
    """Whether the model is to be sharded."""
    return config.offload or (config.parallel == "fsdp" and ranks > 1)


def _shard(model: PreTrainedModel, config: TrainerConfig, device: torch.device, ranks: int) -> None:
    """FSDP2: each layer by itself, and the rest (embedding, last norm, output) as the root.

    The output is used by itself, in chunks, outside the model's own forward. So the forward that
    FSDP puts its hooks around is a method of ours, inside which all of that happens.
    """
    compute = torch.bfloat16 if config.autocast == "bfloat16" else None
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if config.offload
            else OffloadPolicy()
        ),
    }
    layers: Any = model.base_model.layers
    for module in [*layers, model]:
        sharded = fully_shard(module, **settings)
        sharded.set_gradient_divide_factor(1.0)  # every denominator is in the loss: a sum
        sharded.set_force_sum_reduction_for_comms(True)

    def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(model, *arguments)

    model.run_sharded = run  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_sharded")


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every rank calls it in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
