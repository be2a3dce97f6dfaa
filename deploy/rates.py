"""What `scope plan` reckons with: how fast each stage was measured, and what a prompt asks of it.

Rates come from a finished run's own records (`of_run`), or from a file in which somebody wrote down
what they measured (`load_other(Rates, path)`). What was not measured is None, and nothing is put in
its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field, model_validator

from deploy.config import ConfigError, RunConfig, load
from services.config import Config
from services.metrics import read
from services.teacher_need import SCORED
from teacher.config import TeacherConfig
from trainer.objectives.base import SequenceStats, entering
from trainer.objectives.kinds import objective

Records: TypeAlias = Sequence[dict[str, Any]]

FEWEST = 8  # records after the start that rates are taken from
_WAITS = ("timing_s/wait_groups", "timing_s/wait_publish", "timing_s/wait_checkpoint")
_ROLES = ("rollout", "verifier", "teacher", "learner")  # that have rates
_LEARNING = ("timing_s/perplexity", "timing_s/forward_backward")


class Workload(Config):
    """What one trajectory is like, on average."""

    prompt_tokens: float = Field(gt=0)
    completion_tokens: float = Field(gt=0)
    longest_tokens: float | None = Field(default=None, gt=0)
    """The longest completion of a step."""
    correct: float = Field(ge=0, le=1)
    """Fraction of the trajectories; what is neither correct nor incorrect is not trained on."""
    incorrect: float = Field(ge=0, le=1)
    incorrect_tokens: float | None = Field(default=None, gt=0)
    """Of an incorrect completion; None takes `completion_tokens`."""
    mixed: float | None = Field(default=None, ge=0, le=1)
    """Of the tokens with a verdict, the fraction in groups with correct and incorrect answers."""

    @model_validator(mode="after")
    def _fractions(self) -> Workload:
        if self.correct + self.incorrect > 1 + 1e-6:
            raise ValueError("correct and incorrect are together more than 1")
        return self

    @property
    def tokens_if_correct(self) -> float:
        """Of a correct completion: what the incorrect ones leave of the mean."""
        if not self.correct or self.incorrect_tokens is None:
            return self.completion_tokens
        known = (self.correct + self.incorrect) * self.completion_tokens
        return max(0.0, known - self.incorrect * self.incorrect_tokens) / self.correct

    @property
    def tokens_if_incorrect(self) -> float:
        """Of an incorrect completion."""
        return self.incorrect_tokens or self.completion_tokens


class RolloutRate(Config):
    """One engine, while it samples."""

    tokens_per_s: float = Field(gt=0)
    gpus: float = Field(default=1.0, ge=0)
    """Of the engine that was measured."""
    token_s: float | None = Field(default=None, gt=0)
    """Seconds a token of one answer alone in an engine: no number of engines makes it shorter."""
    sequences: float | None = Field(default=None, ge=1)
    """Answers in one forward, on average."""
    answers: float | None = Field(default=None, ge=1)
    """Of one step, that an engine was given: see `answers_of`."""

    def tokens_per_s_of(self, answers: Any) -> Any:
        """The rate of an engine that is given another number of answers (may be an array). As
        many more or fewer are in a forward, whose seconds are a line through the one that was
        measured and the one of a single answer."""
        if None in (self.token_s, self.sequences, self.answers) or self.sequences == 1:
            return self.tokens_per_s + 0.0 * answers
        assert self.token_s and self.sequences and self.answers
        forward_s = self.sequences / self.tokens_per_s
        slope = max(0.0, forward_s - self.token_s) / (self.sequences - 1)
        inside = np.maximum(1.0, self.sequences * answers / self.answers)
        return inside / (forward_s + slope * (inside - self.sequences))


class TeacherRate(Config):
    """One replica, while it scores: tokens of prompts and completions together."""

    tokens_per_s: float = Field(gt=0)
    gpus: float = Field(default=1.0, ge=0)
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the tokens that are scored, where there are several teachers."""


class LearnerRate(Config):
    """One rank: tokens of prompts and completions through forward and backward."""

    tokens_per_s: float = Field(gt=0)
    step_s: float = Field(default=0.0, ge=0)
    """Of each step, whatever its size: optimizer, publishing, records."""
    gpus: float = Field(default=1.0, ge=0)


