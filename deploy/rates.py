"""What `scope plan` reckons with: how fast each stage was measured, and what a prompt asks of it.

Rates come from a finished run's own records (`of_run`), or from a file in which somebody wrote down
what they measured (`load_other(Rates, path)`). What was not measured is None, and nothing is put in
its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from deploy.config import ConfigError, RunConfig, load
from services.config import Config
from services.metrics import read
from teacher.config import TeacherConfig
from trainer.objectives import objective

Records: TypeAlias = Sequence[dict[str, Any]]

FEWEST = 8  # records after the start that rates are taken from
_WAITS = ("timing_s/wait_groups", "timing_s/wait_publish", "timing_s/wait_checkpoint")
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

    @model_validator(mode="after")
    def _fractions(self) -> Workload:
        if self.correct + self.incorrect > 1 + 1e-6:
            raise ValueError("correct and incorrect are together more than 1")
        return self


class RolloutRate(Config):
    """One engine, while it samples."""

    tokens_per_s: float = Field(gt=0)
    gpus: float = Field(default=1.0, ge=0)
    """Of the engine that was measured."""
    token_s: float | None = Field(default=None, gt=0)
    """Seconds a token of one answer alone in an engine: no number of engines makes it shorter."""


class TeacherRate(Config):
    """One replica, while it scores: tokens of prompts and completions together."""

    tokens_per_s: float = Field(gt=0)
    gpus: float = Field(default=1.0, ge=0)


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
    """What driver, Redis and Ray keep busy meanwhile."""


class Rates(Config):
    """All of it; `about` says where the figures come from, and is printed with every plan."""

    about: str
    workload: Workload
    rollout: RolloutRate | None = None
    verifier: VerifierRate | None = None
    teacher: TeacherRate | None = None
    learner: LearnerRate | None = None
    cpu: CpuRate | None = None
    sampler: str = "student"
    """Who sampled: `student`, or with kd the `teacher`."""


def teacher_of(config: RunConfig) -> TeacherConfig:
    """The config's first teacher; where it has none, one that nobody asks."""
    return config.teacher or TeacherConfig(model="none")


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
    later = records[1:]
    workload = Workload(
        prompt_tokens=_mean(later, "prompt_length/mean"),
        completion_tokens=_mean(later, "response_length/mean"),
        longest_tokens=_mean(later, "response_length/max"),
        correct=_mean(later, "reward/accuracy"),
        incorrect=1 - _mean(later, "reward/accuracy") - _mean(later, "scope/unknown_fraction"),
        incorrect_tokens=_mean(later, "response_length/incorrect_mean"),
    )
    sampled, sampling_s = (
        _grown(records, f"rollout/{n}") for n in ("sampled_tokens", "sampling_s")
    )
    verdicts, judging_s = (_grown(records, f"verifier/{n}") for n in ("verdicts", "judging_s"))
    scored, asking_s = (_grown(records, f"teacher/{n}") for n in ("tokens", "asking_s"))
    asking_s /= max(1.0, _mean(later, "teacher/workers"))  # each waits for the same replicas
    teacher, engine = teacher_of(config), config.rollout.resources
    learned = _learned_tokens(config, later, workload)
    learning_s = sum(_total(later, name) for name in _LEARNING)
    return Rates(
        about=about,
        workload=workload,
        rollout=RolloutRate(tokens_per_s=sampled / sampling_s, gpus=engine.gpus)
        if sampled and sampling_s
        else None,
        verifier=VerifierRate(verdicts_per_s=verdicts / judging_s)
        if verdicts and judging_s
        else None,
        teacher=TeacherRate(
            tokens_per_s=scored / asking_s / teacher.replicas, gpus=teacher.resources.gpus
        )
        if scored and asking_s
        else None,
        learner=LearnerRate(
            tokens_per_s=learned / learning_s / config.trainer.ranks,
            step_s=_own_s(later) / len(later),
            gpus=config.trainer.resources.gpus,
        ),
        cpu=_cpu(records, sampled, verdicts, scored, learned),
        sampler=objective(config.trainer.objective).sampler,
    )


def perplexity_apart(config: RunConfig, workload: Workload) -> bool:
    """Whether the learner needs a forward of its own for the perplexities of correct answers: not
    where one rank takes a whole group at once (trainer.learner)."""
    group = config.sampling.n * (workload.prompt_tokens + workload.completion_tokens)
    apart = config.trainer.ranks > 1 or group > config.trainer.micro_batch_tokens
    return apart and objective(config.trainer.objective).student_perplexity


def learned_per_trajectory(config: RunConfig, workload: Workload) -> float:
    """Tokens through forward and backward, or their worth: a forward alone costs a third."""
    passes = workload.correct + workload.incorrect
    if perplexity_apart(config, workload):
        passes += workload.correct / 3
    return passes * (workload.prompt_tokens + workload.completion_tokens)


def _learned_tokens(config: RunConfig, records: Records, workload: Workload) -> float:
    trajectories = _total(records, "batch/groups") * config.sampling.n
    return trajectories * learned_per_trajectory(config, workload)


def _cpu(
    records: Records, sampled: float, verdicts: float, scored: float, learned: float
) -> CpuRate | None:
    """None where the run did not see the processes of all of its roles."""
    used = {name: _grown(records, f"cpu_s/{name}") for name in ("rollout", "verifier", "teacher")}
    learner = _grown(records, "cpu_s/learner")
    if not (learner and sampled and verdicts):
        return None
    later = records[1:]
    own, learning = _own_s(later), sum(_total(later, name) for name in _LEARNING)
    other = _grown(records, "cpu_s/other") + _grown(records, "cpu_s/redis")
    return CpuRate(
        rollout_token_s=used["rollout"] / sampled,
        verdict_s=used["verifier"] / verdicts,
        teacher_token_s=used["teacher"] / scored if scored else None,
        learner_token_s=learner * learning / (own + learning) / learned,
        learner_step_s=learner * own / (own + learning) / len(later),
        other_cores=other / (records[-1]["time"] - records[0]["time"]),
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


def _grown(records: Records, name: str) -> float:
    """By how much a counter grew. A worker that was replaced begins again at zero."""
    values = [float(record[name]) for record in records if name in record]
    return sum(max(0.0, after - before) for before, after in pairwise(values))
