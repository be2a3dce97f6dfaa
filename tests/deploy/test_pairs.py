"""One run whose teacher has another tokenizer and is killed in the middle, on real Ray and Redis,
as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from services.metrics import read
from services.ports import free_port
from tests.deploy.conftest import ROOT, SCOPE, scope
from tests.deploy.pairs import write
from tests.waiting import DEADLINE_S, wait_until

STEPS, GROUPS, N = 12, 16, 8


@contextmanager
def serving(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.pairs", directory, str(port)], cwd=ROOT
    )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_of_pairs_of_digits(tmp_path: Path) -> None:
    model, port = write(tmp_path / "pairs"), free_port("127.0.0.1")
    ledger = tmp_path / "demo" / "ledger.json"

    def step() -> int:
        return int(json.loads(ledger.read_text())["step"]) if ledger.exists() else 0

    with serving(model, port) as first, (tmp_path / "stdout").open("w") as stdout:
        run = subprocess.Popen(
            [
                SCOPE, "run", "deploy/runs/demo.yaml", f"runs_dir={tmp_path}", "evaluation=null",
                f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}",
                f"sampling.n={N}", "trainer.optimizer.lr=5e-4", "trainer.optimizer.warmup_steps=2",
                "trainer.checkpoint.every_steps=100", "ray.dashboard=false",
                f"teachers={{default: {{model: {model}, tokenizer: own, "
                f"endpoints: [http://127.0.0.1:{port}]}}}}", "teacher=null",
            ],
            cwd=ROOT, stdout=stdout, stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_until(lambda: step() >= STEPS // 3 or run.poll() is not None)
        first.kill()
        with serving(model, port):
            code = run.wait(timeout=DEADLINE_S)
    assert code == 0, (tmp_path / "stdout").read_text()
    total = STEPS * GROUPS
    status = json.loads(scope("status", tmp_path / "demo", "--json").stdout)
    assert (status["fed"], status["trained"]) == (total, total)
    assert (status["dead"], status["in_flight"]) == (0, 0)
    accuracy = [record["reward/accuracy"] for record in read(tmp_path / "demo")]
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:3]) + 0.1, accuracy
