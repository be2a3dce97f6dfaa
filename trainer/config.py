"""Settings of the learner. Imports pydantic only."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from services.config import Config, Resources

OBJECTIVES = ("scope", "opd", "grpo", "rft", "kdrl", "kd")


class ObjectiveConfig(Config):
    """What is learned from a scored group. Names follow the authors' README; the defaults
    follow the paper."""

    kind: str = "scope"
    """One of `OBJECTIVES`, or "package.module:name" of your own (docs/objectives.md)."""
    tau: float = Field(default=1.0, gt=0)
    """Temperature of both paths' weights: small sharpens, large flattens."""
    use_dual_path_weighting: bool = True
    """False: no routing by correctness; every trajectory takes the teacher path."""
    use_seq_weights: bool = True
    """False: uniform weights in both paths."""
    use_student_path_weights: bool = True
    use_teacher_path_weights: bool = True
    student_path_ppl_positive: bool = True
    """True: a correct trajectory that surprises the student weighs more."""
    teacher_path_ppl_positive: bool = False
    """False: an incorrect trajectory that surprises the teacher weighs less."""
    normalization: Literal["paper", "released"] = "paper"
    """Weights of a path sum to 1 (paper) or have mean 1 (the authors' released code)."""
    kl_coef: float = Field(default=1.0, gt=0)
    """Of kdrl: the weight of the reverse KL beside the group-normalised reward."""
    log_ratio_bound: float | None = Field(default=None, gt=0)
    """Bound in nats on |log π_T − log π_S| of one token; None follows the paper."""
    divergence: Literal["sampled", "forward_kl", "reverse_kl", "jsd"] = "sampled"
    """What pulls a trajectory towards the teacher: the sampled tokens' log-ratio (paper), or a
    divergence over the teacher's `top_k` most likely tokens and all others together, which has
    less noise and asks more of the teacher. `log_ratio_bound` is of the sampled one only."""
    top_k: int = Field(default=32, ge=1)
    is_ratio_cap: float = Field(default=2.0, gt=0)
    """Truncation of the importance ratio ρ to the policy that sampled."""
    aggregation: Literal["group", "token"] = "group"
    """The loss is a mean over prompts (paper) or over the tokens that are trained."""

    @property
    def teacher_top(self) -> int:
        """How many of the teacher's most likely tokens are needed at each place."""
        return 0 if self.divergence == "sampled" else self.top_k

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in OBJECTIVES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", kind):
            raise ValueError(
                f"must be one of {', '.join(OBJECTIVES)}, or package.module:name of your own, "
                f"not {kind!r}"
            )
        return kind


class OptimizerConfig(Config):
    """AdamW with warm-up and gradient clipping."""

    lr: float = Field(default=5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0)


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

    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ranks: int = Field(default=1, ge=1)
    resources: Resources = Resources()
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a rank; None leaves it to torch."""
    groups_per_step: int = Field(default=256, ge=1)
    """Prompts in one gradient step (the global batch)."""
    max_staleness: int = Field(default=1, ge=0)
    """Weight versions that a trained group may be old; 0 is fully synchronous."""
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
    """No gradient step for this long stops the run, naming the slowest stage."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray Train restarts the learner from its last checkpoint."""
