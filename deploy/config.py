"""One run's configuration: composes the rooms' configs and holds every check across them.

Imports no torch, no ray and no vllm, so that `scope --help` and a typing error cost nothing.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from deploy import yaml_file
from rollout.config import (
    DataConfig,
    EnvironmentConfig,
    PromptsConfig,
    RolloutConfig,
    SamplingConfig,
)
from services.config import (
    DEFAULT_TEACHER,
    Config,
    EngineConfig,
    RedisConfig,
    Resources,
    StageConfig,
    WorkersConfig,
)
from services.pipeline import PIPELINE, Pipeline, Step
from teacher.config import TeacherConfig, TeachersConfig
from trainer.config import TrainerConfig
from verifier.config import VerifierConfig

ModelT = typing.TypeVar("ModelT", bound=Config)

_ALIKE = 0.6  # how alike two names must be, at the least, for one to be meant by the other
_NAMED = 4  # how many keys are named that may have been meant


class ConfigError(ValueError):
    """A configuration that cannot be used; one sentence a problem."""


def called(teacher: str) -> str:
    """A teacher in words."""
    return "teacher" if teacher == DEFAULT_TEACHER else f"teacher {teacher}"


class EvaluationConfig(Config):
    """Held-out accuracy, measured on the run's own workers before and after training, and
    meanwhile."""

    data: PromptsConfig
    sampling: SamplingConfig
    prompts: int | None = Field(default=None, ge=1)
    """Only the first so many prompts; None takes all."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also while training goes on, whenever so many steps have passed. Evaluation prompts go before
    training prompts; weights may become newer while one is under way."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """How long one prompt may keep the evaluation waiting for the next."""


class RayConfig(Config):
    """The Ray cluster that the run lives on."""

    address: str | None = None
    """An existing cluster (`auto` or host:port); None starts one on this machine."""
    wait_for_nodes_s: float = Field(default=10.0, ge=0)
    """How long a run waits for room on the cluster. Where an autoscaler brings the nodes, give it
    the minutes that it needs."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one GPU of the cluster, by which `scope check` refuses what cannot fit. None goes
    by a role's `accelerator_type:…` among its custom resources, else by this machine's GPU."""
    num_cpus: int | None = None
    """Logical CPUs of a cluster started here; None takes what the machine has."""
    dashboard: bool = True


class OwnStep(WorkersConfig):
    """A stage of one's own between two of the pipeline's (docs/architecture.md)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    after: str
    """The stage whose results it reads."""
    worker: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`package.module:Class` of a `services.worker.StepWorker`, importable on every node."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its own; the worker's `settings_class` says which there are."""


