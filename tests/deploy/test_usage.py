"""Whose processor time it is, with real processes under the names that Ray gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from deploy.usage import cpu_seconds
from services.sandbox.confined import runnable_s

_BURN = "import time\nwhile time.process_time() < 0.3: pass\n"
_WAIT = "print('done', flush=True); input()"
_PARENT = f"""
import subprocess
{_BURN}
child = subprocess.Popen([{sys.executable!r}, "-c", {_BURN + _WAIT!r}], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
child.stdout.readline()
{_WAIT}
child.communicate("\\n")
"""


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("ray::VerifierWorker.run", "verifier"),
        ("ray::ServeReplica:demo-teacher:teacher.handle", "teacher"),
        ("/somewhere/bin/redis-server unixsocket:/tmp/r.sock", "redis"),
        ("/somewhere/bin/valkey-server unixsocket:/tmp/r.sock", "redis"),
        ("python", "other"),
    ],
)
def test_a_process_and_its_children_count_for_the_role_in_its_name(name: str, role: str) -> None:
    before = cpu_seconds().get(f"cpu_s/{role}", 0.0)
    process = subprocess.Popen(
        [name, "-c", _PARENT], executable=sys.executable,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    used = cpu_seconds()[f"cpu_s/{role}"] - before
    alone = cpu_seconds(process.pid)
    process.communicate("\n")
    assert 0.55 <= used < 5.0  # its own and its child's, counted in ticks of 10 ms
    assert alone.keys() == {f"cpu_s/{role}"}


def test_what_a_process_used_stays_when_it_has_ended() -> None:
    before = cpu_seconds()["cpu_s/other"]
    subprocess.run([sys.executable, "-c", _BURN], check=True)
    assert cpu_seconds()["cpu_s/other"] - before >= 0.28


def test_it_is_this_process_and_not_the_machine() -> None:
    started = time.process_time()
    own = sum(cpu_seconds(os.getpid()).values())
    assert own >= started * 0.9
    assert cpu_seconds(2**22 + 1) == {}


def test_a_stranger_whose_name_is_no_text_is_in_nobodys_way() -> None:
    name = "import ctypes\nctypes.CDLL(None).prctl(15, b'cut off \\xc3')\n"
    with subprocess.Popen(
        [sys.executable, "-c", name + _WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdout
        stranger.stdout.readline()
        assert sum(cpu_seconds().values()) > 0
        assert runnable_s(stranger.pid) > 0
        stranger.communicate("\n")
