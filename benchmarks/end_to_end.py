"""Generation, scoring and learning: a `scope run` with all its processes, against TRL's trainers.

Both sample eight answers to each prompt of a step from the same student, ask the same teacher and
take the same kind of step, with the time limit that matters to a user: wall time on all cores. The
learning rate is too small to move the student. With `tiny` the models are random; every
ninety-fourth token ends an answer, so lengths are spread as in `benchmarks.frozen`, most short and
some long. With `smollm` it is SmolLM2 on the stories of `examples/smollm`, whose answers are short.

A machine's speed drifts over the minutes that one measurement takes. A first round finds each
trainer's best count of sequences in a forward; then ours and each trainer come in turn, several
times, and each turn has its own ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DistillationConfig
from trl.experimental.iw_opd import IWOPDConfig

from benchmarks import smollm, trl_peers
from benchmarks.frozen import VOCAB, Models, make_model, make_tokenizer
from benchmarks.kept import Kept, say
from benchmarks.rows import Row, in_turn
from examples.smollm import task

N = 8  # answers to a prompt
TRL_MICRO = (8, 16, 32)
UNIT = "trained tokens/s, generation and scoring included"

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained on what, and for how long."""

    models: Models
    chats: Callable[[int], list[Chat]]  # that many, each with an answer at its end
    prompts: int  # of a step
    max_prompt_tokens: int
    max_tokens: int  # of an answer
    micro_batch_tokens: int
    steps: int
    warm_up: int  # our first steps wait for nothing to be in flight yet
    trl_steps: int
    trl_choosing_steps: int  # in the first round


def _tiny_model(seed: int) -> PreTrainedModel:
    model, ends = make_model(seed), list(range(1, VOCAB, 94))
    model.generation_config.eos_token_id = ends
    model.config.eos_token_id = ends
    return model


def _random_chats(count: int) -> list[Chat]:
    random, answer = np.random.default_rng(0), " 2" * 94
    prompts = (" ".join(map(str, random.integers(2, VOCAB, 24))) for _ in range(count))
    return [_chat(prompt, answer) for prompt in prompts]


def _stories(count: int) -> list[Chat]:
    return [
        [*task.chat(story), {"role": "assistant", "content": story.solution}]
        for story in smollm.stories(count)
    ]


def _chat(prompt: str, answer: str) -> Chat:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


CASES = {
    "tiny": Case(
        Models(partial(_tiny_model, 0), partial(_tiny_model, 1), make_tokenizer), _random_chats,
        prompts=8, max_prompt_tokens=64, max_tokens=384, micro_batch_tokens=2048,
        steps=16, warm_up=4, trl_steps=4, trl_choosing_steps=3,
    ),
    "smollm": Case(
        smollm.SMOLLM, _stories,
        prompts=smollm.PROMPTS, max_prompt_tokens=320, max_tokens=smollm.MAX_TOKENS,
        micro_batch_tokens=1024, steps=8, warm_up=3, trl_steps=3, trl_choosing_steps=2,
    ),
}  # fmt: skip


def rows(model: str, pairs: int, kept: Path | None) -> list[Row]:
    """One row a trainer.

    Args:
        model: a key of `CASES`.
        pairs: how often everyone is measured, in turn.
        kept: where finished measurements are kept until all are.
    """
    measured = Kept(kept, UNIT)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _prepare(CASES[model], directory)
        best = {kind: _best_micro(measured, model, kind, directory) for kind in TRL}
        turns = [_turn(measured, model, pair, best, directory) for pair in range(pairs)]
    return [
        in_turn(
            f"end to end, {model}: TRL {kind}", [turn["ours"] for turn in turns],
            [turn[kind] for turn in turns], UNIT,
            f"its best of {TRL_MICRO} sequences a forward: {micro}",
        )
        for kind, micro in best.items()
    ]  # fmt: skip


def _best_micro(measured: Kept, model: str, kind: str, directory: Path) -> int:
    """The count of sequences in a forward that makes a trainer fastest."""

    def rate(micro: int) -> float:
        """0 where the system kills it, as it does for want of memory."""
        try:
            steps = CASES[model].trl_choosing_steps
            return _trl_apart(kind, model, directory, micro, steps)
        except BrokenProcessPool:
            return 0.0

    key = (model, "choosing", kind)
    return max(TRL_MICRO, key=lambda micro: measured.rate(*key, micro, measure=lambda: rate(micro)))


def _turn(
    measured: Kept, model: str, pair: int, best: dict[str, int], directory: Path
) -> dict[str, float]:
    """Ours and each trainer, one after the other. A turn that was interrupted is taken again as a
    whole: its ratios are of one time."""
    key, steps = (model, f"turn {pair + 1}"), CASES[model].trl_steps
    if not all(measured.has(*key, who) for who in ("ours", *TRL)):
        measured.forget(*key)
    rates = {"ours": measured.rate(*key, "ours", measure=lambda: _ours(CASES[model], directory))}
    for kind, micro in best.items():
        take = partial(_trl_apart, kind, model, directory, micro, steps)
        rates[kind] = measured.rate(*key, kind, measure=take)
    return rates