class RunConfig(TeachersConfig):
    """Everything about one run. Its teachers are needed unless the objective asks none and samples
    from none (`grpo`, `rft`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    student: str
    """Model directory or hub name of the student."""
    data: DataConfig
    sampling: SamplingConfig
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    verifier: VerifierConfig
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig | None = None
    redis: RedisConfig = RedisConfig()
    stage: StageConfig = StageConfig()
    steps: tuple[OwnStep, ...] = ()
    """Stages of one's own."""
    ray: RayConfig = RayConfig()
    runs_dir: Path = Path("runs")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Who is told of every step beside `metrics.jsonl` and TensorBoard; each an extra of the same
    name. Where, and with which key, their own environment variables say (docs/operations.md)."""
    max_dead_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this fraction of the fed prompts is dead."""
    allow_different_end_tokens: bool = False
    """Train although student and teacher end their answers with different tokens: where the student
    ended, the teacher then scores its own end."""

    @property
    def pipeline(self) -> Pipeline:
        """The stages of this run."""
        own = [(s.after, Step(s.name, "", f"{s.name}_out", s.worker)) for s in self.steps]
        return PIPELINE.with_steps(own) if own else PIPELINE

    @property
    def followers_dtype(self) -> str:
        """What all engines compute in that follow the student's weights; float32 where they
        differ."""
        teachers = [one for one in self.teachers.values() if one.weights == "student"]
        dtypes = {one.engine.precision(one.resources) for one in teachers}
        dtypes.add(self.rollout.engine.precision(self.rollout.resources))
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer that are trained on, all turns included."""
        return self.data.max_prompt_tokens + self.sampling.max_tokens

    @property
    def longest_sampled(self) -> int:
        """The same of whatever is sampled, in evaluations too."""
        if (held := self.evaluation) is None:
            return self.longest
        return max(self.longest, held.data.max_prompt_tokens + held.sampling.max_tokens)

    @property
    def served(self) -> dict[str, TeacherConfig]:
        """The teachers that this run serves. Left to themselves they would take sequences as long
        as their context, and vLLM starts only where it has memory for one of these: those that
        read what the student read are sent none longer than the run's longest."""
        return {name: self._sized(one) for name, one in super().served.items()}

    def _sized(self, teacher: TeacherConfig) -> TeacherConfig:
        same = teacher.context is None and teacher.tokenizer == "student" and not self.steps
        if teacher.max_sequence_tokens is not None or not same:
            return teacher
        return teacher.model_copy(update={"max_sequence_tokens": self.longest})

    def section(self, step: Step) -> WorkersConfig:
        """The settings of a stage's workers."""
        own = next((own for own in self.steps if own.name == step.name), None)
        section: WorkersConfig = own or getattr(self, step.section or step.name)
        return section

    @model_validator(mode="after")
    def _across(self) -> RunConfig:
        if self.steps:
            _ = self.pipeline  # raises where it does not fit together
        if self.ray.address and self.redis.url is None:
            raise ValueError(
                "a run on an existing cluster needs redis.url: the private server can be "
                "reached from this machine only"
            )
        transfer = self.rollout.engine.weight_transfer
        for name, one in self.teachers.items():
            if one.weights == "student" and one.model != self.student:
                raise ValueError(
                    f"teachers.{name}.weights: student: its model must be the run's student, "
                    f"{self.student}, not {one.model}"
                )
            if one.weights == "student" and transfer in ("nccl", "ipc"):
                raise ValueError(
                    f"teachers.{name}.weights: student come through the weight store, and "
                    f"rollout.engine.weight_transfer is {transfer!r}"
                )
        if transfer in ("nccl", "ipc") and not (
            self.trainer.resources.gpus and self.rollout.resources.gpus
        ):
            raise ValueError(
                f"rollout.engine.weight_transfer {transfer!r} goes from GPU to GPU: "
                "trainer.resources.gpus and rollout.resources.gpus must be more than 0"
            )
        if transfer == "ipc" and self.trainer.ranks > 1:
            raise ValueError(
                "rollout.engine.weight_transfer 'ipc' works with trainer.ranks 1 alone: all ranks "
                "would have to take part in vLLM's transfer, and rank 0 alone sends"
            )
        for room, engine, resources in self._engines():
            needed = engine.gpus
            if needed > 1 and 0 < resources.gpus < needed:
                raise ValueError(
                    f"{room}.engine.args ask for {needed} GPUs for one engine and "
                    f"{room}.resources.gpus reserves {resources.gpus:g}: an engine's GPUs are "
                    f"reserved together, on one node"
                )
        return self

    def with_absolute_paths(self) -> RunConfig:
        """Local model directories by their whole path; names on a hub stay as they are."""

        def absolute(model: str) -> str:
            path = Path(model).expanduser()
            return str(path.resolve()) if path.is_dir() else model

        teachers = {
            name: one.model_copy(update={"model": absolute(one.model)})
            for name, one in self.teachers.items()
        }
        return self.model_copy(update={"student": absolute(self.student), "teachers": teachers})

    def _engines(self) -> Iterator[tuple[str, EngineConfig, Resources]]:
        """Every engine that the run starts, by where its settings stand."""
        yield "rollout", self.rollout.engine, self.rollout.resources
        for name, one in self.served.items():
            yield f"teachers.{name}", one.engine, one.resources


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config and applies `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: unreadable, an unknown key (the nearest one is named) or a bad value.
    """
    return _validated(RunConfig, _read(path), overrides, path)


def load_demo(overrides: Sequence[str] = ()) -> RunConfig:
    """The demo's config, with its models and data found wherever this program is installed."""
    root = Path(__file__).resolve().parents[1]
    path = root / "deploy/runs/demo.yaml"
    raw = _read(path)
    for section, key in (
        (raw, "student"),
        (raw["teacher"], "model"),
        (raw["data"], "path"),
        (raw["evaluation"]["data"], "path"),
    ):
        section[key] = str(root / section[key])
    return _validated(RunConfig, raw, overrides, path)


def load_teachers(path: Path, overrides: Sequence[str] = ()) -> TeachersConfig:
    """The teachers of a run's config, or of a file that holds just these sections."""
    raw = _read(path)
    if "student" in raw:
        ours = ("teacher", *TeachersConfig.model_fields)
        raw = {section: raw[section] for section in ours if section in raw}
        if not (raw.get("teacher") or raw.get("teachers")):
            raise ConfigError(f"{path} is a run's config that has no teacher")
    return _validated(TeachersConfig, raw, overrides, path)


def load_other(model: type[ModelT], path: Path) -> ModelT:
    """A YAML or JSON file that holds a `model`.

    Raises:
        ConfigError: as in `load`.
    """
    return _validated(model, _read(path), (), path)


def dump(config: BaseModel) -> str:
    """The resolved config as YAML; loads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validated(
    model: type[ModelT], raw: dict[str, Any], overrides: Sequence[str], path: Path
) -> ModelT:
    for override in overrides:
        _override(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_sentence(model, raw, problem) for problem in error.errors())
        if "teacher" in raw:  # the reader wrote it so
            problems = problems.replace(f"teachers.{DEFAULT_TEACHER}.", "teacher.")
        raise ConfigError(f"{path}: {problems}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml_file.read(path)
    except yaml_file.UnreadableYaml as error:
        raise ConfigError(str(error)) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is section.key=value, not {override!r}")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    try:
        raw[last] = yaml_file.parse(value)
    except yaml_file.UnreadableYaml as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _sentence(model: type[BaseModel], raw: Any, problem: Any) -> str:
    """One pydantic error in words, with the nearest keys for an unknown one."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = _nearest(path, list(_paths(model, raw, path.split("."))))
        if near:
            return f"unknown key {path!r}; did you mean {' or '.join(map(repr, near))}?"
        known = _keys_at(model, raw, problem["loc"][:-1])
        return f"unknown key {path!r}; known keys: {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else str(message)


def _nearest(path: str, known: Sequence[str]) -> list[str]:
    """The keys that an unknown one may have been meant for: those whose own names are most alike,
    wherever they stand, and of these the ones that also stand where it does."""

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    section, _, name = path.rpartition(".")
    scores = {other: alike(name, other.rpartition(".")[2]) for other in known}
    best = max(scores.values(), default=0.0)
    if best < _ALIKE:
        return []
    near = [other for other, score in scores.items() if score == best]
    here = [other for other in near if other.rpartition(".")[0] == section]
    return here or near[:_NAMED]


def _paths(
    model: type[BaseModel], raw: Any, asked: Sequence[str], prefix: str = ""
) -> Iterator[str]:
    """Every key under `model` by its full path, where `raw` is what was written. In a table of
    sections by name the name is that of `asked`, an unknown path below, or `NAME`."""
    for name, field in model.model_fields.items():
        path, below = prefix + name, _below(raw, name)
        yield path
        section = _section(field.annotation, below)
        if section is None:
            continue
        if _is_table(field.annotation):
            depth = path.count(".") + 1
            inside = asked[:depth] == path.split(".") and len(asked) > depth
            entry = asked[depth] if inside else "NAME"
            path, below = f"{path}.{entry}", _below(below, entry)
        yield from _paths(section, below, asked, f"{path}.")


def _below(raw: Any, key: str) -> Any:
    return raw.get(key) if isinstance(raw, Mapping) else None


def _is_table(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True
    return any(_is_table(argument) for argument in typing.get_args(annotation))


def _keys_at(model: type[BaseModel], raw: Any, path: Sequence[Any]) -> list[str]:
    """The field names of the config section at `path`."""
    for part in path:
        raw, field = _below(raw, str(part)), model.model_fields.get(str(part))
        if field is None:  # a name in a table of sections
            continue
        section = _section(field.annotation, raw)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section(annotation: Any, raw: Any) -> type[BaseModel] | None:
    """The class that reads `raw` under such an annotation; None where that is no section."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation):
        sections = [_section(argument, raw) for argument in typing.get_args(annotation)]
        return next((section for section in sections if section), None)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation.class_for(raw)
    return None