class VerifierRate(Config):
    """One worker, while it judges."""

    verdicts_per_s: float = Field(gt=0)


class CpuRate(Config):
    """Processor seconds, where all roles share the cores of one machine."""

    rollout_token_s: float = Field(ge=0)
    verdict_s: float = Field(ge=0)
    teacher_token_s: float | None = Field(default=None, ge=0)
    learner_token_s: float = Field(ge=0)
    learner_step_s: float = Field(default=0.0, ge=0)
    other_cores: float = Field(default=0.0, ge=0)
    """What all else keeps busy meanwhile: driver, Redis, Ray, stages of one's own."""


class Rates(Config):
    """All of it; `about` says where the figures come from, and is printed with every plan."""

    about: str
    workload: Workload
    rollout: RolloutRate | None = None
    verifier: VerifierRate | None = None
    teachers: dict[str, TeacherRate] = Field(default_factory=dict)
    """Of every teacher that was measured, by its name."""
    learner: LearnerRate | None = None
    cpu: CpuRate | None = None
    sampler: str = "student"
    """Who sampled: `student`, or with kd the `teacher`."""

    @model_validator(mode="after")
    def _shares(self) -> Rates:
        total = sum(rate.share for rate in self.teachers.values())
        if self.teachers and abs(total - 1) > 0.01:
            raise ValueError(f"the shares of the teachers add up to {total:g}, not to 1")
        return self


def teachers_of(config: RunConfig) -> dict[str, TeacherConfig]:
    """The teachers that the objective has score, by their names."""
    return {} if objective(config.trainer.objective).teacher == "none" else config.teachers


