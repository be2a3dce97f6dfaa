"""The study: do the objectives differ, and how? One command, resumable, in one process.

    python -m examples.arithmetic.study

Every run starts from the same student and ends once it has sampled `TOKENS`
(`examples/one_process.py`). A finished run is one line of `results/runs.jsonl` and is not run
again; `study_report.py` makes tables and plots of them. docs/study.md has the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from examples.arithmetic.task import HERE, Problem
from examples.arithmetic.ways import (
    HELD_OUT_PROMPTS,
    MAX_TOKENS,
    held_out,
    is_misread,
    training,
)
from examples.one_process import Stages
from rollout.prompts import Row
from services.models import load_model
from services.trajectory import (
    Prompt,
    Sampling,
    ScoredGroup,
    Verdict,
)
from services.weights import copy_weights
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Learner
from trainer.objectives.config import LogRatioConfig, ObjectiveConfig
from verifier import exact

STUDENT, TEACHER = HERE / "study-student", HERE / "study-teacher"
RESULTS = HERE / "results"

PROMPTS, ROLLOUTS = 16, 8  # of a step; samples of a prompt
TOKENS = 160_000  # sampled in a run: some 60 steps of the untrained student's answers
SAMPLES = 32  # of each held-out prompt in an evaluation
ROWS_AT_ONCE = 512  # trajectories in one batch of the sampler
LOG_RATIO_BOUND = 2.0  # as in the demo: docs/demo-task.md has the reason
OPTIMIZER = OptimizerConfig(lr=2e-4, warmup_steps=5, betas=(0.9, 0.95), weight_decay=0.0)


@dataclass(frozen=True, slots=True)
class Experiment:
    """An objective by name, and how many seeds it is run with."""

    name: str
    seeds: int
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = TOKENS
    """The run ends after the step in which so many have been sampled."""
    steps: int = 10_000
    """The run ends after so many steps, if that comes first."""

    @property
    def objective(self) -> ObjectiveConfig:
        settings = self.settings or {"kind": self.name}
        bounded = issubclass(ObjectiveConfig.class_for(settings), LogRatioConfig)
        bound = {"log_ratio_bound": LOG_RATIO_BOUND} if bounded else {}
        return ObjectiveConfig.model_validate(bound | settings)


METHODS = [Experiment(name, 5) for name in ("scope", "opd", "grpo", "rft", "kdrl", "kd")]
ABLATIONS = [
    Experiment("no student weights", 5, {"use_student_path_weights": False}),
    Experiment("no teacher weights", 5, {"use_teacher_path_weights": False}),
    Experiment("no weights", 5, {"use_seq_weights": False}),
    Experiment("teacher path reversed", 5, {"teacher_path_ppl_positive": True}),
    *(Experiment(f"τ {tau:g}", 5, {"tau": tau}) for tau in (0.25, 0.5, 1.0, 2.0)),
]


class Bench(Stages):
    """The models and prompts that all runs share."""

    def __init__(self) -> None:
        super().__init__(STUDENT, TEACHER, _judge, max_tokens=MAX_TOKENS, rows_at_once=ROWS_AT_ONCE)

    @cached_property
    def train_rows(self) -> list[Row]:
        return self._rows(training())

    @cached_property
    def held_out_rows(self) -> list[Row]:
        return self._rows(held_out())

    def _rows(self, problems: Sequence[Problem]) -> list[Row]:
        return [
            Row(np.array(self.tokenizer(p.prompt)["input_ids"], np.int32), "arithmetic", p.answer)
            for p in problems
        ]

    def evaluate(self, model: PreTrainedModel, *, seed: int) -> list[int]:
        """How many of `SAMPLES` completions of each held-out prompt are correct."""
        source = self.prompts(self.held_out_rows, SAMPLES, seed=seed, shuffle=False)
        groups = self.sample(model, [source.prompt(order) for order in range(len(source))])
        return [len(self.verify(group).indices("correct")) for group in groups]


def _judge(text: str, reference: str) -> Verdict:
    return exact.judge(text, reference, ";")


def made(bench: Bench, experiment: Experiment, seed: int) -> dict[str, Any]:
    """One run, and its evaluation; a record of `runs.jsonl`."""
    started = time.perf_counter()
    settings = TrainerConfig(
        objective=experiment.objective,
        optimizer=OPTIMIZER,
        groups_per_step=PROMPTS,
        micro_batch_tokens=8192,
    )
    trained = bench.train(
        settings, bench.train_rows, ROLLOUTS,
        seed=seed, steps=experiment.steps, tokens=experiment.tokens,
    )  # fmt: skip
    return {
        "experiment": experiment.name,
        "seed": seed,
        "tokens": experiment.tokens,
        "correct": bench.evaluate(bench.student, seed=1000 + seed),
        "train_accuracy": trained.accuracy,
        "scored_tokens": trained.scored_tokens,
        "sampled_tokens": trained.sampled_tokens,
        "seconds": round(time.perf_counter() - started, 1),
    }


# ------------------------------------------------------- the teacher on the student's prefixes

RATIOS = (0.25, 0.5, 0.75)
CONTINUATIONS = 4
RECOVERY_PROMPTS = 96


def recovery(bench: Bench) -> list[dict[str, Any]]:
    """Does the teacher come back to the right answer from a wrong trajectory's first part?

    Returns:
        For every wrong trajectory of the untrained student its mean NLL under the teacher, whether
        it holds a misread operand (after which this teacher was taught bad advice), and for each
        truncation ratio how many of `CONTINUATIONS` continuations are correct.
    """
    student = load_model(str(STUDENT))
    copy_weights(
        bench.student, Learner(load_model(str(STUDENT)), TrainerConfig(), temperature=1.0).weights()
    )
    source = bench.prompts(bench.train_rows, ROLLOUTS, seed=77, shuffle=True)
    groups = bench.sample(student, [source.prompt(i) for i in range(RECOVERY_PROMPTS)])
    scored = [bench.score(bench.verify(group), "incorrect") for group in groups]
    results: list[dict[str, Any]] = []
    for group in scored:
        for index, logprobs in group.teacher_logprobs.items():
            if group.rollout.trajectories[index].finish == "stop":
                prompt = bench.text(group.prompt.token_ids)
                misread = is_misread(prompt, group.rollout.trajectories[index].text)
                results.append(
                    {
                        "teacher_nll": -float(logprobs.mean()),
                        "misread": misread,
                        "of": (group, index),
                    }
                )
    for ratio in RATIOS:
        prompts = [_prefix(*record["of"], ratio, number) for number, record in enumerate(results)]
        continued = bench.sample(bench.teacher_sampler, prompts)
        for record, prompt, group in zip(results, prompts, continued, strict=True):
            start = bench.text(prompt.token_ids).partition("=")[2]
            correct = sum(
                t.finish == "stop"
                and exact.judge(start + t.text, prompt.reference, ";").outcome == "correct"
                for t in group.trajectories
            )
            record[f"recovered at {ratio:g}"] = correct
    for record in results:
        del record["of"]
    return results


def _prefix(group: ScoredGroup, index: int, ratio: float, number: int) -> Prompt:
    """The prompt and the first part of a trajectory, to be gone on with."""
    tokens = group.rollout.trajectories[index].token_ids
    kept = tokens[: round(ratio * len(tokens))]
    return Prompt(
        id=f"{number}", order=number,
        token_ids=np.concatenate([group.prompt.token_ids, kept]),
        data_source="arithmetic", reference=group.prompt.reference,
        sampling=Sampling(n=CONTINUATIONS, max_tokens=MAX_TOKENS, seed=10_000 + number),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ the study


def read_runs(path: Path = RESULTS / "runs.jsonl") -> list[dict[str, Any]]:
    """All finished runs."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def todo(done: Sequence[dict[str, Any]]) -> Iterator[tuple[Experiment, int]]:
    """What is left, part by part, in each a seed of all before the next seed of any."""
    finished = {(run["experiment"], run["seed"]) for run in done}
    for part in (METHODS, ABLATIONS):
        for seed in range(max(e.seeds for e in part)):
            for experiment in part:
                if seed < experiment.seeds and (experiment.name, seed) not in finished:
                    yield experiment, seed


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    bench = Bench()
    before = RESULTS / "before.json"
    if not before.exists():
        models = {"student": bench.student, "teacher": bench.teacher_sampler}
        measured = {name: bench.evaluate(model, seed=999) for name, model in models.items()}
        before.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    recovered = RESULTS / "recovery.json"
    if not recovered.exists():
        recovered.write_text(
            "[\n" + ",\n".join(map(json.dumps, recovery(bench))) + "\n]\n", encoding="utf-8"
        )
    for experiment, seed in todo(read_runs()):
        record = made(bench, experiment, seed)
        with (RESULTS / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        average = sum(record["correct"]) / (HELD_OUT_PROMPTS * SAMPLES)
        print(f"{experiment.name}, seed {seed}: Avg@{SAMPLES} {average:.1%}, {record['seconds']} s")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
