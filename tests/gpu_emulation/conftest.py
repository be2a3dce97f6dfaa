"""Compiles what fake CUDA tensors need, and runs modules of this folder with it: in processes of
their own, since torch cannot be brought back from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent
COMPILER = shutil.which("c++")
MISSING = "no C++ compiler (c++)" if COMPILER is None else ""
if torch.version.cuda is not None:  # which has a guard of its own
    MISSING = "torch is a CUDA build"
if MISSING:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out, once and at the end: nobody misses what is not collected."""
    if MISSING:
        terminalreporter.write_line(f"tests/gpu_emulation was not run: {MISSING}", yellow=True)


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    abi = int(torch.compiled_with_cxx11_abi())
    includes = [TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    command = [str(COMPILER), "-shared", "-fPIC", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += [*(f"-I{path}" for path in includes), str(HERE / "guard.cpp")]
    command += [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def run_module(name: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a module of this folder prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.gpu_emulation.{name}", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


@pytest.fixture(scope="session")
def preloaded(guard: Path) -> dict[str, str]:
    """The environment that fake CUDA tensors need."""
    return {"LD_LIBRARY_PATH": str(TORCH / "lib"), "LD_PRELOAD": str(guard)}


@pytest.fixture(scope="session")
def step(
    preloaded: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs `step.py` with these arguments; what it counted. One process for all: it takes longer
    to start than to count."""
    stderr = tmp_path_factory.mktemp("step") / "stderr"
    with (
        stderr.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.gpu_emulation.step", "-"],
            env={**os.environ, **preloaded},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def counted(*arguments: str) -> dict[str, Any]:
            print(*arguments, file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, stderr.read_text()
            found: dict[str, Any] = json.loads(line)
            return found

        yield counted
        process.stdin.close()
