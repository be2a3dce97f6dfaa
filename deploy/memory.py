"""The GPU memory that each role needs, from its model's config.json and the run's settings.

    learner         weights, gradients, AdamW's moments, and what one micro-batch leaves beside them
    vLLM            weights and the cache of one sequence, in the share of the GPU that it takes
    transformers    weights and the cache of one group (sampling), or one batch's states (scoring)

In bfloat16, the learner's formula agrees within a tenth with what tests/gpu_emulation counts.
CUDA's own share is assumed. A role is refused what is more than its part of the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from transformers import AutoConfig

from deploy.config import RunConfig, called
from services.config import EngineConfig, Resources
from services.models import locate, parameter_shapes
from services.output_layer import CHUNK_BYTES
from teacher.config import TeacherConfig
from trainer.config import TrainerConfig
from trainer.student import is_sharded

_VLLM = 3e9  # CUDA, its graphs, the sampler's logits, activations of the largest step; assumed
_CUDA = 0.6e9  # context, libraries and their workspace in one process; assumed
_SUMMED = 4  # FSDP2 adds gradients up in float32 (reduce_dtype), whatever they are computed in
_PACKING = 2.0 * 2**30  # vLLM's two buffers for tensors on their way by nccl or ipc
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
# GB of the accelerators that Ray tells apart; of several sizes the largest.
_ACCELERATORS = {
    "T4": 16, "V100": 32, "A10G": 24, "L4": 24, "L40S": 48, "A100": 80, "A100-40G": 40,
    "A100-80G": 80, "H100": 80, "H20": 96, "H200": 141, "B200": 192,
}  # fmt: skip

Parts = Mapping[str, float]


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory, in numbers of elements."""

    parameters: int
    output: int
    """Of the matrix of the output layer: vocabulary × `hidden`."""
    lora: int
    """Of adapters of rank 1 on every matrix of the layers."""
    cached: int
    """Keys and values of one token, in all layers."""
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward that one token goes through."""
    heads: int
    context: int
    """Most tokens of a sequence; 0 where the model does not say."""

    @classmethod
    @functools.cache
    def of(cls, model: str) -> Shape:
        """Of a model's directory or hub name; reads no weights.

        Raises:
            services.models.ModelError: there is no such model.
        """
        config: Any = AutoConfig.from_pretrained(locate(model)).get_text_config()
        shapes = parameter_shapes(model)
        hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
        head = getattr(config, "head_dim", None) or hidden // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        if experts := getattr(config, "num_experts_per_tok", None):
            inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
        matrices = [s for s in shapes.values() if len(s) == 2 and s[0] != config.vocab_size]
        return cls(
            parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
            output=config.vocab_size * hidden,
            lora=sum(map(sum, matrices)),
            cached=2 * config.num_hidden_layers * keys * head,
            layers=config.num_hidden_layers,
            hidden=hidden,
            inner=inner,
            heads=heads,
            context=getattr(config, "max_position_embeddings", None) or 0,
        )


def learner(shape: Shape, trainer: TrainerConfig, longest: int) -> Parts:
    """Bytes on the GPU of one rank at their most: in a micro-batch that finds gradients and
    moments there.

    Args:
        shape: the student's.
        trainer: the settings.
        longest: tokens of the longest sequence, which is computed in one piece.
    """
    size = _BYTES[trainer.dtype]
    trained = shape.parameters if trainer.lora is None else trainer.lora.rank * shape.lora
    sharded = is_sharded(trainer, trainer.ranks)
    share = 0.0 if trainer.offload else size / (trainer.ranks if sharded else 1)
    most, unsharded = _activations(shape, trainer, longest), 0.0
    if sharded:  # gradients until they travel; the two ends of the model and two layers gathered
        compute = 2 if "bfloat16" in (trainer.dtype, trainer.autocast) else size
        layer = (shape.parameters - shape.output) / shape.layers
        unsharded = _SUMMED * trained + compute * (2 * shape.output + 2 * layer)
    elif trainer.ranks > 1:
        most = max(most, size * trained)  # all gradients in one message
    moments = 2 * share * trained
    if trainer.optimizer.offload:  # those of the largest matrix, while it is changed
        most, moments = max(most, 2 * size * min(trained, shape.output)), 0.0
    return {
        "weights": share * (shape.parameters + (trained if trainer.lora else 0)),
        "gradients": share * trained,
        "optimizer": moments,
        "unsharded": unsharded,
        "activations": most,
        "CUDA": _CUDA,
    }


def _activations(shape: Shape, trainer: TrainerConfig, longest: int) -> float:
    """Bytes that one micro-batch leaves for its backward pass, and of the largest step beside.

    The factors are those of Llama's kind of layer with the fused kernels, counted: two tensors of
    the feed-forward's width in bfloat16, and 20 bytes (14, all in bfloat16) for each of `hidden`.
    """
    size, tokens = _BYTES[trainer.dtype], max(trainer.micro_batch_tokens, longest)
    half = "bfloat16" in (trainer.dtype, trainer.autocast)
    mixed = half and size == 4
    wide, narrow = (4, 20 if mixed else 14) if half else (16, 48)
    layer = tokens * (wide * shape.inner + narrow * shape.hidden)
    kept = size * tokens * shape.hidden if trainer.gradient_checkpointing else layer
    pairs = 0 if half else 4 * shape.heads * longest**2  # no kernel for float32 does without
    # Autocast keeps what it has cast for the backward pass, where that does not cast again.
    sharded = is_sharded(trainer, trainer.ranks)
    cast = 2 * (shape.parameters - shape.output) if mixed and not sharded else 0
    states, logits = tokens * shape.hidden, CHUNK_BYTES["cuda"] / 2
    output = logits + 47 * states + 2 * mixed * shape.output  # what is cast of the matrix
    if trainer.lora is None:
        output += 6 * shape.output  # its gradient, as computed and as summed
    if trainer.gradient_checkpointing:
        return shape.layers * kept + 3 * pairs + max(output, 2 * layer)
    return shape.layers * (kept + pairs) + 2 * pairs + cast + output


@dataclass(frozen=True)
class Need:
    """Of one role on one GPU, in bytes."""

    who: str
    parts: Parts
    has: float | None
    """None where nobody knows how large the GPU is."""
    knobs: str
    """What to change when that is too little."""

    @property
    def fits(self) -> bool:
        """Whether it can be had; True where nobody knows."""
        return self.has is None or sum(self.parts.values()) <= self.has

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {b / 1e9:.1f}" for name, b in self.parts.items() if b >= 5e7)
        said = f"{self.who}: needs {sum(self.parts.values()) / 1e9:.1f} GB of a GPU ({parts})"
        if self.has is not None:
            said += f", has {self.has / 1e9:.1f} GB"
        return said if self.fits else f"{said}: {self.knobs}"


def needs(config: RunConfig, teachers: Mapping[str, TeacherConfig]) -> Iterator[Need]:
    """Of each role that reserves GPUs: learner, sampler, and these teachers if served here.

    Raises:
        services.models.ModelError: a model's config.json cannot be read.
    """
    trainer, rollout, longest = config.trainer, config.rollout, config.longest
    if trainer.resources.gpus:
        shape, has = Shape.of(config.student), _has(config, trainer)
        parts, sending = learner(shape, trainer, longest), _sending(config, shape)
        yield Need("learner", {**parts, **sending}, has, _learner_knobs(config, has))
    if rollout.resources.gpus:
        work = Work(config.longest_sampled, longest * config.sampling.n, config.sampling.n)
        yield _engine(config, "rollout", config.student, rollout.engine, rollout.resources, work)
    for name, one in teachers.items():
        if one.resources.gpus and not one.endpoints:
            read = max(one.batch_tokens, one.max_sequence_tokens or longest)
            who = called(name).replace(" ", "s.")
            context = Shape.of(one.model).context
            work = Work((one.max_sequence_tokens or context or longest) + 1, 0, read)
            yield _engine(config, who, one.model, one.engine, one.resources, work)


@dataclass(frozen=True)
class Work:
    """What an engine does."""

    longest: int
    """Tokens of the longest sequence that it takes: vLLM wants room for one in its cache."""
    cached: int
    """Tokens in the cache of transformers at once."""
    rows: int
    """Rows whose states are there at once, in transformers."""


def _sending(config: RunConfig, shape: Shape) -> Parts:
    """Versions on the way to engines that take them from the learner's GPU, the newest and the one
    before, and what vLLM packs their tensors into."""
    engine = config.rollout.engine
    if engine.weight_transfer not in ("nccl", "ipc"):
        return {}
    return {"weights being sent": 2.0 * _BYTES[engine.dtype] * shape.parameters + _PACKING}


def _engine(
    config: RunConfig,
    section: str,
    model: str,
    engine: EngineConfig,
    resources: Resources,
    work: Work,
) -> Need:
    shape, size = Shape.of(model), _BYTES[engine.dtype]
    gpu = _gpu(config, resources)
    parts = {"weights": float(size * shape.parameters / engine.gpus)}
    if engine.kind == "transformers" or engine.device.startswith("cpu"):
        states = size * work.rows * (3 * shape.inner + 6 * shape.hidden)
        parts |= {"cache": float(size * work.cached * shape.cached), "states": float(states)}
        parts |= {"logits": float(CHUNK_BYTES["cuda"]), "CUDA": _CUDA}
        has = gpu and gpu * min(1.0, resources.gpus)
    else:
        token = size * shape.cached / engine.gpus
        given = engine.args.get("max_model_len")
        longest = given if isinstance(given, int) and given > 0 else work.longest
        parts |= {"cache of one sequence": token * longest, "vLLM": _VLLM}
        has = gpu and gpu * engine.gpu_share(resources)
        least = sum(parts.values()) - token * (longest - config.longest)
        if has is not None and least <= has < sum(parts.values()):
            return Need(section, parts, has, _shorter(section, engine, longest, config.longest))
    more = (
        f"raise {section}.resources.gpus"
        if resources.gpus < 1
        else f"spread it over more GPUs ({section}.engine.args.tensor_parallel_size)"
    )
    return Need(section, parts, has, f"{more}, or take a smaller model")


def _shorter(section: str, engine: EngineConfig, longest: int, enough: int) -> str:
    """What to change where the cache of a sequence of `longest` tokens is all that is too much."""
    if "max_model_len" in engine.args:
        knob = f"{section}.engine.args.max_model_len"
    else:
        evaluating = "evaluation.sampling.max_tokens"
        knob = evaluating if section == "rollout" else f"{section}.max_sequence_tokens"
    return (
        f"vLLM wants room for a sequence of {longest} tokens: lower {knob}; those that are trained "
        f"on have at most {enough}"
    )


def _has(config: RunConfig, trainer: TrainerConfig) -> float | None:
    """Bytes of a GPU that are one rank's."""
    gpu = _gpu(config, trainer.resources)
    return gpu and gpu * min(1.0, trainer.resources.gpus)


