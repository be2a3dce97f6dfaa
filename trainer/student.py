"""The model that is trained: whole on every rank or sharded over them, all of it or adapters.

The learner sees none of that. It runs forwards, gets gradients that are sums over all ranks, and
full tensors to publish. Whoever runs a forward here does so on all ranks, equally often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from services.layouts import proven
from services.packed import Pack, prepare
from services.weights import Manifest, manifest
from trainer import lora
from trainer.config import TrainerConfig

_ROUTER = re.compile(r"(Router|Gating|MoE\w*Gate)$")  # what transformers calls their classes


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
            keeping = {"context_fn": _keeping_attention} if device.type == "cuda" else {}
            model.gradient_checkpointing_enable({"use_reentrant": False, **keeping})
        # transformers recomputes activations in training mode only. Dropout stays off in both:
        # ρ and the log-ratio compare with models that have none (packed attention refuses it).
        model.train(config.gradient_checkpointing or bool(config.lora and config.lora.dropout))
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = is_sharded(config, self.ranks)
        _check_dropout(model)
        if "bfloat16" in (config.autocast, config.dtype):
            for router in routers(model):
                _in_float32(router)
        if self.sharded:
            _shard(model, config, device, self.ranks)
        self._checkpointing = config.gradient_checkpointing
        half = config.autocast == "bfloat16"
        self._autocast = half and not self.sharded
        self.computes_in: torch.dtype = torch.bfloat16 if half else model.dtype  # its products
        # Taken now: between forward and backward the modules hold full tensors in their stead.
        self._parameters = dict(model.named_parameters())
        self.trained = {n: p for n, p in self._parameters.items() if p.requires_grad}

    # ------------------------------------------------------------------ forward and backward

    def forward(self, function: Callable[..., Tensor], pack: Pack, *arguments: Any) -> Tensor:
        """`function(model, pack, *arguments)` with the parameters whole and in the precision that
        is computed in."""
        # No weight is cast twice in a forward, so a cache of the casts would only hold them: all
        # layers' until the end, where checkpointing holds nothing else of a layer.
        kept = not self._checkpointing
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=kept
        ):
            if not self.sharded:
                return function(self.model, pack, *arguments)
            if proven(self.model).layout == "rows":  # which runs the layers once a bucket
                buckets = pack.buckets.filled_up(self.rounds(len(pack.buckets.indices)))
                pack = replace(pack, buckets=buckets)
            run: Callable[..., Tensor] = self.model.run_sharded  # type: ignore[assignment]
            return run(function, pack, *arguments)

    def rounds(self, mine: int) -> int:
        """How often all must run the layers, when this rank has work for `mine` times: a sharded
        model is put together anew each time, so the ranks have to go together."""
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
        """Scales gradients down to a norm of `max_norm`; returns the norm that they had. Those that
        are smaller are only read: scaling by 1 would move all of them twice more."""
        trained = list(self.trained.values())
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        had = float(_full(norm))
        if had > max_norm:
            clip_grads_with_norm_(trained, max_norm, norm)
        return had

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


def _keeping_attention() -> Any:
    """Of a layer that is computed again in the backward pass, all but attention: what it gives is
    small beside what it costs for long answers."""

    def policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        kept = operator.name() == "torch_attn::_varlen_attn"
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _check_dropout(model: PreTrainedModel) -> None:
    """Refuses what the layout `rows` would do wrong in silence, with the model's own attention."""
    family, text = model.config.model_type, model.config.get_text_config()
    rows = proven(model).layout == "rows"
    if rows and model.training and getattr(text, "attention_dropout", None):
        raise ValueError(
            f"{family} models run in rows, with their own attention: gradient checkpointing and "
            "LoRA dropout need attention_dropout 0 in the model's config.json"
        )


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What chooses the experts of each token, in every layer of a mixture of experts."""
    return [
        module
        for name, module in model.named_modules()
        if _ROUTER.search(type(module).__name__) or name.endswith(".router")
    ]


def _in_float32(router: torch.nn.Module) -> None:
    """Lets a router compute in float32 whatever the rest computes in, as it was trained: in 16 bits
    near ties fall to other experts. What it gives has the precision of what it is given."""
    own = router.float().forward

    @wraps(own)
    def forward(hidden: Tensor, *rest: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            given = own(hidden.float(), *rest)
        return _like(given, hidden.dtype)

    router.forward = forward


def _like(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, tuple):
        return tuple(_like(one, dtype) for one in given)
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


def is_sharded(config: TrainerConfig, ranks: int) -> bool:
    """Whether the model is to be sharded."""
    return config.offload or (config.parallel == "fsdp" and ranks > 1)


def _shard(model: PreTrainedModel, config: TrainerConfig, device: torch.device, ranks: int) -> None:
    """FSDP2: each layer by itself, and the rest (embedding, last norm, output) as the root.

    The output is used by itself, in chunks, outside the model's own forward. So the forward that
    FSDP puts its hooks around is a method of ours, inside which all of that happens.
    """
    compute = torch.bfloat16 if config.autocast == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks,)),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if config.offload
            else OffloadPolicy()
        ),
    }
    apart = routers(model) if compute else []  # in the precision of their own
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for module in [*apart, *reversed(layers), model]:
        policy = own if module in apart else precision
        sharded = fully_shard(module, mp_policy=policy, **settings)
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
