"""`scope demo`, from the wheel alone in an empty directory. What the run did, others test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import ROOT
from tests.deploy.wheel import without_checkout

pytestmark = pytest.mark.slow


def run(program: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=without_checkout(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_ran_from_the_wheel(environment: Path, run_dir: Path, tmp_path: Path) -> None:
    where = run(
        environment / "bin/python", "-c", "import deploy; print(deploy.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(environment)
    assert (run_dir / "export/model.safetensors").exists()
    used = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert Path(used["student"]).is_relative_to(environment)


def test_the_wheel_has_the_runs_the_report_and_the_monitoring(
    environment: Path, tmp_path: Path
) -> None:
    run(environment / "bin/scope", "monitoring", "up", "monitoring", cwd=tmp_path)
    assert (tmp_path / "monitoring/compose.yaml").exists()
    (package,) = environment.glob("lib/python*/site-packages/deploy")
    for file in sorted((ROOT / "deploy/runs").iterdir()):
        assert (package / "runs" / file.name).read_bytes() == file.read_bytes()
    assert (package / "report.html").exists()
