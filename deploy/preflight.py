"""What is checked before anything starts: one sentence for each thing that would go wrong."""

from __future__ import annotations

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from deploy.config import ConfigError, RunConfig
from rollout.config import DataConfig, SamplingConfig
from rollout.engine import check_engine
from rollout.prompts import DataError, PromptSource, load_rows
from services.engines import EngineError, vllm_can_check
from services.models import Fingerprint, ModelError, differences, fingerprint, load_tokenizer
from services.trackers import missing
from teacher.scorer import check_scorer
from trainer.objectives import ObjectiveError, objective


@dataclass(frozen=True)
class Preflight:
    """What the checks found out, for the run that follows."""

    student: Fingerprint
    teacher: Fingerprint
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
        student, teacher = fingerprint(config.student), fingerprint(config.teacher.model)
        tokenizer = load_tokenizer(config.student)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    try:
        objective(config.trainer.objective)
    except ObjectiveError as error:
        raise ConfigError(str(error)) from None
    problems, warnings = _models(config, student, teacher)
    problems += _engines(config) + missing(config.trackers)
    train = _source(config.data, config.sampling, tokenizer, config.seed)
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
    return Preflight(student, teacher, train, heldout, total, warnings)


def _engines(config: RunConfig) -> list[str]:
    """What vLLM, where it is installed, has against its arguments. It is asked in a process of its
    own, because importing it changes the environment that every process of the run would inherit.
    """
    if not any(vllm_can_check(room.engine) for room in (config.rollout, config.teacher)):
        return _refusals(config)
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, own, logging.disable, (logging.WARNING,)) as process:
        return process.submit(_refusals, config).result()


def _refusals(config: RunConfig) -> list[str]:
    found = []
    checks: tuple[partial[None], ...] = (
        partial(check_engine, config.rollout, config.student),
        partial(check_scorer, config.teacher),
    )
    for refuse in checks:
        try:
            refuse()
        except EngineError as error:
            found.append(str(error))
    return found


def _source(
    data: DataConfig, sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PromptSource:
    try:
        return PromptSource(load_rows(data, tokenizer), sampling, seed=seed, data=data)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _models(
    config: RunConfig, student: Fingerprint, teacher: Fingerprint
) -> tuple[list[str], list[str]]:
    found = differences(student, teacher)
    warnings = [found.pop("chat_template")] if "chat_template" in found else []
    if config.allow_different_end_tokens and "end_tokens" in found:
        warnings.append(found.pop("end_tokens"))
    elif "end_tokens" in found:
        found["end_tokens"] += " (allow_different_end_tokens: true trains all the same)"
    for role, model in (("student", student), ("teacher", teacher)):
        longest = config.data.max_prompt_tokens + config.sampling.max_tokens
        if model.context_length and longest > model.context_length:
            found[f"{role}_context"] = (
                f"data.max_prompt_tokens + sampling.max_tokens is {longest}, past the {role}'s "
                f"context of {model.context_length}"
            )
    return list(found.values()), warnings
