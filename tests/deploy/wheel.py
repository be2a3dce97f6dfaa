"""The wheel alone, in an environment that knows nothing of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.deploy.driver import ROOT

SOURCES = ("services", "rollout", "verifier", "teacher", "trainer", "deploy", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def build(directory: Path) -> Path:
    """The wheel of this checkout, in a folder of `directory`."""
    source, built = directory / "source", directory / "built"
    for folder in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, source)
    said = _pip("wheel", "--no-deps", "--no-build-isolation", "-v", "-w", built, source)
    assert "Warning" not in said
    (found,) = built.glob("*.whl")
    return found


def install(wheel: Path, directory: Path) -> Path:
    """A virtual environment with the wheel. What it depends on is read where it lies: the .pth
    files of a folder that a .pth file names, such as this checkout's, do nothing."""
    venv.create(directory, with_pip=False)
    paths = {"base": str(directory), "platbase": str(directory)}
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "dependencies.pth").write_text(
        "\n".join(sorted(dependencies))
    )
    _pip("--python", directory / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return directory


def without_checkout() -> dict[str, str]:
    """This process's environment, in which no path leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _pip(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
