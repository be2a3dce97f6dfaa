"""vLLM's processes must not outlive the one that started them, nor keep a GPU from the next; nor
may their shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import DEADLINE_S, wait_until

PARENT = """
import multiprocessing, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from services.vllm_core import Running

def hold(names):
    segment = SharedMemory(create=True, size=4096)
    # As if the tracker, too, were killed: that is when vLLM leaves its segments behind.
    resource_tracker.unregister(segment._name, "shared_memory")
    names.send(segment.name)
    time.sleep(3600)

def make():
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(theirs,))
    child.start()
    child.segment = ours.recv()
    return child

if __name__ == "__main__":
    child = Running(make).llm
    print(child.pid, child.segment, flush=True)
    time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_what_was_started_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"  # a child that is spawned reads it again
    program.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert parent.stdout is not None
    pid, name = parent.stdout.readline().split()
    child, segment = psutil.Process(int(pid)), Path("/dev/shm", name.decode())
    assert segment.exists()
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    assert psutil.wait_procs([child], timeout=DEADLINE_S) == ([child], [])
    wait_until(lambda: not segment.exists())


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("ours", [True, False])
def test_a_process_under_the_number_of_one_that_has_ended_is_left_alone(ours: bool) -> None:
    from services.vllm_core import _WATCHDOG

    with subprocess.Popen(["sleep", "3600"]) as process:
        started = psutil.Process(process.pid).create_time() if ours else 1.0
        watching = [sys.executable, "-c", _WATCHDOG, f"{process.pid}:{started}"]
        subprocess.run(watching, stdin=subprocess.DEVNULL, check=True, timeout=DEADLINE_S)
        assert (process.poll() is not None) is ours
        process.kill()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_a_process_that_has_just_ended_holds_no_shared_memory() -> None:
    from services.vllm_core import shared_memory

    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert shared_memory([process.pid]) == set()
