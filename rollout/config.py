"""Settings of the data, the sampling and the rollout workers. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from services.config import Config, EngineConfig, Resources


class DataConfig(Config):
    """Prompts in verl's columns (`prompt`, `data_source`, `reward_model.ground_truth`)."""

    path: Path | tuple[Path, ...]
    """A `.parquet` or `.jsonl` file, or a list of them, read one after the other."""
    max_prompt_tokens: int = Field(ge=1)
    """A longer prompt, chat template included, is left out and counted."""
    shuffle: bool = True
    """Another order in each epoch, the same one for the same seed; False keeps the file's."""
    epochs: int = Field(default=1, ge=1)

    @property
    def files(self) -> tuple[Path, ...]:
        """`path` as a list, in the order in which it is read."""
        return (self.path,) if isinstance(self.path, Path) else self.path

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, path: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        if path == ():
            raise ValueError("name at least one file")
        return path


class SamplingConfig(Config):
    """How a group of trajectories is sampled from the student."""

    n: int = Field(default=8, ge=1)
    """Trajectories of each prompt (N in the paper)."""
    max_tokens: int = Field(ge=1)
    """Longest completion, end token included; a longer one is cut off and counts as truncated."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = 1.0
    """Only 1.0, which is off."""

    @field_validator("top_p")
    @classmethod
    def _top_p_is_off(cls, top_p: float) -> float:
        if top_p != 1.0:
            raise ValueError(
                "must be 1.0, because the importance ratio needs the log-probs of the "
                "distribution that was sampled from, and engines return them without top-p"
            )
        return top_p


class SamplingEngineConfig(EngineConfig):
    """What samples from the student."""

    logprobs_mode: Literal["processed_logprobs"] = "processed_logprobs"
    """Which log-probs come with the tokens, in vLLM's words: those of the distribution that was
    sampled from, temperature applied. Nothing else, because the importance ratio needs them."""
    weight_transfer: Literal["auto", "store", "nccl", "ipc"] = "auto"
    """How new weights reach vLLM. `store`: through the Ray object store, read once by each node;
    works everywhere. `nccl`: from the learner's GPU to those of each engine. `ipc`: where learner
    and engine share one GPU. `auto` is `store`: the others have not been run on GPUs yet."""
    in_flight: Literal["wait", "keep"] = "wait"
    """What becomes of groups in flight when new weights come in. `wait`: they are finished first,
    so that all tokens of a group come from one version. `keep` (vLLM only): they go on under the
    new weights, and every token's version is recorded; no long answer holds up an update."""


class RolloutConfig(Config):
    """The workers that sample: each has an engine with its own copy of the student."""

    workers: int = Field(default=1, ge=1)
    resources: Resources = Resources()
    """What each worker reserves."""
    engine: SamplingEngineConfig = SamplingEngineConfig()
    capacity: int = Field(default=32, ge=1)
    """Prompts in flight in one worker, those that wait for the next batch included."""
    batch_sequences: int = Field(default=256, ge=1)
    """Most trajectories that the transformers engine samples at once. A group is never split: a
    larger `sampling.n` goes alone."""
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a worker; None leaves it to torch."""
    probe_tolerance: float = Field(default=1e-3, gt=0)
    """Largest difference in nats between the engine's and the learner's log-probs of the probe.
    The default suits float32; bfloat16 needs some tenths."""
    weights_timeout_s: float = Field(default=1800.0, gt=0)
    """How long the learner's first weights are waited for, its own start included."""
