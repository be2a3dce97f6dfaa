"""What is checked before anything starts: one sentence for each thing that would go wrong."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from transformers import PreTrainedTokenizerBase

from deploy.config import ConfigError, RunConfig, called
from deploy.endpoints import examine, lacks
from deploy.families import looks
from deploy.memory import needs
from deploy.other_tokenizers import differs, retokenizer
from deploy.other_tokenizers import problems as tokenizer_problems
from deploy.roles import own_settings
from deploy.teachers import identify
from rollout.config import DataConfig
from rollout.continuation import Continuation
from rollout.continuation import problems as template_problems
from rollout.engine import check_engine
from rollout.environment import UnknownEnvironment, factory
from rollout.prompts import Context, PromptSource, Route, Row, load_rows, to_default
from rollout.sources import DataError
from services.engines import EngineError, vllm_can_check
from services.models import (
    Fingerprint,
    ModelError,
    at_hand,
    differences,
    end_tokens,
    fingerprint,
    load_tokenizer,
)
from services.redis_server import resolve_url
from services.trackers import missing
from services.trajectory import LogProbs
from teacher.cache import unbounded
from teacher.config import TeacherConfig
from teacher.ends import Ends
from teacher.scorer import check_scorer, model_card
from teacher.worker import Translator
from trainer.objectives.base import Objective
from trainer.objectives.kinds import objective

_ANSWER_S = 300.0  # importing vLLM takes seconds, half a minute on a busy machine

Params = ParamSpec("Params")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Preflight:
    """What the checks found out, for the run that follows."""

    fingerprints: Mapping[str, str | None]
    """Of each teacher that the objective asks, by name: the only model whose scores are taken;
    None where nobody tells."""
    probes: Mapping[str, LogProbs]
    """Of those on servers that tell no fingerprint: what the right model says of the sequence that
    every server is asked about; none where no server scored it."""
    train: PromptSource
    heldout: PromptSource | None
    total_groups: int
    warnings: list[str]
    contexts: Mapping[str, str]
    """What the teacher reads of one row of each data source, where it is not the student's prompt.
    """
    models: list[str]
    """What is to be said of each model that runs here: family, layout, what is fused, and the
    memory that each role needs of a GPU."""
    translators: Mapping[str, Translator]
    """Of each teacher, by name, that has other tokens than the student."""


def check(config: RunConfig) -> Preflight:
    """Reads models' metadata and data, and asks servers what they hold; starts nothing, and loads
    no weights but those of a teacher that is here and on servers that do not tell what they hold.

    Raises:
        ConfigError: the run cannot work; the message says everything that is wrong.
    """
    try:
        student = fingerprint(config.student)
        tokenizer = load_tokenizer(config.student)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    chosen = objective(config.trainer.objective)
    for own in config.steps:
        own_settings(own, config.pipeline[own.name])
    teachers = _teachers(config, chosen)
    identities = {name: identify(one) for name, one in teachers.items()}
    asked = teachers if chosen.teacher != "none" else {}
    others = [name for name, one in asked.items() if differs(one, student, identities[name])]
    problems, warnings = _models(config, student, identities, others)
    problems += [p for name in others for p in tokenizer_problems(config, teachers[name], chosen)]
    agreed = {
        name: examine(one, config.trainer.objective) for name, one in asked.items() if one.endpoints
    }
    problems += [problem for one in agreed.values() for problem in one.problems]
    warnings += [warning for one in agreed.values() for warning in one.warnings]
    seen = looks(config, asked)
    problems += [f"{look.who}: {look.said}" for look in seen if look.wrong]
    memory = list(needs(config, asked))
    problems += [str(need) for need in memory if not need.fits]
    problems += _engines(config, [one for one in asked.values() if not one.endpoints])
    for name, teacher in asked.items():
        problems += _lacks(config, called(name), teacher, student, identities[name])
    caches = [one.cache for one in asked.values() if one.cache is not None and not one.endpoints]
    warnings += filter(None, (unbounded(resolve_url(cache) or cache.url) for cache in caches))
    problems += missing(config.trackers)
    route = config.router() if asked else to_default
    problems += _environment(config, tokenizer)
    if others and problems:  # its prompts may be what cannot be made
        raise ConfigError("; ".join(problems))
    contexts = {
        name: _context(config, one, identities[name], tokenizer)
        for name, one in asked.items()
        if one.context is not None or name in others
    }
    rows = _rows(config, config.data, tokenizer, route, contexts)
    top = config.trainer.objective.student_top
    train = PromptSource(rows, config.sampling, seed=config.seed, data=config.data, top=top)
    heldout = _heldout(config, tokenizer)
    if problems:
        raise ConfigError("; ".join(problems))
    shown = {row.data_source: row for row in reversed(rows) if row.teacher in contexts}
    most = config.trainer.max_steps or sys.maxsize
    return Preflight(
        fingerprints={n: one.model if (one := identities[n]) else None for n in asked},
        probes={n: one.probe for n, one in agreed.items() if one.probe is not None},
        train=train,
        heldout=heldout,
        total_groups=min(len(train), most * config.trainer.groups_per_step),
        warnings=warnings,
        contexts={source: contexts[row.teacher].text(row) for source, row in shown.items()},
        models=[*(f"{look.who}: {look.said}" for look in seen), *map(str, memory)],
        translators=_translators(student, tokenizer, asked, identities, others),
    )


def _translators(
    student: Fingerprint,
    tokenizer: PreTrainedTokenizerBase,
    teachers: Mapping[str, TeacherConfig],
    identities: Mapping[str, Fingerprint | None],
    others: Sequence[str],
) -> dict[str, Translator]:
    """Of these teachers those that have other tokens than the student; `others` have a tokenizer
    of their own, the rest at most another end."""
    made: dict[str, Translator] = {}
    for name, teacher in teachers.items():
        if (identity := identities[name]) is None:
            continue
        if name in others:
            made[name] = retokenizer(student, tokenizer, teacher, identity)
        elif ends := Ends.between(student.end_tokens, identity.end_tokens):
            made[name] = ends
    return made


def _heldout(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSource | None:
    """The same prompts in every run, whatever its seed: their differences are paired."""
    if (held := config.evaluation) is None:
        return None
    data = held.data.in_order()
    rows = _rows(config, data, tokenizer)
    return PromptSource(rows, held.sampling, seed=config.seed + 1, data=data)


def _teachers(config: RunConfig, chosen: Objective[Any]) -> dict[str, TeacherConfig]:
    """The teachers that the objective asks, or that it samples from."""
    kind = config.trainer.objective.kind
    if chosen.teacher == "none" and chosen.sampler == "student":
        return {}
    if not config.teachers:
        raise ConfigError(f"the objective {kind!r} needs a teacher: set teacher.model")
    if chosen.teacher != "none":
        return {**config.teachers, **config.served}
    if len(config.teachers) > 1:
        raise ConfigError(f"the objective {kind!r} samples from one teacher: leave out the others")
    own = [(one.context, one.weights, one.tokenizer) for one in config.teachers.values()]
    if own != [(None, "fixed", "student")]:
        raise ConfigError(
            f"the objective {kind!r} samples from the teacher's own model, after the student's "
            f"prompt: leave out its context, weights and tokenizer"
        )
    # Whoever serves it, it is loaded here.
    return {name: TeacherConfig(model=one.model) for name, one in config.teachers.items()}


def _engines(config: RunConfig, teachers: Sequence[TeacherConfig]) -> list[str]:
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


def _lacks(
    config: RunConfig,
    who: str,
    teacher: TeacherConfig,
    student: Fingerprint,
    it: Fingerprint | None,
) -> list[str]:
    """What the objective asks that this teacher does not give; endpoints say it themselves."""
    chosen, problems = config.trainer.objective, []
    if not teacher.endpoints:
        with suppress(EngineError):  # which `_engines` says
            problems = lacks(f"the {who}", chosen, model_card(teacher).limits)
    if chosen.student_top and it is not None and it.vocab_size < student.vocab_size:
        problems.append(
            f"the {who} predicts {it.vocab_size} tokens, the student {student.vocab_size}, whose "
            f"most likely ones may be others: set trainer.objective.top_k_of: teacher"
        )
    return problems


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


def _refusals(config: RunConfig, teachers: Sequence[TeacherConfig]) -> list[str]:
    problems = []
    checks: tuple[partial[None], ...] = (
        partial(check_engine, config.rollout, config.student, config.longest_sampled),
        *(partial(check_scorer, one) for one in teachers),
    )
    for refuse in checks:
        try:
            refuse()
        except EngineError as error:
            problems.append(str(error))
    return problems


def _environment(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What keeps the student from answering its environment."""
    environment, problems = config.environment, []
    for kind in environment.used_kinds:
        if ":" in kind:
            try:
                factory(kind)
            except UnknownEnvironment as error:
                problems.append(str(error))
    if environment.used_kinds - {"none"}:
        ends, keeps = end_tokens(config.student), environment.rewritten == "keep"
        continuation = Continuation(tokenizer, ends, keeps_rewritten=keeps)
        problems += [f"environment: {p}" for p in template_problems(continuation, environment.role)]
    return problems


