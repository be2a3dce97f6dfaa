"""Real runs of a few steps, which several tests look at."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy import dashboards
from deploy.cli import main
from services.ports import free_port
from tests.deploy.extended import Extended, start
from tests.deploy.wheel import build, install, without_checkout
from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]
SCOPE = Path(sys.executable).parent / "scope"
STEPS, GROUPS = 4, 8
Here = Callable[..., subprocess.CompletedProcess[str]]


def scope(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [SCOPE, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_S
    )


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """The same in this process: a new one imports for longer than most commands take."""

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        code = 0
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        stdout, stderr = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, stdout, stderr)

    return call


def short(runs: Path) -> list[str]:
    """Settings of the demo for a run of a few steps that can be repeated bit for bit: synchronous,
    and with every group sampled, and every sequence scored, in a batch of its own, because a
    matrix product may round differently in other company."""
    return [
        f"runs_dir={runs}", f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}",
        "trainer.checkpoint.every_steps=2", "trainer.max_staleness=0",
        "rollout.batch_sequences=1", "teacher.batch_tokens=1", "evaluation.prompts=16",
        "evaluation.every_steps=2", "ray.dashboard=false",
    ]  # fmt: skip


@dataclass(frozen=True)
class ScrapedRun:
    """A finished run that a Prometheus, if there is one here, scraped from its start to its end."""

    directory: Path
    prometheus: str
    started: float
    ended: float


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel and no path to this checkout."""
    wheel = build(tmp_path_factory.mktemp("wheel"))
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def scraped_run(
    environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScrapedRun]:
    """`scope demo` of the wheel, in an empty directory."""
    runs, monitoring = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("monitoring")
    stdout = runs / "stdout"
    started = time.time()
    run = subprocess.Popen(
        [environment / "bin/scope", "demo", *short(runs), "ray.dashboard=true"],
        stdout=stdout.open("w"), stderr=subprocess.STDOUT, cwd=monitoring,
        env=without_checkout() | {"RAY_metrics_report_interval_ms": "1000"},
    )  # fmt: skip
    while not (found := re.search(r"Ray dashboard: (\S+)", stdout.read_text())):
        assert run.poll() is None, stdout.read_text()
        time.sleep(0.1)
    dashboards.write(monitoring, found[1], interval_s=1)
    with contextlib.ExitStack() as stack:
        address = _free_address()
        if binary := shutil.which("prometheus"):
            server = subprocess.Popen(
                [
                    binary, f"--config.file={monitoring}/prometheus.yml",
                    f"--storage.tsdb.path={monitoring}/data", f"--web.listen-address={address}",
                ],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(server.wait)
            stack.callback(server.terminate)
        assert run.wait(timeout=DEADLINE_S) == 0, stdout.read_text()
        stdout.rename(runs / "demo" / "stdout")
        yield ScrapedRun(runs / "demo", f"http://{address}", started, time.time())


@pytest.fixture(scope="session")
def extended_run(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    """The demo with a stage and a teacher more."""
    return start(tmp_path_factory.mktemp("extended"))


@pytest.fixture(scope="session")
def run_dir(scraped_run: ScrapedRun) -> Path:
    """The directory of a finished run."""
    return scraped_run.directory


def _free_address() -> str:
    return f"127.0.0.1:{free_port('127.0.0.1')}"
