"""Where programs cannot be confined no sandbox is to be had, and it says which setting is missing.

Nothing is simulated: each test prepares the sandboxes in a process that the kernel refuses what it
refuses in such a place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from services.sandbox import probe
from services.sandbox.bubblewrap import Bubblewrap
from services.sandbox.confined import LEVELS, Level, SandboxRefused
from services.sandbox.landlock import Landlock
from services.sandbox.landlocked import NO_CAPABILITY
from services.sandbox.levels import prepare

# Takes something away from this process, then tries to start both levels.
_START = """
import asyncio, ctypes, json
libc = ctypes.CDLL(None, use_errno=True)

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

def filter_calls(steps):
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, ctypes.byref(Program(len(steps) // 8, steps)), 0, 0) == 0

def no_namespaces():
    assert libc.unshare(0x10000000) == 0
    with open("/proc/sys/user/max_user_namespaces", "w") as setting:
        setting.write("0")

{taking}  # before the imports, which start threads

from services.sandbox.confined import LEVELS, SandboxRefused
from services.sandbox.levels import prepare

said = []
for level in LEVELS:
    try:
        asyncio.run(prepare(level))
        said.append("started")
    except SandboxRefused as refused:
        said.append(str(refused))
print(json.dumps(said))
"""


def start(taking: str) -> list[str]:
    """What becomes of bubblewrap and of Landlock: "started", or the refusal."""
    done = subprocess.run(
        [sys.executable, "-c", _START.replace("{taking}", taking)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


def filtered(refusals: dict[int, int], *, namespaces: bool = True) -> str:
    """A filter that refuses system calls with these errors, and, as Docker's default one does,
    clone into `namespaces`. Numbers are x86-64's."""

    def step(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, constant)

    steps = step(0x20, 0)  # the number
    for number, error in refusals.items():
        steps += step(0x15, number, 0, 1) + step(0x06, 0x50000 | error)
    if not namespaces:
        steps += step(0x15, 56, 0, 3) + step(0x20, 16)  # of clone, the flags
        steps += step(0x45, 0x7E020000, 0, 1) + step(0x06, 0x50000 | errno.EPERM)
    return f"filter_calls({steps + step(0x06, 0x7FFF0000)!r})"


# unshare, mount, umount2, pivot_root, setns, clone3
_DOCKER = dict.fromkeys((272, 165, 166, 155, 308), errno.EPERM) | {435: errno.ENOSYS}


def test_docker_s_default_profile_refuses_the_first_level_and_allows_the_second() -> None:
    bubblewrap, landlock = start(filtered(_DOCKER, namespaces=False))
    assert "no sandbox can be made: a program failed (bwrap: " in bubblewrap
    assert "Missing here: a seccomp profile of the container that allows user namespaces" in (
        bubblewrap
    )
    assert landlock == "started"


@pytest.mark.slow
def test_where_the_number_of_namespaces_is_zero_its_setting_is_named() -> None:
    bubblewrap, landlock = start("no_namespaces()")
    assert "Missing here: sysctl user.max_user_namespaces=10000" in bubblewrap
    assert landlock == "started"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (
            errno.ENOSYS,
            "Missing: a kernel with it (Linux 6.2 or newer, CONFIG_SECURITY_LANDLOCK=y)",
        ),
        (errno.EOPNOTSUPP, "Missing: `landlock` in the kernel's boot parameter lsm="),
        (errno.EPERM, "Missing: a seccomp profile of the container that allows landlock_create"),
    ],
)
def test_a_kernel_without_landlock_refuses_the_second_level(error: int, missing: str) -> None:
    bubblewrap, landlock = start(filtered({444: error}))
    assert bubblewrap == "started"
    assert missing in landlock


@pytest.mark.slow
def test_a_root_that_is_none_is_told_which_capabilities_it_lacks() -> None:
    bubblewrap, landlock = start("libc.prctl(24, 7, 0, 0, 0)  # what it starts lacks CAP_SETUID")
    if os.geteuid() == 0:
        assert "setpriv: " in bubblewrap
        assert NO_CAPABILITY in landlock
    else:
        assert landlock == "started"


@pytest.mark.parametrize("level", [Bubblewrap, Landlock])
async def test_a_sandbox_that_does_not_hold_is_refused(
    level: type[Bubblewrap] | type[Landlock],
) -> None:
    """Without the filter of system calls the probe gets further than it may."""
    everything_allowed = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    leaky = replace(await level.prepare(), filter=everything_allowed)
    with pytest.raises(SandboxRefused, match=r"does not hold: a program can .*start a process"):
        await probe.check(leaky, "landlock")


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor profile for bwrap"),
    ],
)
def test_settings_of_other_kernels_are_known(
    tmp_path: Path, setting: str, value: str, remedy: str
) -> None:
    """This kernel need not have them, so they are files here."""
    file = tmp_path / "proc" / "sys" / setting
    file.parent.mkdir(parents=True)
    file.write_text(f"{value}\n")
    assert remedy in probe.missing(tmp_path)


def test_a_machine_without_proc_is_told_so(tmp_path: Path) -> None:
    assert "/proc, which is not mounted" in probe.missing(tmp_path)


async def test_without_bubblewrap_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxRefused, match="install the package `bubblewrap`"):
        await prepare("bubblewrap")


async def test_root_without_setpriv_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    (tmp_path / "bwrap").symlink_to(bwrap)
    monkeypatch.setenv("PATH", str(tmp_path))
    root = os.geteuid() == 0
    with pytest.raises(SandboxRefused, match="`setpriv`") if root else nullcontext():
        await prepare("bubblewrap")


@pytest.mark.parametrize("level", LEVELS)
async def test_an_interpreter_that_cannot_be_run_is_named(tmp_path: Path, level: Level) -> None:
    with pytest.raises(SandboxRefused, match="`python`"):
        await prepare(level, tmp_path / "python")
