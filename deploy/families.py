"""What a run's models are, before anything starts: family, layout, and what runs fused.

Proven on a small model of each config (`services.shrink`), so that no weights are read, and a model
that is right in no layout is refused while there is nothing to stop. Whoever loads the model proves
it again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from deploy.config import RunConfig, called
from rollout import transformers_engine
from services import layouts, packed
from services.config import EngineConfig, Resources
from services.engines import EngineError, choose
from services.models import (
    ModelError,
    locate,
    parameter_shapes,
    steady_tokens,
    stored_names,
)
from services.shrink import FAILURES, small_of
from teacher.config import TeacherConfig
from trainer.config import TrainerConfig
from trainer.student import Student

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Look:
    """What is said of one model of a run; `wrong` if the run cannot work with it."""

    who: str
    said: str
    wrong: bool = False


def looks(config: RunConfig, teachers: Mapping[str, TeacherConfig]) -> list[Look]:
    """The student, and each of these teachers that is served here."""
    served = {called(name): one for name, one in teachers.items() if not one.endpoints}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other longer than so small models take
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the small models: the large ones say it again
            return [
                _student(config),
                *(_teacher(who, one, config.longest) for who, one in served.items()),
            ]
    finally:
        torch.set_num_threads(threads)


def _student(config: RunConfig) -> Look:
    trainer, who = config.trainer, "student"
    try:
        whole, kind = (
            _config(config.student),
            _kind(config.rollout.engine, config.rollout.resources),
        )
        layouts.check_length(whole, config.longest_sampled)
        if kind == "vllm":
            _check_vllm(whole, config.rollout.engine)
        try:
            model = small_of(whole)
        except FAILURES as error:
            return Look(who, _untried(whole, error))
        stored_names(config.student, parameter_shapes(config.student))
        learner = Student(model, trainer.model_copy(update={"offload": False}), _CPU)
        said = [_family(whole), *_layout(learner.model, trainer.resources, _in_16_bits(trainer))]
        if kind == "transformers":
            sampler = transformers_engine.prepare(small_of(whole))
            kind += f" ({transformers_engine.way(sampler).method})"
        said.append(f"sampled from by {kind}")
    except (ValueError, ModelError) as error:
        return Look(who, str(error), wrong=True)
    return Look(who, "; ".join(said))


def _check_vllm(student: PretrainedConfig, engine: EngineConfig) -> None:
    """vLLM rotates all lengths as its longest (`longrope`); the learner, as short ones.

    Raises:
        ValueError: these may not be the same.
    """
    steady = steady_tokens(vars(student.get_text_config()))
    if steady is not None and int(engine.args.get("max_model_len") or sys.maxsize) > steady:
        raise ValueError(
            f"{student.model_type}: set rollout.engine.args.max_model_len to {steady} or less: "
            "vLLM could rotate short sequences as long ones (rope_parameters in its config.json)"
        )


def _teacher(who: str, teacher: TeacherConfig, longest: int) -> Look:
    try:
        whole = _config(teacher.model)
        if _kind(teacher.engine, teacher.resources) == "vllm":
            return Look(who, f"{whole.model_type}; scored by vLLM")
        layouts.check_length(whole, longest)
        try:
            model = small_of(whole)
        except FAILURES as error:
            return Look(who, _untried(whole, error))
        half = teacher.engine.dtype != "float32" and teacher.resources.gpus > 0
        said = [_family(whole), *_layout(packed.prepare(model), teacher.resources, half)]
    except (ValueError, ModelError) as error:
        return Look(who, str(error), wrong=True)
    return Look(who, "; ".join(said))


def _config(model: str) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(locate(model))
    return config


def _untried(config: PretrainedConfig, error: Exception) -> str:
    why = " ".join(str(error).split())[:200]
    said = "its layout is proven when it is loaded: it cannot be made small"
    return f"{config.model_type}; {said} ({why})"


def _family(config: PretrainedConfig) -> str:
    if config.get_text_config() is config:
        return str(config.model_type)
    return f"{config.model_type} (trained: the text model inside; all else is exported as it was)"


def _layout(model: PreTrainedModel, resources: Resources, half: bool) -> list[str]:
    computes = packed.computed_by(model, on_gpu=resources.gpus > 0, half=half)
    return [f"layout {layouts.proven(model).layout}", *computes]


def _in_16_bits(trainer: TrainerConfig) -> bool:
    """Whether the learner computes so."""
    return "bfloat16" in (trainer.autocast, trainer.dtype)


def _kind(engine: EngineConfig, resources: Resources) -> str:
    try:
        return choose(engine, "engine", resources)
    except EngineError:  # said by whoever checks engines
        return "vllm"
