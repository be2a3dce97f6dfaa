"""What is checked before anything starts: one sentence for each thing that would go wrong."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from transformers import PreTrainedTokenizerBase

from deploy.config import ConfigError, RunConfig, called
from deploy.teachers import identify
from rollout.config import DataConfig, SamplingConfig
from rollout.engine import check_engine
from rollout.prompts import DataError, PromptSource, Route, load_rows, to_default
from services.config import DEFAULT_TEACHER
from services.engines import EngineError, vllm_can_check
from services.models import Fingerprint, ModelError, differences, fingerprint, load_tokenizer
from services.trackers import missing
from teacher.config import TeacherModel
from teacher.scorer import check_scorer
from trainer.objectives import Objective, ObjectiveError, objective

_ANSWER_S = 300.0  # importing vLLM takes seconds, half a minute on a busy machine

Params = ParamSpec("Params")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Preflight:
    """What the checks found out, for the run that follows."""

    fingerprints: Mapping[str, str | None]
    """Of each teacher that the objective asks, by name: the only model whose scores are taken;
    None where nobody tells, so that the first that answers is it."""
    train: PromptSource
    heldout: PromptSource | None
    total_groups: int
    warnings: list[str]


def check(config: RunConfig) -> Preflight:
    """Reads models' metadata and data; loads no weights and starts nothing.

    Raises:
        ConfigError: the run cannot work; the message says everything that is wrong.
    """
    try:
        student = fingerprint(config.student)
        tokenizer = load_tokenizer(config.student)
        chosen = objective(config.trainer.objective)
    except (ModelError, ObjectiveError) as error:
        raise ConfigError(str(error)) from None
    teachers = _teachers(config, chosen)
    found = {name: identify(one) for name, one in teachers.items()}
    problems, warnings = _models(config, student, found)
    asked = teachers if chosen.teacher != "none" else {}
    problems += _engines(config, [one for one in asked.values() if not one.endpoints])
    problems += missing(config.trackers)
    route = config.teacher.router() if config.teacher and asked else to_default
    train = _source(config.data, config.sampling, tokenizer, config.seed, route)
    heldout = None
    if (held := config.evaluation) is not None:
        # The same prompts in every run, whatever its seed: their differences are paired.
        data = held.data.model_copy(update={"shuffle": False})
        heldout = _source(data, held.sampling, tokenizer, config.seed + 1)
    total = len(train)
    if config.trainer.max_steps is not None:
        total = min(total, config.trainer.max_steps * config.trainer.groups_per_step)
    if problems:
        raise ConfigError("; ".join(problems))
    fingerprints = {name: one.model if (one := found[name]) else None for name in asked}
    return Preflight(fingerprints, train, heldout, total, warnings)


def _teachers(config: RunConfig, chosen: Objective) -> dict[str, TeacherModel]:
    """The teachers that the objective asks, or that it samples from."""
    kind = config.trainer.objective.kind
    if chosen.teacher == "none" and chosen.sampler == "student":
        return {}
    if config.teacher is None:
        raise ConfigError(f"the objective {kind!r} needs a teacher: set teacher.model")
    if chosen.teacher != "none":
        return config.teacher.named
    if config.teacher.others:
        raise ConfigError(f"the objective {kind!r} samples from one teacher: leave out others")
    # Whoever serves it, it is loaded here.
    return {DEFAULT_TEACHER: TeacherModel(model=config.teacher.model)}


def _engines(config: RunConfig, teachers: Sequence[TeacherModel]) -> list[str]:
    """What vLLM, where it is installed, has against its arguments. It is asked in a process of its
    own, because importing it changes the environment that every process of the run would inherit.
    """
    engines = [config.rollout.engine, *(one.engine for one in teachers)]
    if not any(map(vllm_can_check, engines)):
        return _refusals(config, teachers)
    try:
        return in_own_process(_ANSWER_S, _refusals, config, teachers)
    except TimeoutError:
        return [f"vLLM did not say within {_ANSWER_S:.0f} s whether it takes its arguments"]


def in_own_process(
    timeout_s: float, work: Callable[Params, Answer], *args: Params.args, **options: Params.kwargs
) -> Answer:
    """What `work` returns in a new process, which is killed when that takes too long.

    Raises:
        TimeoutError: it took longer than `timeout_s`.
    """
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, own, logging.disable, (logging.WARNING,)) as process:
        asked = process.submit(work, *args, **options)
        try:
            return asked.result(timeout_s)
        except TimeoutError:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _refusals(config: RunConfig, teachers: Sequence[TeacherModel]) -> list[str]:
    found = []
    checks: tuple[partial[None], ...] = (
        partial(check_engine, config.rollout, config.student),
        *(partial(check_scorer, one) for one in teachers),
    )
    for refuse in checks:
        try:
            refuse()
        except EngineError as error:
            found.append(str(error))
    return found


def _source(
    data: DataConfig,
    sampling: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    route: Route = to_default,
) -> PromptSource:
    try:
        return PromptSource(load_rows(data, tokenizer, route), sampling, seed=seed, data=data)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _models(
    config: RunConfig, student: Fingerprint, teachers: Mapping[str, Fingerprint | None]
) -> tuple[list[str], list[str]]:
    """What is wrong, and what is only to be known, of the models."""
    problems, warnings = [], []
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    for who, teacher in [("student", student), *((called(n), t) for n, t in teachers.items())]:
        if teacher is None:
            warnings.append(
                f"the {who} is not on this machine and its servers do not tell: its tokenizer, "
                f"vocabulary, end tokens and chat template could not be compared with the student's"
            )
            continue
        found = differences(student, teacher)
        told = [found.pop("chat_template")] if "chat_template" in found else []
        if config.allow_different_end_tokens and "end_tokens" in found:
            told.append(found.pop("end_tokens"))
        elif "end_tokens" in found:
            found["end_tokens"] += " (allow_different_end_tokens: true trains all the same)"
        if teacher.context_length and longest > teacher.context_length:
            found["context"] = (
                f"data.max_prompt_tokens + sampling.max_tokens is {longest}, past the {who}'s "
                f"context of {teacher.context_length}"
            )
        prefix = f"{who}: " if len(teachers) > 1 else ""
        problems += [prefix + sentence for sentence in found.values()]
        warnings += [prefix + sentence for sentence in told]
    return problems, warnings
