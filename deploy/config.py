"""One run's configuration: composes the rooms' configs and holds every check across them.

Imports no torch, no ray and no vllm, so that `scope --help` and a typing error cost nothing.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rollout.config import DataConfig, RolloutConfig, SamplingConfig
from services.config import (
    DEFAULT_TEACHER,
    Config,
    EngineConfig,
    RedisConfig,
    Resources,
    StageConfig,
)
from teacher.config import TeacherConfig
from trainer.config import TrainerConfig
from verifier.config import VerifierConfig

ModelT = typing.TypeVar("ModelT", bound=Config)


class ConfigError(ValueError):
    """A configuration that cannot be used; one sentence a problem."""


def called(teacher: str) -> str:
    """A teacher in words."""
    return "teacher" if teacher == DEFAULT_TEACHER else f"teacher {teacher}"


class EvaluationConfig(Config):
    """Held-out accuracy, measured on the run's own workers before and after training, and
    meanwhile."""

    data: DataConfig
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
    num_cpus: int | None = None
    """Logical CPUs of a cluster started here; None takes what the machine has."""
    dashboard: bool = True


class RunConfig(Config):
    """Everything about one run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    student: str
    """Model directory or hub name of the student."""
    data: DataConfig
    sampling: SamplingConfig
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig
    teacher: TeacherConfig | None = None
    """Needed unless the objective asks none and samples from none (`grpo`, `rft`)."""
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig | None = None
    redis: RedisConfig = RedisConfig()
    stage: StageConfig = StageConfig()
    ray: RayConfig = RayConfig()
    runs_dir: Path = Path("runs")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Who is told of every step beside `metrics.jsonl` and TensorBoard; each an extra of the same
    name. Where, and with which key, their own environment variables say (docs/operations.md)."""
    max_dead_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this fraction of the fed prompts is dead."""
    allow_different_end_tokens: bool = False
    """Train although student and teacher end their answers with different tokens."""

    @model_validator(mode="after")
    def _across(self) -> RunConfig:
        if self.evaluation and self.evaluation.data.epochs != 1:
            raise ValueError("evaluation.data.epochs must be 1")
        if self.ray.address and self.redis.url is None:
            raise ValueError(
                "a run on an existing cluster needs redis.url: the private server can be "
                "reached from this machine only"
            )
        transfer = self.rollout.engine.weight_transfer
        if transfer in ("nccl", "ipc") and not (
            self.trainer.resources.gpus and self.rollout.resources.gpus
        ):
            raise ValueError(
                f"rollout.engine.weight_transfer {transfer!r} goes from GPU to GPU: "
                "trainer.resources.gpus and rollout.resources.gpus must be more than 0"
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

        teacher = self.teacher
        if teacher is not None:
            others = {
                name: one.model_copy(update={"model": absolute(one.model)})
                for name, one in teacher.others.items()
            }
            moved = {"model": absolute(teacher.model), "others": others}
            teacher = teacher.model_copy(update=moved)
        return self.model_copy(update={"student": absolute(self.student), "teacher": teacher})

    def _engines(self) -> Iterator[tuple[str, EngineConfig, Resources]]:
        """Every engine that the run starts, by where its settings stand."""
        yield "rollout", self.rollout.engine, self.rollout.resources
        for name, one in (self.teacher.served if self.teacher else {}).items():
            where = "teacher" if name == DEFAULT_TEACHER else f"teacher.others.{name}"
            yield where, one.engine, one.resources


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config and applies `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: unreadable, an unknown key (the nearest one is named) or a bad value.
    """
    return _validated(RunConfig, _read(path), overrides, path)


def load_teacher(path: Path, overrides: Sequence[str] = ()) -> TeacherConfig:
    """The `teacher` section of a run's config, or a file that holds just that."""
    raw = _read(path)
    if "student" in raw and not raw.get("teacher"):
        raise ConfigError(f"{path} is a run's config that has no teacher")
    raw = raw.get("teacher", raw)
    return _validated(TeacherConfig, raw, [o.removeprefix("teacher.") for o in overrides], path)


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
        problems = [_sentence(model, problem) for problem in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
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
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override {override!r} is not YAML") from None


def _sentence(model: type[BaseModel], problem: Any) -> str:
    """One pydantic error in words, with the nearest key for an unknown one."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {path!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else str(message)


def _keys_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The field names of the config section at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:  # a name in a table of sections
            continue
        section = _section(field.annotation)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation):
        found = [_section(argument) for argument in typing.get_args(annotation)]
        return next((section for section in found if section), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None