def _prepare(case: Case, directory: Path) -> None:
    """Writes both models and the chats."""
    for make, name in ((case.models.student, "student"), (case.models.teacher, "teacher")):
        make().save_pretrained(directory / name)
        case.models.tokenizer().save_pretrained(directory / name)
    chats = case.chats(case.prompts * case.steps)
    (directory / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    lines = [
        {"prompt": chat[:-1], "data_source": "random",
         "reward_model": {"ground_truth": "no answer is this", "style": "rule"}}
        for chat in chats
    ]  # fmt: skip
    (directory / "prompts.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8"
    )


def _config(case: Case, directory: Path, runs: Path) -> dict[str, Any]:
    """Of our run."""
    return {
        "name": "bench",
        "student": str(directory / "student"),
        "data": {"path": str(directory / "prompts.jsonl"),
                 "max_prompt_tokens": case.max_prompt_tokens},
        "sampling": {"n": N, "max_tokens": case.max_tokens},
        "rollout": {"engine": {"kind": "transformers"}, "torch_threads": 1,
                    "capacity": case.prompts, "resources": {"cpus": 0.5}},
        "verifier": {"kind": "exact", "resources": {"cpus": 0.1}},
        "teacher": {"model": str(directory / "teacher"), "engine": {"kind": "transformers"},
                    "resources": {"cpus": 0.5}},
        "scoring": {"port": 0},
        "trainer": {"objective": {"kind": "opd"}, "optimizer": {"lr": 1e-6}, "torch_threads": 1,
                    "groups_per_step": case.prompts, "micro_batch_tokens": case.micro_batch_tokens,
                    "resources": {"cpus": 0.5}, "checkpoint": {"every_steps": 1000}},
        "ray": {"num_cpus": 4, "dashboard": False},
        "runs_dir": str(runs),
    }  # fmt: skip


def _ours(case: Case, directory: Path) -> float:
    """Trained tokens/s between the records of two steps of a run."""
    command = "import sys; from deploy.cli import main; main(sys.argv[1:])"
    with tempfile.TemporaryDirectory(dir=directory, ignore_cleanup_errors=True) as name:
        runs, file = Path(name), Path(name) / "run.yaml"
        file.write_text(yaml.safe_dump(_config(case, directory, runs)), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-c", command, "run", str(file)],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        metrics = (runs / "bench" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in metrics][case.warm_up - 1 :]
    say(f"a step of our learner: {_spent(steps[1:])}")
    tokens = sum(step["tokens/trained"] for step in steps[1:])
    return float(tokens / (steps[-1]["time"] - steps[0]["time"]))


def _spent(steps: Sequence[dict[str, float]]) -> str:
    """Mean seconds of each phase."""
    phases = {
        name.removeprefix("timing_s/"): statistics.mean(step[name] for step in steps)
        for name in steps[-1]
        if name.startswith("timing_s/")
    }
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())


def _trl_apart(kind: str, model: str, directory: Path, micro: int, steps: int) -> float:
    """`_trl` in a process of its own, as our run is: what one leaves in memory or in threads is not
    the next one's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_trl, kind, model, directory, micro, steps).result()


def _trl(kind: str, model: str, directory: Path, micro: int, steps: int) -> float:
    """Trained tokens/s of the steps after the first."""
    torch.set_num_threads(os.cpu_count() or 1)
    case, watch = CASES[model], trl_peers.Stopwatch(wall=True)
    with tempfile.TemporaryDirectory(dir=directory) as out, trl_peers.quiet():
        made = TRL[kind](case, directory, watch, trl_peers.common(
            Path(out), sequences=case.prompts * N, micro=micro, steps=steps, lr=1e-6
        ) | {"max_completion_length": case.max_tokens})  # fmt: skip
        made.train()
    tokens = sum(made.trained_tokens[step] for step in range(1, steps))
    return float(tokens / sum(watch.seconds[1:]))


def _models(directory: Path) -> dict[str, str]:
    return {"model": str(directory / "student"), "teacher_model": str(directory / "teacher")}


def _chats(directory: Path) -> list[Chat]:
    chats: list[Chat] = json.loads((directory / "chats.json").read_text(encoding="utf-8"))
    return chats


def _iw_opd(
    case: Case, directory: Path, watch: trl_peers.Stopwatch, settings: dict[str, Any]
) -> trl_peers.CountingIWOPD:
    """It divides by the tokens of the data set's own answers, though it trains on samples: without
    any it divides by 0."""
    return trl_peers.CountingIWOPD(
        **_models(directory),
        args=IWOPDConfig(
            **settings, lmbda=1.0, distillation_objective="iw_opd", iw_opd_gamma=0.0,
            max_length=2 * max(case.max_tokens, case.max_prompt_tokens), num_generations=N,
            top_p=1.0,
        ),
        train_dataset=Dataset.from_dict({"messages": _chats(directory)}),
        callbacks=[watch],
    )  # fmt: skip


def _distillation(
    case: Case, directory: Path, watch: trl_peers.Stopwatch, settings: dict[str, Any]
) -> trl_peers.CountingDistillation:
    """It samples one answer a prompt, so each prompt comes N times."""
    prompts = [chat[:-1] for chat in _chats(directory) for _ in range(N)]
    return trl_peers.CountingDistillation(
        **_models(directory),
        args=DistillationConfig(**settings, beta=1.0, shuffle_dataset=False),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[watch],
    )


TRL: dict[str, Callable[..., Any]] = {
    "IWOPDTrainer": _iw_opd,
    "DistillationTrainer": _distillation,
}
