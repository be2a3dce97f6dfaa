"""Settings of the ground floor. Imports pydantic only, so that the CLI starts at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_TEACHER = "default"  # what the teacher is called that scores whatever names no other


class Config(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def class_for(cls, raw: object) -> type[Self]:
        """The class that reads `raw`: this one, unless a tag in it chooses another."""
        return cls


class RedisConfig(Config):
    """Where the streams live."""

    url: str | None = None
    """`redis://`, `rediss://` (TLS) or `unix://`; None starts a private server for this run.
    A password may be in the URL, in SCOPE_REDIS_PASSWORD or in `password_file`."""
    username: str | None = None
    """ACL user; the URL's own user wins."""
    password_file: Path | None = None
    """A file that holds the password, as Kubernetes mounts a secret."""


class StageConfig(Config):
    """How the workers of every stage hold their items."""

    lease_s: float = Field(default=30.0, gt=0)
    """A worker that has not renewed an item for this long is taken for dead."""
    max_deliveries: int = Field(default=3, ge=1)
    """An item that failed or killed its worker this many times goes to the dead stream."""
    patience_s: float = Field(default=600.0, gt=0)
    """How long an unreachable dependency is waited for before the run stops."""


class Resources(Config):
    """What Ray reserves for one actor of a role."""

    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    """Whole GPUs, or a fraction of one that it shares."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Resources of your own that only some nodes declare, such as `rollout: 0.01`: they keep a
    role on the nodes that are meant for it."""


SandboxLevel: TypeAlias = Literal["bubblewrap", "landlock"]
"""As `services.sandbox.confined.Level`, which imports the standard library only and so not this."""


class WorkersConfig(Config):
    """The workers of one stage."""

    workers: int = Field(default=1, ge=1)
    resources: Resources = Resources()
    """What each worker reserves."""
    capacity: int = Field(default=16, ge=1)
    """Items that one worker works on at once."""


HEAD = Resources(cpus=0.0, custom={"node:__internal_head__": 0.001})
"""A place on the head, for what reserves no CPU. Ray would put it on any node, and a node on which
anything lives is never idle: no autoscaler takes it away."""


class EngineConfig(Config):
    """What runs a model."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto`: vLLM where the role reserves a GPU and vLLM is installed, else transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; `auto` is `cuda` where the role reserves a GPU, `cpu` elsewhere."""
    args: dict[str, Any] = Field(default_factory=dict)
    """More arguments for vLLM's engine, by the names of its `AsyncEngineArgs`, such as
    `tensor_parallel_size`; the transformers engine takes none."""

    def on(self, resources: Resources) -> str:
        """The torch device, for a role with these resources."""
        # Not what torch sees: Ray leaves the GPUs visible to an actor that reserved none of them.
        return self.device if self.device != "auto" else "cuda" if resources.gpus else "cpu"

    def precision(self, resources: Resources) -> str:
        """The torch dtype that is computed in, by a role with these resources."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.on(resources).startswith("cuda") else "float32"

    @property
    def gpus(self) -> int:
        """GPUs that one engine runs on, as `args` say."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return math.prod(int(self.args.get(size, 1)) for size in sizes)

    def gpu_share(self, resources: Resources) -> float:
        """Of the memory of each of its GPUs, the part that vLLM takes: 0.92 of what the role
        reserves, as its own default is 0.92 of a whole one."""
        part = round(0.92 * min(1.0, resources.gpus), 3)
        return float(self.args.get("gpu_memory_utilization", part))