def _gpu(config: RunConfig, resources: Resources) -> float | None:
    """Bytes of the GPU that a role gets, where config, Ray's accelerator type or this machine's
    own GPU tell."""
    if config.ray.gpu_memory_gb is not None:
        return config.ray.gpu_memory_gb * 1e9
    for name in resources.custom:
        if (size := _ACCELERATORS.get(name.removeprefix("accelerator_type:"))) is not None:
            return size * 1e9
    if config.ray.address is None and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _learner_knobs(config: RunConfig, has: float | None) -> str:
    """The first settings with which the learner would fit."""
    if has is None:
        return ""
    trainer, longest, shape = config.trainer, config.longest, Shape.of(config.student)
    sending = sum(_sending(config, shape).values())

    def needed(**change: Any) -> float:
        changed = trainer.model_copy(update=change)
        return sending + sum(learner(shape, changed, longest).values())

    checkpointing: dict[str, Any] = {"gradient_checkpointing": True}
    shorter: dict[str, Any] = {}
    if trainer.micro_batch_tokens > longest:
        shorter = {"micro_batch_tokens": longest}
    for change in filter(None, (shorter, checkpointing, {**checkpointing, **shorter})):
        if needed(**change) <= has:
            return "set " + " and ".join(f"trainer.{k} to {v}".lower() for k, v in change.items())
    part = ceil(100 * needed() / has * min(1.0, trainer.resources.gpus)) / 100
    if trainer.resources.gpus < part <= 1:
        return f"raise trainer.resources.gpus to {part:g}"
    if not is_sharded(trainer, trainer.ranks):
        offloaded = trainer.optimizer.model_copy(update={"offload": True})
        if needed(**checkpointing, **shorter, optimizer=offloaded) <= has:
            return (
                "set trainer.optimizer.offload to true, with gradient_checkpointing and short "
                "micro-batches"
            )
    if needed(**checkpointing, **shorter, offload=True) <= has:
        return "set trainer.offload to true, with gradient_checkpointing and short micro-batches"
    return "add ranks (trainer.ranks, with parallel: fsdp), or train adapters (trainer.lora)"
