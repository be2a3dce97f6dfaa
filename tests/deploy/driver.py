"""The driver of a real run, stopped at chosen moments, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.waiting import DEADLINE_S, wait_until

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy/runs/demo.yaml"
SCOPE = Path(sys.executable).parent / "scope"
_MARK = "SCOPE_TEST_DRIVER"


class Driver:
    """`scope` with `arguments`, in a session of its own as in a terminal; all that it starts has a
    mark in its environment. `around` is a command that runs it, such as bwrap's."""

    def __init__(
        self, log: Path, *arguments: str | Path, around: Sequence[str] = (), **environment: str
    ) -> None:
        self.log, self._mark = log, uuid.uuid4().hex
        self._family: set[psutil.Process] = set()
        with log.open("a", encoding="utf-8") as output:
            self._began = output.tell()
            self._process = subprocess.Popen(
                [*around, SCOPE, *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | environment | {_MARK: self._mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_bytes()[self._began :].decode()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def maps(self, library: str) -> bool:
        """Whether it has loaded a library whose path contains this."""
        try:
            return library in Path(f"/proc/{self._process.pid}/maps").read_text(encoding="utf-8")
        except OSError:
            return False

    def runs(self, title: str) -> bool:
        """Whether a process of that name belongs to it."""
        return any(title in " ".join(_words(p)) for p in self.processes())

    def inside(self) -> Path:
        """The root directory as the driver sees it, which `around` may have changed."""
        wait_until(lambda: self.said and self.processes())
        (driver,) = [p for p in self.processes() if str(SCOPE) in _words(p)][-1:]
        return Path(f"/proc/{driver.pid}/root")

    def wait_for(self, moment: Callable[[], object]) -> None:
        """Until `moment` is true.

        Raises:
            AssertionError: it ended before.
        """

        def come() -> object:
            come = moment()
            assert come or not self.ended, f"it ended:\n{self.said[-4000:]}"
            return come

        wait_until(come)

    def interrupt(self, signum: signal.Signals) -> tuple[int, float]:
        """SIGINT as a terminal sends it, to the whole foreground group; any other to the driver
        alone. The exit status, and the seconds until it had ended."""
        self._family = set(self.processes())
        started = time.monotonic()
        if signum == signal.SIGINT:
            os.killpg(self._process.pid, signum)
        else:
            self._process.send_signal(signum)
        return self.end(), time.monotonic() - started

    def end(self) -> int:
        """Waits for the end: its exit status."""
        return self._process.wait(DEADLINE_S)

    def left(self) -> list[str]:
        """The command lines of what it started and still runs."""
        marked = {p for p in psutil.process_iter() if _environment(p).get(_MARK) == self._mark}
        return [" ".join(_words(p)) for p in marked | self._family if _runs(p)]

    def processes(self) -> list[psutil.Process]:
        """All that it has started and that runs."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def step_of(directory: Path) -> int:
    """The last step that the driver of the run in this directory knows of."""
    file = directory / "ledger.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.exists() else 0


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
