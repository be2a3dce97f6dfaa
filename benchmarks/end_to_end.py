"""Generation, scoring and learning: a `scope run` with all its processes, against TRL's trainers.

Both sample eight answers to each of eight prompts a step from the same student, ask the same
teacher and take the same kind of step, with the time limit that matters to a user: wall time on
all cores. The models are random; every ninety-fourth token ends an answer, so lengths are spread
as in `benchmarks.frozen`, most short and some long, and the learning rate is too small to move
them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from trl import DistillationConfig
from trl.experimental.iw_opd import IWOPDConfig

from benchmarks import trl_peers
from benchmarks.frozen import VOCAB, make_model, make_tokenizer
from benchmarks.rows import Row, machine

PROMPTS, N, PROMPT_TOKENS, MAX_TOKENS = 8, 8, 24, 384
ENDS = list(range(1, VOCAB, 94))
STEPS = 16
WARM_UP = 4  # our first steps wait for nothing to be in flight yet
TRL_STEPS = 4
TRL_MICRO = (8, 16, 32)
UNIT = "trained tokens/s, generation and scoring included"


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prompts = _prepare(directory)
        ours = _ours(directory)
        results = {}
        for kind in ("IWOPDTrainer", "DistillationTrainer"):
            rates = {}
            for micro in TRL_MICRO:
                rates[micro] = _trl(kind, directory, prompts, micro)
                _say(f"TRL {kind}, {micro} sequences a forward: {rates[micro]:,.0f}")
            best = max(rates, key=lambda m: rates[m])
            results[kind] = (rates[best], f"its best of {TRL_MICRO}: {best} sequences a forward")
    return [
        Row(f"end to end: TRL {kind}", ours, rate, UNIT, machine(), note=note)
        for kind, (rate, note) in results.items()
    ]


def _say(line: str) -> None:
    """What has been measured so far: the whole takes minutes."""
    print(line, file=sys.stderr, flush=True)


def _prepare(directory: Path) -> list[str]:
    """Writes both models and the prompts."""
    for seed, name in enumerate(("student", "teacher")):
        model = make_model(seed)
        model.generation_config.eos_token_id = ENDS
        model.config.eos_token_id = ENDS
        model.save_pretrained(directory / name)
        make_tokenizer().save_pretrained(directory / name)
    random = np.random.default_rng(0)
    prompts = [
        " ".join(map(str, random.integers(2, VOCAB, PROMPT_TOKENS))) for _ in range(PROMPTS * STEPS)
    ]
    lines = [
        {"prompt": [{"role": "user", "content": p}], "data_source": "random",
         "reward_model": {"ground_truth": "no answer is this", "style": "rule"}}
        for p in prompts
    ]  # fmt: skip
    (directory / "prompts.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8"
    )
    return prompts


def _ours(directory: Path) -> float:
    """Trained tokens/s between the records of two steps of a run."""
    config = {
        "name": "bench",
        "student": str(directory / "student"),
        "data": {"path": str(directory / "prompts.jsonl"), "max_prompt_tokens": 64},
        "sampling": {"n": N, "max_tokens": MAX_TOKENS},
        "rollout": {"engine": {"kind": "transformers"}, "torch_threads": 1, "capacity": PROMPTS,
                    "resources": {"cpus": 0.5}},
        "verifier": {"kind": "exact", "resources": {"cpus": 0.1}},
        "teacher": {"model": str(directory / "teacher"), "engine": {"kind": "transformers"},
                    "resources": {"cpus": 0.5}},
        "scoring": {"port": 0},
        "trainer": {"objective": {"kind": "opd"}, "optimizer": {"lr": 1e-6}, "torch_threads": 1,
                    "groups_per_step": PROMPTS, "micro_batch_tokens": 2048,
                    "resources": {"cpus": 0.5}, "checkpoint": {"every_steps": 1000}},
        "ray": {"num_cpus": 4, "dashboard": False},
        "runs_dir": str(directory / "runs"),
    }  # fmt: skip
    (directory / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = "import sys; from deploy.cli import main; main(sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", command, "run", str(directory / "run.yaml")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = (
        (directory / "runs" / "bench" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    steps = [json.loads(line) for line in metrics][WARM_UP - 1 :]
    tokens = sum(step["tokens/trained"] for step in steps[1:])
    rate = float(tokens / (steps[-1]["time"] - steps[0]["time"]))
    phases = {
        name.removeprefix("timing_s/"): statistics.mean(step[name] for step in steps[1:])
        for name in steps[-1]
        if name.startswith("timing_s/")
    }
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())
    _say(f"ours: {rate:,.0f}; a step of the learner: {spent}")
    return rate


def _trl(kind: str, directory: Path, prompts: list[str], micro: int) -> float:
    """Trained tokens/s of the steps after the first."""
    torch.set_num_threads(os.cpu_count() or 1)
    watch = trl_peers.Stopwatch(wall=True)
    settings = trl_peers.common(
        directory / "trl", sequences=PROMPTS * N, micro=micro, steps=TRL_STEPS, lr=1e-6
    ) | {"max_completion_length": MAX_TOKENS}
    models = {"model": str(directory / "student"), "teacher_model": str(directory / "teacher")}
    made: Any
    with trl_peers.quiet():
        if kind == "IWOPDTrainer":
            # It divides by the tokens of the data set's own answers, though it trains on samples:
            # without any it divides by 0.
            answer = {"role": "assistant", "content": " 2" * 94}
            messages = [[{"role": "user", "content": p}, answer] for p in prompts]
            made = trl_peers.CountingIWOPD(
                **models,
                args=IWOPDConfig(
                    **settings, lmbda=1.0, distillation_objective="iw_opd", iw_opd_gamma=0.0,
                    max_length=2 * MAX_TOKENS, num_generations=N, top_p=1.0,
                ),
                train_dataset=Dataset.from_dict({"messages": messages}),
                callbacks=[watch],
            )  # fmt: skip
        else:  # it samples one answer a prompt, so each prompt comes N times
            made = trl_peers.CountingDistillation(
                **models,
                args=DistillationConfig(**settings, beta=1.0, shuffle_dataset=False),
                train_dataset=Dataset.from_dict({"prompt": [p for p in prompts for _ in range(N)]}),
                callbacks=[watch],
            )
        made.train()
    tokens = sum(made.trained_tokens[step] for step in range(1, TRL_STEPS))
    return float(tokens / sum(watch.seconds[1:]))
