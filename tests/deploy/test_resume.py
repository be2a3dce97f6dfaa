"""`kill -9` of the driver, and `scope resume`: the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from services.metrics import read
from tests.deploy.conftest import GROUPS, ROOT, SCOPE, STEPS, scope, short_run

pytestmark = pytest.mark.slow

CURVES = ("loss/mle", "loss/opd", "actor/grad_norm", "reward/accuracy", "kl/student_teacher")


def test_a_resumed_run_has_the_uninterrupted_ones_loss_curve_bit_for_bit(
    run_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "demo"
    ledger = directory / "ledger.json"
    driver = subprocess.Popen(
        [SCOPE, *short_run(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 240
    # Killed past the checkpoint of step 2, so that a step has to be replayed.
    while not ledger.exists() or json.loads(ledger.read_text())["step"] < 3:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run made no step"
        time.sleep(0.02)
    driver.kill()
    driver.wait()

    resumed = scope("resume", directory)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing from" in resumed.stdout
    status = json.loads(scope("status", directory, "--json").stdout)
    assert (status["fed"], status["trained"], status["dead"]) == (STEPS * GROUPS, STEPS * GROUPS, 0)
    uninterrupted, resumed_records = read(run_dir), read(directory)
    assert [r["step"] for r in resumed_records] == list(range(1, STEPS + 1))
    for name in CURVES:
        assert [r[name] for r in resumed_records] == [r[name] for r in uninterrupted], name
