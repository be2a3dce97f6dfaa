"""Settings of the data, the sampling and the rollout workers. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from services.config import Config, EngineConfig, SandboxLevel, WorkersConfig

# "package.module:factory" is an environment of one's own, see docs/environments.md.
EnvironmentKind: TypeAlias = Annotated[
    str, Field(pattern=r"^(none|python|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
]


class PromptsConfig(Config):
    """Prompts in verl's columns (`prompt`, `data_source`, `reward_model.ground_truth`)."""

    path: str | tuple[str, ...]
    """A `.parquet` or `.jsonl` file, or a list of them, read one after the other. Each is a path, a
    URL (`s3://…`, `hf://datasets/OWNER/NAME@REVISION?split=train`) or a pattern with `*`."""
    max_prompt_tokens: int = Field(ge=1)
    """A longer prompt, chat template included, is left out and counted."""

    @property
    def files(self) -> tuple[str, ...]:
        """`path` as a list, in the order in which it is read."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: object) -> object:
        if isinstance(path, list | tuple):
            return tuple(str(one) if isinstance(one, Path) else one for one in path)
        return str(path) if isinstance(path, Path) else path

    def in_order(self) -> DataConfig:
        """Each of them once, as the files have them."""
        return DataConfig(**self.model_dump(), shuffle=False)

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if path == ():
            raise ValueError("name at least one file")
        return path


class DataConfig(PromptsConfig):
    """The prompts that are trained on."""

    shuffle: bool = True
    """Another order in each epoch, the same one for the same seed; False keeps the file's."""
    epochs: int = Field(default=1, ge=1)


class SamplingConfig(Config):
    """How a group of trajectories is sampled from the student."""

    n: int = Field(default=8, ge=1)
    """Trajectories of each prompt (N in the paper)."""
    max_tokens: int = Field(ge=1)
    """Longest completion, end token included; a longer one is cut off and counts as truncated."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """There is no `top_p`: the importance ratio needs the log-probs of the distribution that was
    sampled from, and engines return them without it."""


class SamplingEngineConfig(EngineConfig):
    """What samples from the student."""

    weight_transfer: Literal["auto", "store", "nccl", "ipc"] = "auto"
    """How new weights reach vLLM. `store`: through the Ray object store, read once by each node;
    works everywhere. `nccl`: from the learner's GPU to those of each engine. `ipc`: where learner
    and engine share one GPU. `auto` is `store`: the others have not been run on GPUs yet."""
    in_flight: Literal["wait", "keep"] = "wait"
    """What becomes of groups in flight when new weights come in. `wait`: they are finished first,
    so that all tokens of a group come from one version. `keep` (vLLM only): they go on under the
    new weights, and every token's version is recorded; no long answer holds up an update."""


class RolloutConfig(WorkersConfig):
    """The workers that sample: each has an engine with its own copy of the student."""

    engine: SamplingEngineConfig = SamplingEngineConfig()
    capacity: int = Field(default=32, ge=1)
    """Prompts in flight in one worker, those that wait for the next batch included."""
    batch_sequences: int = Field(default=256, ge=1)
    """Most trajectories that the transformers engine samples at once. A group is never split: a
    larger `sampling.n` goes alone."""
    torch_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a worker; None leaves it to torch."""
    probe_tolerance: float = Field(default=1e-3, gt=0)
    """Nats by which the engine's and the learner's log-probs of the probe may differ on average.
    The default suits float32; bfloat16 needs some tenths. What the first weights differ by bounds
    all later ones more closely."""
    weights_timeout_s: float = Field(default=1800.0, gt=0)
    """How long the learner's first weights are waited for, its own start included."""


class PythonToolConfig(Config):
    """The environment `python`: it runs the programs that the student writes, in a sandbox."""

    sandbox: SandboxLevel = "bubblewrap"
    """What confines them. It is never exchanged for something weaker: see docs/verifier.md."""
    python: Path | None = None
    """The interpreter that runs them, with the packages that it has; None takes the worker's own
    without its packages."""
    keep_state: bool = False
    """Whether names live on from one program of an episode to the next."""
    time_s: float = Field(default=5.0, gt=0)
    """Processor seconds of one program; with `keep_state` of all programs of an episode."""
    memory_mb: int = Field(default=512, ge=64)
    """Address space of a program, in MiB."""
    output_chars: int = Field(default=2048, ge=16)
    """Longer output is cut in its middle."""


class EnvironmentConfig(Config):
    """Who answers the student, so that a trajectory has several turns. `sampling.max_tokens` is
    that of a whole trajectory, the environment's tokens included."""

    kind: EnvironmentKind = "none"
    """`none`: one answer and no more. `python`: programs are run. "package.module:factory" makes
    an environment of your own."""
    kinds: dict[str, EnvironmentKind] = Field(default_factory=dict)
    """Another kind for some data sources: `data_source: kind`."""
    role: Literal["tool", "user"] = "tool"
    """Whose turns the environments' messages are, by which `scope check` tries the student's chat
    template. `python` speaks so: `user` is for templates that know no tools."""
    max_turns: int = Field(default=8, ge=1)
    """The student's. An episode that is not over then counts as cut off."""
    turn_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one turn of the student's; None: as many as the trajectory has left."""
    deadline_s: float = Field(default=60.0, gt=0)
    """How long the environment may take for one turn; then the group is tried again, and given up
    after `stage.max_deliveries`."""
    concurrent: int = Field(default=4, ge=1)
    """How many turns the environments of one worker answer at once."""
    rewritten: Literal["refuse", "keep"] = "refuse"
    """What is done where the student's chat template changes earlier turns when it renders later
    ones (it removes thinking, say): `refuse` to start, or `keep` them in the context as sampled."""
    python: PythonToolConfig = PythonToolConfig()

    @property
    def used_kinds(self) -> frozenset[EnvironmentKind]:
        """Every kind that a prompt may need."""
        return frozenset({self.kind, *self.kinds.values()})

    def kind_of(self, data_source: str) -> EnvironmentKind:
        """Who answers in the episodes of `data_source`."""
        return self.kinds.get(data_source, self.kind)


ONE_TURN = EnvironmentConfig()
"""Nobody answers."""
