"""The seam between the teacher's server and what computes log-probs, and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

from services.models import fingerprint, load_model
from teacher.api import Limits, ModelCard
from teacher.config import EngineConfig, TeacherConfig


class Scorer(Protocol):
    """Log-probs of given tokens under one model."""

    async def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[list[float]]:
        """For each sequence, log-probs (nats, temperature 1) of its tokens from its start on.

        Args:
            sequences: token ids, prompt and completion together.
            starts: where each completion starts; at least 1, at most the sequence's length.

        Raises:
            ScoringError: the model gave no valid log-probs.
        """
        ...


class ScoringError(RuntimeError):
    """The model computed something that is no log-prob."""


class EngineError(ValueError):
    """The configured engine cannot be had; the message says what to change."""


def build_scorer(config: TeacherConfig) -> Scorer:
    """Loads the teacher with the configured engine. Takes as long as reading its weights.

    Raises:
        EngineError: the engine is not available.
        services.models.ModelError: the model is not.
    """
    engine = config.engine
    if _kind(engine) == "vllm":
        return _build_vllm(config)
    if engine.args:
        raise EngineError(
            f"the transformers engine takes no arguments, got {', '.join(sorted(engine.args))}"
        )
    from teacher.packed_scorer import PackedScorer

    device = ("cuda" if _has_gpu() else "cpu") if engine.device == "auto" else engine.device
    dtype = engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    model = load_model(config.model, dtype=dtype, device=device)
    return PackedScorer(model, batch_tokens=config.batch_tokens)


def _build_vllm(config: TeacherConfig) -> Scorer:
    if not find_spec("vllm"):
        raise EngineError(
            "teacher.engine.kind is 'vllm', and vLLM is not installed: install the extra 'vllm' "
            "(GPU) or run make install (CPU), or set teacher.engine.kind to 'transformers'"
        )
    from services.vllm_core import VLLMError
    from teacher.vllm_scorer import VLLMScorer

    try:
        return VLLMScorer(config, model_card(config).limits.max_sequence_tokens)
    except VLLMError as error:
        raise EngineError(f"teacher: {error}") from error


def model_card(config: TeacherConfig) -> ModelCard:
    """What the server tells about its model, read from the model's directory.

    Raises:
        EngineError: the limits do not fit the model.
        services.models.ModelError: the directory is no model.
    """
    found = fingerprint(config.model)
    limit = config.max_sequence_tokens or found.context_length
    if not limit:
        raise EngineError(
            f"{config.model} names no context length: set teacher.max_sequence_tokens"
        )
    if found.context_length and limit > found.context_length:
        raise EngineError(
            f"teacher.max_sequence_tokens is {limit}, past the context of {config.model} "
            f"({found.context_length} tokens)"
        )
    return ModelCard(
        id=config.model,
        fingerprint=found.model,
        context_length=found.context_length or limit,
        limits=Limits(max_sequence_tokens=limit, vocab_size=found.vocab_size),
    )


def _kind(engine: EngineConfig) -> str:
    if engine.kind != "auto":
        return engine.kind
    on_gpu = _has_gpu() and not engine.device.startswith("cpu")
    return "vllm" if on_gpu and find_spec("vllm") else "transformers"


def _has_gpu() -> bool:
    import torch  # here, so that the client's side never loads it

    return torch.cuda.is_available()
