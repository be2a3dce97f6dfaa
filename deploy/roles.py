"""Who works in a run: for every stage how many workers, what each reserves, whose items they take.

Derived from the pipeline and the configuration, and used by whoever starts, places, scales or
counts workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pydantic import ValidationError

from deploy.config import ConfigError, OwnStep, RunConfig
from rollout.own_weights import OwnWeights
from rollout.worker import RolloutSettings
from services.config import Config, Resources
from services.pipeline import EVAL, TRAIN, Step
from services.weights import WeightFeed
from services.worker import StepWorker
from teacher.pool import Servers
from teacher.worker import TeacherSettings, Translator
from trainer.objectives.kinds import objective

Settings: TypeAlias = RolloutSettings | TeacherSettings | Config
"""What workers are told: a stage with no more to be told than its section gets that."""


@dataclass(frozen=True, slots=True)
class Role:
    """The workers of one stage, or of one lane of it."""

    name: str
    step: Step
    workers: int
    capacity: int
    resources: Resources
    lanes: tuple[str, ...]


def roles(config: RunConfig, *lanes: str) -> list[Role]:
    """Every role of a run, in the order of the pipeline; with `lanes`, of a run that has no
    others."""
    made = [
        replace(role, lanes=kept)
        for role in (_role(config, step) for step in config.pipeline.steps)
        if (kept := tuple(lane for lane in role.lanes if lane in lanes or not lanes))
    ]
    if _teacher_samples(config) and not lanes:
        # It samples what is trained on, and the student is what is evaluated.
        at = next(i for i, role in enumerate(made) if role.name == "rollout")
        if config.evaluation is not None:
            made.append(replace(made[at], name="evaluation", workers=1, lanes=(EVAL,)))
        made[at] = replace(made[at], lanes=(TRAIN,))
    return made


def worker_class(step: Step) -> type[StepWorker[Any, Any, Any]]:
    """The worker of a stage.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        worker = step.worker_class()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"steps: the worker {step.worker!r} of {step.name}: {error}") from None
    if not (isinstance(worker, type) and issubclass(worker, StepWorker)):
        raise ConfigError(f"steps: {step.worker!r} of {step.name} is no services.worker.StepWorker")
    return worker


def settings(
    config: RunConfig,
    role: Role,
    weights: WeightFeed,
    teachers: Mapping[str, Servers],
    translators: Mapping[str, Translator] | None = None,
) -> Settings:
    """What the workers of a role are told: their section of the configuration, where a stage needs
    no more than that.

    Args:
        weights: where the student's weights come from.
        teachers: where each teacher is asked.
        translators: of those that have other tokens than the student.

    Raises:
        ConfigError: the settings of a stage of one's own are not those of its worker.
    """
    match role.step.name:
        case "rollout" if _teacher_samples(config) and EVAL not in role.lanes:
            (model,) = (one.model for one in config.teachers.values())  # the preflight saw to that
            return _rollout(config, model, OwnWeights(model))
        case "rollout":
            return _rollout(config, config.student, weights)
        case "teacher":
            chosen = config.trainer.objective
            return TeacherSettings(
                objective(chosen).teacher,
                chosen.teacher_top,
                teachers,
                translators or {},
                student_top=chosen.student_top > 0,
                entropy=chosen.teacher_entropy,
            )
    section = config.section(role.step)
    return own_settings(section, role.step) if isinstance(section, OwnStep) else section


def _rollout(config: RunConfig, model: str, weights: WeightFeed) -> RolloutSettings:
    longest = config.longest_sampled
    return RolloutSettings(config.rollout, model, weights, config.environment, longest)


def own_settings(own: OwnStep, step: Step) -> Config:
    """The settings of a stage of one's own, as its worker declares them.

    Raises:
        ConfigError: they are not, or there is no such worker.
    """
    settings_class = worker_class(step).settings_class
    if not issubclass(settings_class, Config):
        raise ConfigError(
            f"steps: the settings_class of {own.name} is {settings_class.__name__}, which is no "
            f"services.config.Config"
        )
    try:
        return settings_class.model_validate(own.settings)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise ConfigError(f"steps: settings of {own.name}: {problems}") from None


def _role(config: RunConfig, step: Step) -> Role:
    section = config.section(step)
    return Role(step.name, step, section.workers, section.capacity, section.resources, step.lanes)


def _teacher_samples(config: RunConfig) -> bool:
    return objective(config.trainer.objective).sampler == "teacher"
