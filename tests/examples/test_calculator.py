"""The calculator: an environment of one's own, as its page shows it, and a run that learns it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from deploy.evaluate import Result
from examples.calculator.make_models import HERE, split
from rollout.config import EnvironmentConfig, PromptsConfig, SamplingConfig
from rollout.environments import Environments
from rollout.episodes import Episodes
from rollout.own_weights import read_weights
from rollout.prompts import PromptSource, load_rows
from rollout.transformers_engine import TransformersEngine
from services.metrics import read
from services.models import end_tokens, load_model, load_tokenizer
from services.trajectory import RolloutGroup
from tests.deploy.driver import ROOT, SCOPE, step_of
from tests.waiting import DEADLINE_S, wait_until

ENVIRONMENT = EnvironmentConfig(kind="examples.calculator.calculator:calculator", max_turns=3)


async def played(model: str, count: int) -> list[RolloutGroup]:
    """Episodes of the first held-out prompts, by the weights of a model's folder."""
    path = str(HERE / model)
    data = PromptsConfig(path=str(HERE / "heldout.parquet"), max_prompt_tokens=16).in_order()
    rows = load_rows(data, load_tokenizer(path), environment=ENVIRONMENT)
    source = PromptSource(rows, SamplingConfig(n=8, max_tokens=48), seed=0, data=data)
    ends = end_tokens(path)
    engine = TransformersEngine(load_model(path), ends, batch_sequences=64, probe_tolerance=1e-3)
    await engine.load_weights(read_weights(path))
    play = Episodes(
        engine.sample, load_tokenizer(path), ends, ENVIRONMENT, Environments(ENVIRONMENT)
    )
    groups = [await play.group(source.prompt(order)) for order in range(count)]
    await engine.close()
    return groups


def correct(group: RolloutGroup) -> list[bool]:
    return [t.text == f";{group.prompt.reference}" for t in group.trajectories]


async def test_the_environment_on_the_page_is_the_one_that_runs() -> None:
    page = (ROOT / "docs/environments.md").read_text()
    (shown,) = re.findall(r"```python\n(\"\"\"An environment.*?)```", page, re.DOTALL)
    assert shown == (HERE / "calculator.py").read_text()
    assert len(shown.splitlines()) <= 30
    for group in await played("teacher", 4):
        assert sum(correct(group)) >= 7
        for t, right in zip(group.trajectories, correct(group), strict=True):
            if right:
                assert t.episode is not None and t.episode.turns == 2
                heard = f"[{group.prompt.reference}]"
                assert int((~t.sampled).sum()) == len(heard)


async def test_the_student_can_call_and_mostly_guesses() -> None:
    groups = await played("student", 16)
    turns = [t.episode.turns for g in groups for t in g.trajectories if t.episode]
    assert 0.05 < sum(count > 1 for count in turns) / len(turns) < 0.6
    assert 0.05 < sum(sum(correct(g)) for g in groups) / len(turns) < 0.6


def test_no_prompt_is_trained_on_and_held_out() -> None:
    train, held_out = split()
    assert not set(train) & set(held_out)


@pytest.mark.slow
def test_a_run_learns_to_call_it_and_loses_nothing_when_its_sampler_and_its_redis_are_killed(
    tmp_path: Path,
) -> None:
    """Held-out accuracy rises by more than 20 points, and every prompt is trained once."""
    command = [
        SCOPE, "run", HERE / "run.yaml", f"runs_dir={tmp_path}", "evaluation.prompts=64",
        "ray.dashboard=false", "stage.lease_s=3",
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    directory = tmp_path / "calculator"
    try:
        for step, victim in ((2, "ray::RolloutWorker"), (8, "-server unixsocket")):
            wait_until(lambda step=step: run.poll() is not None or step_of(directory) >= step)
            (process,) = (
                p for p in psutil.Process(run.pid).children(recursive=True)
                if victim in " ".join(p.cmdline())
            )  # fmt: skip
            os.kill(process.pid, signal.SIGKILL)
        assert run.wait(DEADLINE_S) == 0
    finally:
        run.terminate()
        run.wait()
    ledger = json.loads((directory / "ledger.json").read_text())
    records = read(directory)
    assert ledger["fed"] == ledger["trained"] == sum(r["batch/groups"] for r in records)
    assert ledger["dead"] == 0
    assert records[-1]["episode/turns"] > records[0]["episode/turns"]
    before, after = (
        Result.of_json(json.loads((directory / f"evaluation-{label}.json").read_text()))
        for label in ("before", "after")
    )
    assert after.score.avg_at_k.value - before.score.avg_at_k.value > 0.2
