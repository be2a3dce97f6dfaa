"""One real run of a few steps, which several tests look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCOPE = Path(sys.executable).parent / "scope"
STEPS, GROUPS = 4, 8


def scope(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [SCOPE, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=280
    )


def short_run(runs: Path) -> list[str]:
    """Arguments of a run of a few steps that can be repeated bit for bit: synchronous, and with
    every group sampled, and every sequence scored, in a batch of its own, because a matrix
    product may round differently in other company."""
    return [
        "run", "deploy/runs/demo.yaml", f"runs_dir={runs}", f"trainer.max_steps={STEPS}",
        f"trainer.groups_per_step={GROUPS}", "trainer.checkpoint.every_steps=2",
        "trainer.max_staleness=0", "rollout.batch_sequences=1", "teacher.batch_tokens=1",
        "evaluation.prompts=16", "ray.dashboard=false",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    done = scope(*short_run(runs))
    assert done.returncode == 0, done.stdout + done.stderr
    (runs / "demo" / "stdout").write_text(done.stdout)
    return runs / "demo"
