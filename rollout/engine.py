"""The seam between the rollout worker and what samples from the student, and how one is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rollout.config import RolloutConfig
from rollout.pace import Pace
from services import engines
from services.engines import EngineError
from services.errors import BadItem
from services.models import end_tokens
from services.trajectory import Finish, LogProbs, Sampling, TokenIds
from services.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion, end token included. `logprobs` are under the distribution that
    sampled it (temperature applied), in nats."""

    token_ids: TokenIds  # [T]
    logprobs: LogProbs  # [T]
    finish: Finish
    version_runs: tuple[tuple[int, int], ...] = ()  # see services.trajectory.Trajectory
    top: TokenIds | None = None  # [T, k] the most likely tokens, where the sampling asks for them


@dataclass(frozen=True, slots=True)
class Sampled:
    """A group's completions, and the oldest version of the weights that sampled their tokens."""

    completions: tuple[Completion, ...]
    weight_version: int


class Engine(Protocol):
    """Samples from the student. Calls may be concurrent."""

    @property
    def pace(self) -> Pace | None:
        """What its decoding costs; None where the engine does not tell."""
        ...

    async def sample(self, prompt_ids: Sequence[int], sampling: Sampling) -> Sampled:
        """`sampling.n` completions of a prompt; the same ones for the same seed and weights.
        Every token that is returned was sampled from weights that passed the probe.

        Raises:
            services.errors.BadItem: this can never be sampled.
            services.errors.Unavailable: no weights that passed the probe are loaded.
            SamplingError: the model computes no probabilities.
            EngineDied: the engine has lost its processes.
        """
        ...

    async def load_weights(self, weights: Weights) -> None:
        """Changes to `weights`, between two groups or, where the engine is told to, between two
        tokens. The probe is checked in the same step, so that no token of weights that are not
        the learner's is ever returned: after a failure the engine samples nothing until weights
        pass.

        Raises:
            services.weights.WeightsMismatch: these are not this model's weights, or they came out
                as others.
            EngineDied: the engine has lost its processes.
        """
        ...

    async def close(self) -> None:
        """Frees what the engine holds."""
        ...


class SamplingError(RuntimeError):
    """The model computed something that cannot be sampled from."""


def build_engine(config: RolloutConfig, model_path: str, longest: int | None = None) -> Engine:
    """Loads the student with the configured engine. Takes as long as reading its weights.

    Args:
        config: its engine and its limits.
        model_path: the student's directory.
        longest: tokens of the longest prompt and answer that will be asked for; None: the model's
            whole context.

    Raises:
        services.engines.EngineError: the engine is not available.
        services.models.ModelError: the model is not.
    """
    engines.require_gpu(config.engine, "rollout.engine", config.resources)
    if _choose(config) == "vllm":
        from rollout.vllm_engine import VLLMEngine

        return VLLMEngine(config, model_path, longest)
    from rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        engines.load(config.engine, model_path, config.resources),
        end_tokens(model_path),
        batch_sequences=config.batch_sequences,
        probe_tolerance=config.probe_tolerance,
    )


def check_engine(config: RolloutConfig, model_path: str, longest: int | None = None) -> None:
    """Refuses what `build_engine` would, as far as that can be told without loading anything:
    vLLM's arguments are checked by vLLM, where it is installed.

    Raises:
        services.engines.EngineError: see `build_engine`.
        services.models.ModelError: there is no such model.
    """
    if engines.vllm_can_check(config.engine):
        from rollout.vllm_engine import check

        check(config, model_path, longest)
    elif config.engine.kind == "transformers":
        _choose(config)


def _choose(config: RolloutConfig) -> Literal["vllm", "transformers"]:
    kind = engines.choose(config.engine, "rollout.engine", config.resources)
    if kind == "transformers" and config.engine.in_flight == "keep":
        raise EngineError(
            "rollout.engine.in_flight: the transformers engine always finishes what is in flight; "
            "'keep' needs rollout.engine.kind 'vllm'"
        )
    if kind == "transformers" and config.engine.weight_transfer in ("nccl", "ipc"):
        raise EngineError(
            f"rollout.engine.weight_transfer: {config.engine.weight_transfer!r} needs "
            "rollout.engine.kind 'vllm'"
        )
    return kind


def check_request(prompt_ids: Sequence[int], sampling: Sampling, *, vocab_size: int) -> None:
    """Refuses what no engine can sample, before it joins a batch and breaks that of others.

    Raises:
        services.errors.BadItem: it says what is wrong.
    """
    if not len(prompt_ids):
        raise BadItem("an empty prompt cannot be sampled from")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise BadItem(f"the prompt has token ids outside of the vocabulary of {vocab_size}")
    if sampling.n < 1 or sampling.max_tokens < 1:
        raise BadItem(f"nothing to sample: n={sampling.n}, max_tokens={sampling.max_tokens}")
    if not 0 < sampling.temperature < math.inf:
        raise BadItem(f"temperature must be positive and finite, not {sampling.temperature}")
    if not 0 <= sampling.top <= vocab_size:
        raise BadItem(f"{sampling.top} most likely tokens of a vocabulary of {vocab_size}")
    if sampling.top_p != 1.0:
        raise BadItem(f"top_p is {sampling.top_p}, but training needs log-probs without top-p")