def _rows(
    config: RunConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    route: Route = to_default,
    contexts: Mapping[str, Context] | None = None,
) -> list[Row]:
    try:
        return load_rows(data, tokenizer, route, config.environment, contexts)
    except DataError as error:
        raise ConfigError(str(error)) from None


def _context(
    config: RunConfig,
    teacher: TeacherConfig,
    identity: Fingerprint | None,
    students: PreTrainedTokenizerBase,
) -> Context:
    """How a teacher's context is rendered: with its own chat template, where that is at hand."""
    tokenizer = load_tokenizer(teacher.model) if at_hand(teacher.model) else students
    longest = teacher.max_sequence_tokens or (identity.context_length if identity else 0)
    room = longest - config.sampling.max_tokens if longest else sys.maxsize
    messages: tuple[tuple[str, str], ...] | None = None if teacher.context else ()
    if teacher.context is not None and not isinstance(teacher.context, str):  # "row"
        messages = tuple((message.role, message.content) for message in teacher.context)
    return Context(messages, tokenizer, room)


def _models(
    config: RunConfig,
    student: Fingerprint,
    teachers: Mapping[str, Fingerprint | None],
    others: Sequence[str],
) -> tuple[list[str], list[str]]:
    """What is wrong, and what is only to be known, of the models; `others` have tokens of their
    own, which need not be the student's."""
    problems, warnings = [], []
    reads_more = {called(name) for name, one in config.teachers.items() if one.context}
    compared = {called(name): one for name, one in teachers.items() if name not in others}
    for who, teacher in [("student", student), *compared.items()]:
        if teacher is None:
            warnings.append(
                f"the {who} is not on this machine and its servers do not tell: its tokenizer, "
                f"vocabulary, end tokens and chat template could not be compared with the student's"
            )
            continue
        differing = differences(student, teacher)
        notices = [differing.pop("chat_template")] if "chat_template" in differing else []
        if config.allow_different_end_tokens and "end_tokens" in differing:
            notices.append(differing.pop("end_tokens"))
        elif "end_tokens" in differing:
            differing["end_tokens"] += " (allow_different_end_tokens: true trains all the same)"
        # Where it has a context, what does not fit is left out row by row.
        longest = config.longest_sampled if who == "student" else config.longest
        if teacher.context_length and longest > teacher.context_length and who not in reads_more:
            where = "evaluation." if longest > config.longest else ""
            differing["context"] = (
                f"{where}data.max_prompt_tokens + {where}sampling.max_tokens is {longest}, past "
                f"the {who}'s context of {teacher.context_length}"
            )
        prefix = f"{who}: " if len(teachers) > 1 else ""
        problems += [prefix + sentence for sentence in differing.values()]
        warnings += [prefix + sentence for sentence in notices]
    return problems, warnings
