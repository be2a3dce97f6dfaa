"""The wheel alone, in an environment that knows nothing of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import ROOT

SOURCES = ("services", "rollout", "verifier", "teacher", "trainer", "deploy", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def pip(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, source)
    said = pip("wheel", "--no-deps", "--no-build-isolation", "-v", "-w", built, source)
    assert "Warning" not in said
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. What it depends on is read where it lies: the .pth
    files of a folder that a .pth file names, such as this checkout's, do nothing."""
    made = tmp_path_factory.mktemp("environment")
    venv.create(made, with_pip=False)
    paths = {"base": str(made), "platbase": str(made)}
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "dependencies.pth").write_text(
        "\n".join(sorted(dependencies))
    )
    pip("--python", made / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return made


def run(program: Path, *arguments: str, cwd: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([program, *arguments], cwd=cwd, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_an_empty_directory(
    environment: Path, tmp_path: Path
) -> None:
    where = run(
        environment / "bin/python", "-c", "import deploy; print(deploy.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(environment)
    run(
        environment / "bin/scope",
        "demo",
        "trainer.max_steps=2",
        "evaluation.sampling.n=1",
        cwd=tmp_path,
    )
    assert (tmp_path / "runs/demo/export/model.safetensors").exists()
    used = yaml.safe_load((tmp_path / "runs/demo/config.yaml").read_text())
    assert Path(used["student"]).is_relative_to(environment)


@pytest.mark.slow
def test_the_wheel_has_the_runs_the_report_and_the_monitoring(
    environment: Path, tmp_path: Path
) -> None:
    run(environment / "bin/scope", "monitoring", "up", "monitoring", cwd=tmp_path)
    assert (tmp_path / "monitoring/compose.yaml").exists()
    (package,) = environment.glob("lib/python*/site-packages/deploy")
    for file in sorted((ROOT / "deploy/runs").iterdir()):
        assert (package / "runs" / file.name).read_bytes() == file.read_bytes()
    assert (package / "report.html").exists()
