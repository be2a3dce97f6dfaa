"""A driver that is stopped or killed, and `scope resume`: as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from services.metrics import read
from tests.deploy.conftest import GROUPS, STEPS, scope, short
from tests.deploy.driver import DEMO, Driver
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

CURVES = ("loss/mle", "loss/opd", "actor/grad_norm", "reward/accuracy", "kl/student_teacher")


def test_a_resumed_run_has_the_uninterrupted_ones_loss_curve_bit_for_bit(
    run_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "demo"
    ledger = directory / "ledger.json"
    # While the learner's thread waits for Ray Train: what stops badly. `make trials` has more.
    run = Driver(tmp_path / "log", "run", DEMO, *short(tmp_path))
    run.wait_for(lambda: run.runs("ray::TrainController"))
    status, _ = run.interrupt(signal.SIGINT)
    assert status == 130, run.said
    assert run.said.endswith(f"interrupted; continue with: scope resume {directory}\n")
    wait_until(lambda: not run.left())
    driver = Driver(tmp_path / "log", "resume", directory)
    # Killed past the checkpoint of step 2, so that a step has to be replayed.
    driver.wait_for(
        lambda: ledger.exists() and json.loads(ledger.read_text(encoding="utf-8"))["step"] >= 3
    )
    driver.interrupt(signal.SIGKILL)

    resumed = scope("resume", directory)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing from" in resumed.stdout
    status = json.loads(scope("status", directory, "--json").stdout)
    assert (status["fed"], status["trained"], status["dead"]) == (STEPS * GROUPS, STEPS * GROUPS, 0)
    uninterrupted, resumed_records = read(run_dir), read(directory)
    assert [r["step"] for r in resumed_records] == list(range(1, STEPS + 1))
    for name in CURVES:
        assert [r[name] for r in resumed_records] == [r[name] for r in uninterrupted], name
