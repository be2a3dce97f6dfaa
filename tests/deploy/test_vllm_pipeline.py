"""The demo with a student that vLLM samples, and vLLM killed in the middle: `make trials` has it as
the teacher as well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from services.metrics import read
from tests.deploy.driver import ROOT, SCOPE, step_of
from tests.waiting import DEADLINE_S

STEPS, GROUPS = 12, 4


def start(runs: Path) -> subprocess.Popen[bytes]:
    arguments = [
        "run", "deploy/runs/demo.yaml", f"runs_dir={runs}", "rollout.engine.kind=vllm",
        f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}", "evaluation=null",
        "ray.dashboard=false", "stage.lease_s=3",
    ]  # fmt: skip
    with (runs / "output.log").open("w") as log:
        return subprocess.Popen([SCOPE, *arguments], cwd=ROOT, stdout=log, stderr=log)


def sampling_process(run: subprocess.Popen[bytes]) -> psutil.Process:
    """The process in which vLLM holds the student."""
    (core,) = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if "EngineCore" in " ".join(process.cmdline())
    ]
    return core


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_the_demo_on_vllm_survives_its_death_with_an_exact_ledger(tmp_path: Path) -> None:
    run = start(tmp_path)
    ledger = tmp_path / "demo" / "ledger.json"
    deadline = time.monotonic() + DEADLINE_S
    killed = False
    while run.poll() is None and time.monotonic() < deadline:
        if not killed and step_of(tmp_path / "demo") >= 1:
            os.kill(sampling_process(run).pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    if run.poll() is None:
        run.terminate()
        run.wait()
    output = (tmp_path / "output.log").read_text()
    assert run.returncode == 0, output
    assert killed and "died; starting it again" in output
    total = STEPS * GROUPS
    counts = json.loads(ledger.read_text())
    assert {k: counts[k] for k in ("fed", "trained", "dead", "in_flight")} == {
        "fed": total, "trained": total, "dead": 0, "in_flight": 0,
    }  # fmt: skip
    records = read(tmp_path / "demo")
    assert sum(r["batch/groups"] for r in records) == total
    fresh = [r["sampling/logp_difference"] for r in records if r["staleness/mean"] == 0]
    assert fresh and max(fresh) < 1e-4  # vLLM's log-probs and the learner's own
