"""vLLM's processes must not outlive the one that started them, nor keep a GPU from the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

PARENT = """
import multiprocessing, time
from services.vllm_core import Running

def make():
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    child.start()
    return child

if __name__ == "__main__":
    print(Running(make).llm.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_what_was_started_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    assert psutil.wait_procs([child], timeout=20) == ([child], [])
