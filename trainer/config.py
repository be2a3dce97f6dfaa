"""Settings of the learner. Imports pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from services.config import Config, Resources
from trainer.objectives.config import ObjectiveConfig, ScopeConfig


class OptimizerConfig(Config):
    """AdamW with warm-up and gradient clipping."""

    lr: float = Field(default=5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0)
    offload: bool = False
    """The moments lie in host memory, and visit the device in each step, one parameter's at a time.
    For one rank and for `ddp`; where parameters are sharded, `trainer.offload` takes all there."""


class CheckpointConfig(Config):
    """When checkpoints are written. Scored groups stay in Redis until one contains them."""

    every_steps: int = Field(default=20, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of every so many steps are kept for good, with the student as a Hugging Face
    directory; a multiple of `every_steps`."""
    storage: str | None = None
    """A directory that all nodes share, or a URL (s3://, gs://, file://, …), in which the run gets
    a directory of its own; None keeps checkpoints in the run directory."""

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> CheckpointConfig:
        if self.keep_every and self.keep_every % self.every_steps:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of every_steps "
                f"({self.every_steps})"
            )
        return self


class LoraConfig(Config):
    """Low-rank adapters: only they are trained; rollout sees them merged."""

    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get adapters; never the output or the embedding."""


class TrainerConfig(Config):
    """The learner: one Ray Train worker group."""

    objective: SerializeAsAny[ObjectiveConfig] = ScopeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ranks: int = Field(default=1, ge=1)
    resources: Resources = Resources()
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a rank; None leaves it to torch."""
    groups_per_step: int = Field(default=256, ge=1)
    """Prompts in one gradient step (the global batch)."""
    max_staleness: int = Field(default=1, ge=0)
    """How many versions older than the weights that learn from it those may be that sampled a
    token. 0 is fully synchronous."""
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the run early; None trains every prompt of every epoch."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Prompt and completion tokens in one forward; a longer sequence goes alone."""
    logp_difference_warning: float = Field(default=0.1, gt=0)
    """Nats by which the log-probs of rollout and learner may differ, as a mean over a step's
    tokens, before a warning is logged."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the master weights."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision that is computed in."""
    gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass instead of being kept."""
    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """Of several ranks: each holds a part of model and optimizer (FSDP2), or all of it."""
    offload: bool = False
    """Parameters, gradients and optimizer live in host memory and visit the device (FSDP2)."""
    lora: LoraConfig | None = None
    """Trains adapters only; None trains the whole student."""
    stall_timeout_s: float = Field(default=1800.0, gt=0)
    """No gradient step for this long, once the first prompt was fed, stops the run, naming the
    slowest stage."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray Train restarts the learner from its last checkpoint."""

    @model_validator(mode="after")
    def _moments_are_where_they_can_be(self) -> TrainerConfig:
        if self.optimizer.offload and (
            self.offload or (self.parallel == "fsdp" and self.ranks > 1)
        ):
            raise ValueError(
                "optimizer.offload is for one rank or parallel: ddp; of shards, offload takes the "
                "moments to the host as well"
            )
        return self