def of_run(run_dir: Path) -> Rates:
    """The rates of a run, its first fifth (compilation, caches, an empty pipeline) left out.

    Raises:
        ConfigError: not a run directory, or a run too short.
    """
    config, records = load(run_dir / "config.yaml"), read(run_dir)
    settled = records[max(2, len(records) // 5) :]
    if len(settled) < FEWEST:
        raise ConfigError(
            f"{run_dir} has {len(records)} recorded steps; rates are taken from at least {FEWEST} "
            f"after the first {max(2, len(records) // 5)}: let it run longer"
        )
    return of_records(config, settled, about=f"measured in {run_dir}")


def of_records(config: RunConfig, records: Records, *, about: str) -> Rates:
    """The rates between the first and the last of `records`."""
    later, correct = records[1:], _mean(records[1:], "reward/accuracy")
    workload = Workload(
        prompt_tokens=_mean(later, "prompt_length/mean"),
        completion_tokens=_mean(later, "response_length/mean"),
        longest_tokens=_mean(later, "response_length/max"),
        correct=correct,
        incorrect=max(0.0, 1 - correct - _mean(later, "scope/unknown_fraction")),
        incorrect_tokens=_incorrect_tokens(later),
        mixed=_mean(later, "batch/mixed_token_fraction"),
    )
    sampled, sampling_s = (
        _grown(records, f"rollout/{n}") for n in ("sampled_tokens", "sampling_s")
    )
    verdicts, judging_s = (_grown(records, f"verifier/{n}") for n in ("verdicts", "judging_s"))
    scored = _grown(records, "teacher/tokens")
    learned = _learned_tokens(config, later, workload)
    learning_s = sum(_total(later, name) for name in _LEARNING)
    return Rates(
        about=about,
        workload=workload,
        rollout=_rollout(config, records, sampled / sampling_s) if sampled and sampling_s else None,
        verifier=VerifierRate(verdicts_per_s=verdicts / judging_s)
        if verdicts and judging_s
        else None,
        teachers=_teachers(config, records),
        learner=LearnerRate(
            tokens_per_s=learned / learning_s / config.trainer.ranks,
            step_s=_own_s(later) / len(later),
            gpus=config.trainer.resources.gpus,
        ),
        cpu=_cpu(records, sampled, verdicts, scored, learned),
        sampler=objective(config.trainer.objective).sampler,
    )


def _rollout(config: RunConfig, records: Records, tokens_per_s: float) -> RolloutRate:
    gpus, forwards = config.rollout.resources.gpus, _grown(records, "rollout/forwards")
    last = records[-1]
    alone_us = last.get("rollout/forward_us", 0.0) / last.get("rollout/workers", 1.0)
    if not (forwards and alone_us):
        return RolloutRate(tokens_per_s=tokens_per_s, gpus=gpus)
    return RolloutRate(
        tokens_per_s=tokens_per_s,
        gpus=gpus,
        token_s=alone_us / 1e6,
        sequences=max(1.0, _grown(records, "rollout/sampled_tokens") / forwards),
        answers=answers_of(config, config.rollout.workers),
    )


def answers_of(config: RunConfig, workers: Any) -> Any:
    """How many answers of a step each of so many engines has to sample at once, at most. The
    count may be an array."""
    n, rollout = config.sampling.n, config.rollout
    room = n * rollout.capacity
    if rollout.engine.kind != "vllm":
        room = min(room, max(n, rollout.batch_sequences))
    return np.clip(config.trainer.groups_per_step * n / workers, n, room)


def perplexity_apart(config: RunConfig, workload: Workload) -> bool:
    """Whether the learner needs a forward of its own for the perplexities of correct answers: not
    where one rank takes a whole group at once (trainer.learner)."""
    group = config.sampling.n * (workload.prompt_tokens + workload.completion_tokens)
    apart = config.trainer.ranks > 1 or group > config.trainer.micro_batch_tokens
    return apart and objective(config.trainer.objective).student_perplexity


class Learned(NamedTuple):
    """Of one trajectory, on average."""

    tokens: float
    """Prompt and completion through forward and backward, or their worth."""
    trained: float
    """Completions alone, as `tokens/trained` counts."""


def learned_of(config: RunConfig, load: Workload) -> Learned:
    """What the objective has computed of a trajectory: nothing of one that enters no loss. A
    forward alone costs a third."""
    correct, incorrect = (
        f * of for f, of in zip(_enter(config, load), (load.correct, load.incorrect), strict=True)
    )
    trained = correct * load.tokens_if_correct + incorrect * load.tokens_if_incorrect
    tokens = trained + (correct + incorrect) * load.prompt_tokens
    if perplexity_apart(config, load):
        tokens += load.correct * (load.prompt_tokens + load.tokens_if_correct) / 3
    return Learned(tokens, trained)


@dataclass(frozen=True)
class Work:
    """What one step asks of each stage."""

    sampled_tokens: float
    verdicts: float
    scored_tokens: float
    """Prompts and completions that the teacher reads."""
    learned_tokens: float
    """Prompts and completions through forward and backward, or their worth."""
    trained_tokens: float
    """Completions alone, as `tokens/trained` counts."""


def work_of(config: RunConfig, rates: Rates) -> Work:
    """What a step of `config` asks, if its trajectories are like those that were measured.

    Raises:
        ConfigError: the rates are of other samples.
    """
    chosen, load = objective(config.trainer.objective), rates.workload
    if chosen.sampler != rates.sampler:
        raise ConfigError(
            f"{config.trainer.objective.kind} samples from the {chosen.sampler} and the rates are "
            f"of samples from the {rates.sampler}: measure with the same objective"
        )
    trajectories = config.trainer.groups_per_step * config.sampling.n
    tokens = {
        "incorrect": load.incorrect * (load.prompt_tokens + load.tokens_if_incorrect),
        "correct": load.correct * (load.prompt_tokens + load.tokens_if_correct),
    }
    scored = sum(tokens[outcome] for outcome in SCORED[chosen.teacher])
    learned = learned_of(config, load)
    return Work(
        sampled_tokens=trajectories * load.completion_tokens,
        verdicts=trajectories,
        scored_tokens=trajectories * scored,
        learned_tokens=trajectories * learned.tokens,
        trained_tokens=trajectories * learned.trained,
    )


def needs_mixed(config: RunConfig) -> bool:
    """Whether the objective learns from groups with both verdicts alone, as GRPO does."""
    alone, mixed = _entering(config)
    return alone != mixed


def _enter(config: RunConfig, load: Workload) -> tuple[float, float]:
    """The fractions of correct and of incorrect trajectories that enter the loss; at most, where
    it was not measured how many groups are mixed."""
    alone, mixed = _entering(config)
    if load.mixed is None:
        return max(alone[0], mixed[0]), max(alone[1], mixed[1])
    of = load.mixed
    return alone[0] * (1 - of) + mixed[0] * of, alone[1] * (1 - of) + mixed[1] * of


def _entering(config: RunConfig) -> tuple[tuple[float, float], tuple[float, float]]:
    """Whether a correct and an incorrect trajectory enter the loss: in a group of its like, and in
    a mixed one. The objective itself is asked, with three small groups."""
    correct, zeros = torch.tensor([True, True, False, False, True, False]), torch.zeros(6)
    stats = SequenceStats(torch.tensor([0, 0, 1, 1, 2, 2]), correct, ~correct, zeros, zeros)
    chosen = config.trainer.objective
    numbers = entering(objective(chosen), stats, chosen).double().tolist()
    return (numbers[0], numbers[2]), (numbers[4], numbers[5])


def _learned_tokens(config: RunConfig, records: Records, workload: Workload) -> float:
    trajectories = _total(records, "batch/groups") * config.sampling.n
    return trajectories * learned_of(config, workload).tokens


def _teachers(config: RunConfig, records: Records) -> dict[str, TeacherRate]:
    """Of each teacher that was asked."""
    results, named = {}, teachers_of(config)
    scored = _grown(records, "teacher/tokens")
    for name, one in named.items():
        suffix = f"_{name}" if len(named) > 1 else ""
        tokens, asking_s = (_grown(records, f"teacher/{n}{suffix}") for n in ("tokens", "asking_s"))
        if tokens and asking_s:
            asking_s /= max(1.0, _mean(records[1:], "teacher/workers"))  # of the same replicas
            results[name] = TeacherRate(
                tokens_per_s=tokens / asking_s / one.replicas,
                gpus=one.resources.gpus,
                share=tokens / scored,
            )
    return results


def _cpu(
    records: Records, sampled: float, verdicts: float, scored: float, learned: float
) -> CpuRate | None:
    """None where the run did not see the processes of all of its roles."""
    names = {name for record in records for name in record if name.startswith("cpu_s/")}
    used = {name.removeprefix("cpu_s/"): _grown(records, name) for name in names}
    sampling, judging, scoring, learner = (used.pop(role, 0.0) for role in _ROLES)
    if not (learner and sampled and verdicts):
        return None
    later = records[1:]
    own, learning = _own_s(later), sum(_total(later, name) for name in _LEARNING)
    return CpuRate(
        rollout_token_s=sampling / sampled,
        verdict_s=judging / verdicts,
        teacher_token_s=scoring / scored if scored else None,
        learner_token_s=learner * learning / (own + learning) / learned,
        learner_step_s=learner * own / (own + learning) / len(later),
        other_cores=sum(used.values()) / (records[-1]["time"] - records[0]["time"]),
    )


def _own_s(records: Records) -> float:
    """Seconds of the learner that are neither waiting nor proportional to its tokens."""
    return sum(
        float(value)
        for record in records
        for name, value in record.items()
        if name.startswith("timing_s/") and name not in (*_WAITS, *_LEARNING)
    )


def _total(records: Records, name: str) -> float:
    return sum(float(record.get(name, 0.0)) for record in records)


def _mean(records: Records, name: str) -> float:
    """Of the steps that have it.

    Raises:
        ConfigError: none has.
    """
    values = [float(record[name]) for record in records if name in record]
    values = [value for value in values if value == value]
    if not values:
        raise ConfigError(f"the run did not record {name}: rates need a run of this version")
    return float(np.mean(values))


def _incorrect_tokens(records: Records) -> float | None:
    """The mean length of the incorrect answers of all steps; None where there was none."""
    tokens = count = 0.0
    for record in records:
        mean = float(record.get("response_length/incorrect_mean", math.nan))
        if not math.isnan(mean):
            of = 1 - record["reward/accuracy"] - record["scope/unknown_fraction"]
            tokens, count = tokens + of * mean, count + of
    return tokens / count if tokens else None


def _grown(records: Records, name: str) -> float:
    """By how much a counter grew. A worker that was replaced begins again at zero."""
    values = [float(record[name]) for record in records if name in record]
    return sum(max(0.0, after - before) for before, after in pairwise(values))
