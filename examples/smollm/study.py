"""Methods on the real model: the same student, prompts, random numbers and steps for each.

    python -m examples.smollm.study [--seeds 3] [--only scope opd …]

As `run.yaml`, in one process (`examples/one_process.py`): the student of before is the teacher,
which reads the solution as well. A finished run is one line of `results/study.jsonl` and is not run
again. Two processes with other names after `--only` may run side by side. Prints the table of
docs/study.md: Student's intervals over seeds, differences paired by seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.accuracy import Estimate, over_seeds
from deploy.config import load
from examples.one_process import Stages, Trained
from examples.smollm import fetch
from examples.smollm.distil import CONFIG, COOL
from examples.smollm.measure import MAX_TOKENS, SAMPLES, Tally, ids, measure_loaded
from examples.smollm.task import (
    HELD_OUT,
    HELD_OUT_PROMPTS,
    HELD_OUT_SEED,
    TRAIN,
    TRAIN_PROMPTS,
    TRAIN_SEED,
    distinct,
)
from rollout.prompts import Row
from services.trajectory import Verdict
from trainer.config import TrainerConfig
from trainer.objectives.config import LogRatioConfig, ObjectiveConfig
from verifier import math_answer

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "scope": {},
    "opd": {"kind": "opd"},
    "rft": {"kind": "rft"},
    "no weights": {"use_seq_weights": False},
    "no student weights": {"use_student_path_weights": False},
    "no teacher weights": {"use_teacher_path_weights": False},
    "teacher path reversed": {"teacher_path_ppl_positive": True},
}
BOUND = 5.0  # of the log-ratio, as in `run.yaml`
ROLLOUTS, ROWS_AT_ONCE = 8, 64
COUNTS = ("correct", "formed", "asked")  # of a `Tally`
WARM, COLD = "temperature 1", f"temperature {COOL}"


class Bench(Stages):
    """The models and stories that all runs share."""

    def __init__(self) -> None:
        super().__init__(
            fetch.MODEL, fetch.MODEL, _judge, max_tokens=MAX_TOKENS, rows_at_once=ROWS_AT_ONCE
        )

    @cached_property
    def train_rows(self) -> list[Row]:
        return [
            Row(
                np.array(ids(story, self.tokenizer, hints=False), np.int32),
                "stories",
                story.answer,
                teacher_context=np.array(ids(story, self.tokenizer, hints=True), np.int32),
            )
            for story in distinct(TRAIN, TRAIN_SEED, TRAIN_PROMPTS)
        ]

    def tallies(self, temperature: float) -> list[Tally]:
        """Of the held-out stories, by the weights that `student` has."""
        stories = distinct(HELD_OUT, HELD_OUT_SEED, HELD_OUT_PROMPTS)
        return measure_loaded(
            self.student, self.tokenizer, self.ends, stories, temperature=temperature
        )


def _judge(text: str, reference: str) -> Verdict:
    return math_answer.judge(text, reference, "hashes")


def settings(name: str) -> TrainerConfig:
    """`run.yaml`'s, with the objective of an experiment."""
    shipped = load(CONFIG).trainer
    bounded = issubclass(ObjectiveConfig.class_for(EXPERIMENTS[name]), LogRatioConfig)
    bound = {"log_ratio_bound": shipped.objective.bound} if bounded else {}
    chosen = ObjectiveConfig.model_validate(bound | EXPERIMENTS[name])
    return shipped.model_copy(update={"objective": chosen})


def made(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """One run and what it came to; a record of `study.jsonl`."""
    started, trainer = time.perf_counter(), settings(name)

    def say(so_far: Trained) -> None:
        print(f"{name}, seed {seed}, step {len(so_far.accuracy)}: "
              f"{so_far.accuracy[-1]:.1%} of the samples correct", flush=True)  # fmt: skip

    trained = bench.train(
        trainer, bench.train_rows, ROLLOUTS, seed=seed, steps=trainer.max_steps or 0, each_step=say
    )
    return {
        "experiment": name,
        "seed": seed,
        "train_accuracy": trained.accuracy,
        "sampled_tokens": trained.sampled_tokens,
        WARM: counts(bench.tallies(1.0)),
        COLD: counts(bench.tallies(COOL)),
        "seconds": round(time.perf_counter() - started, 1),
    }


def counts(tallies: Sequence[Tally]) -> dict[str, list[int]]:
    """Of each held-out story's `SAMPLES` answers."""
    return {what: [getattr(tally, what) for tally in tallies] for what in COUNTS}


def read_runs() -> list[dict[str, Any]]:
    """All finished runs."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def todo(
    done: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: int
) -> Iterator[tuple[str, int]]:
    """What is left, a seed of all before the next seed of any."""
    finished = {(run["experiment"], run["seed"]) for run in done}
    for seed in range(seeds):
        for name in names:
            if (name, seed) not in finished:
                yield name, seed


# ------------------------------------------------------------------------------------ the table


def share(run: Mapping[str, Any], temperature: str, what: str) -> float:
    """Of all answers; of `correct` it is Avg@8."""
    return float(np.mean(run[temperature][what]) / SAMPLES)


def passed(run: Mapping[str, Any], temperature: str) -> float:
    """Pass@8: the share of stories with a right answer among the eight."""
    return float(np.mean([count > 0 for count in run[temperature]["correct"]]))


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One row an experiment, in Markdown."""
    by_name: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["experiment"], {})[run["seed"]] = run
    lines = [
        f"| | seeds | Avg@8, {WARM} | Avg@8, {COLD} | in form, {COLD} | Pass@8, {WARM} "
        f"| Avg@8 − SCOPE's, {COLD} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in EXPERIMENTS if name in by_name):
        seeds = by_name[name]
        figures = [
            over_seeds([share(run, WARM, "correct") for run in seeds.values()]),
            over_seeds([share(run, COLD, "correct") for run in seeds.values()]),
            over_seeds([share(run, COLD, "formed") for run in seeds.values()]),
            over_seeds([passed(run, WARM) for run in seeds.values()]),
        ]
        paired = [
            share(run, COLD, "correct") - share(by_name["scope"][seed], COLD, "correct")
            for seed, run in seeds.items()
            if seed in by_name.get("scope", {})
        ]
        against = "–" if name == "scope" or not paired else points(over_seeds(paired), "+")
        cells = " | ".join(points(figure) for figure in figures)
        lines.append(f"| {name} | {len(seeds)} | {cells} | {against} |")
    return "\n".join(lines)


def points(e: Estimate, sign: str = "") -> str:
    """In points, with half of the interval; of one seed there is none."""
    half = f" ± {50 * (e.high - e.low):.1f}" if np.isfinite(e.high) else ""
    return f"{100 * e.value:{sign}.1f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="0 prints what there is")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.seeds:
        fetch.main()
        RESULTS.parent.mkdir(exist_ok=True)
        bench = Bench()
        for name, seed in todo(read_runs(), options.only, options.seeds):
            record = made(bench, name, seed)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(table(read_runs()))


if __name__ == "__main__":
    main()
