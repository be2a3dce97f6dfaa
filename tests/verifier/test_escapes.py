r"""Attacks on the verifier, each with what it tries. All must fail, and the host stay as it was.

REFUSED    one forbidden act each; the program itself reports that the system said no, and that
           report is compared like any output, so an attack that never got to try fails its test
CONTAINED  bombs: they end at a limit, and the verdict says which
CHEATS     wrong programs that want to be judged right
TEXTS      answers that want to take the judge's time, memory or verdict
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.sandbox import landlock
from services.sandbox.confined import find_interpreter
from tests.waiting import DEADLINE_S
from verifier.code_tests import CodeJudge
from verifier.config import CodeConfig
from verifier.judge_pool import JudgePool

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CONFIG = CodeConfig(programs=2, time_s=1, memory_mb=256, disk_mb=1, output_mb=1)
LEVELS = ("bubblewrap", "landlock")

# A call that the kernel refused for its arguments is no proof: it must be refused for what it is.
_ATTEMPT = """
import ctypes, errno, fcntl, os, resource, socket, sys
SECRET, PORT, HOST_PID = input().split()
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0:
        assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS), "it got as far as the kernel"
        raise OSError(ctypes.get_errno(), "refused")
def syscall(number, *arguments):
    must(libc.syscall(number, *arguments))
try:
{attack}
except (OSError, ValueError) as refused:
    print("held")
else:
    print("escaped")
"""

# A static program: socket(AF_INET, SOCK_STREAM, 0) < 0, and so it writes "held" or "escaped".
_BINARY = (
    struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    + struct.pack("<2I6Q", 1, 5, 0, 0x400000, 0x400000, 202, 202, 0x1000)
    + bytes.fromhex("b829000000bf02000000be0100000031d20f054885c07809488d3523000000eb07")
    + bytes.fromhex("488d3522000000bf01000000ba08000000b8010000000f0531ffb83c0000000f05")
    + b"escaped\nheld   \n"
)

# System call numbers are x86-64's.
REFUSED = {
    "a TCP connection to the host": "socket.create_connection(('127.0.0.1', int(PORT)), 1)",
    "a UDP socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "a packet socket": "socket.socket(17, socket.SOCK_RAW)",
    "a netlink socket": "socket.socket(16, socket.SOCK_RAW, 0)",
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "a vsock to the hypervisor": "socket.socket(40, socket.SOCK_STREAM)",
    "a socket by ctypes": "must(libc.socket(2, 1, 0))",
    "a socket by its number": "syscall(41, 2, 1, 0)",
    "name resolution": "socket.getaddrinfo('example.com', 80)",
    "a socket by a shipped binary": "file = os.open('x', os.O_CREAT | os.O_WRONLY, 0o755)\n"
    f"os.write(file, bytes.fromhex('{_BINARY.hex()}')); os.close(file)\n"
    "os.execv('./x', ['x'])",
    "a shell": "os.execv('/bin/sh', ['sh'])",
    "a child by posix_spawn": "os.posix_spawn(sys.executable, ['python'], {})",
    "reading a file of the host": "open(SECRET).read()",
    "reading the password file": "open('/etc/passwd').read()",
    "reading the shadow file": "open('/etc/shadow').read()",
    "reading root's home": "os.listdir('/root')",
    "reading other runs' files": "os.listdir(os.path.dirname(SECRET))",
    "reading the tests": f"open({__file__!r}).read()",
    "the parent's environment": "open(f'/proc/{HOST_PID}/environ').read()",
    "its own environment": "open('/proc/self/environ').read()",
    "its own memory as a file": "open('/proc/self/mem', 'rb+')",
    "the kernel's settings": "open('/proc/sys/kernel/core_pattern', 'w')",
    "the kernel's keys": "os.listdir('/sys')",
    "another root directory": "os.chdir('/..'); open('..' + SECRET).read()",
    "writing to the root": "open('/x', 'w')",
    "writing to the interpreter's library": "open(os.__file__, 'a')",
    "writing to the driver": "open('/inside.py', 'a')",
    "replacing the driver": "os.rename('x', '/inside.py')",
    "removing a device": "os.unlink('/dev/null')",
    "writing to the kernel's log": "open('/dev/kmsg', 'w')",
    "making a device": "os.mknod('disk', 0o60644, os.makedev(8, 0))",
    "making a fifo": "os.mkfifo('fifo')",
    "a symbolic link to the host": "os.symlink(SECRET, 'a'); open('a').read()",
    "a hard link to the host": "os.link(SECRET, 'b')",
    "a hard link out of its disk": "os.link(os.__file__, 'c')",
    "the mode of the host's file": "os.chmod(SECRET, 0o777)",
    "the times of the host's file": "os.utime(SECRET)",
    "the length of the host's file": "os.truncate(SECRET, 0)",
    "replacing the host's file": "open('d', 'w').close(); os.replace('d', SECRET)",
    "fork": "os.fork()",
    "a daemon that keeps the pipes open": "os.fork() or os.setsid() and os.fork()",
    "fork by its number": "syscall(57)",
    "vfork": "syscall(58)",
    "clone": "syscall(56, 17, 0, 0, 0, 0)",
    "clone into new namespaces": "syscall(56, 0x10000000 | 0x10000 | 0x900, 0, 0, 0, 0)",
    "clone3": "syscall(435, 0, 88)",
    "unshare": "must(libc.unshare(0x10000000))",
    "joining a namespace": "must(libc.setns(0, 0))",
    "leaving the root": "must(libc.chroot(b'/tmp'))",
    "pivot_root": "syscall(155, b'/tmp', b'/tmp')",
    "mount": "must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "mount by the new calls": "syscall(430, b'tmpfs', 0)",
    "unmount": "must(libc.umount2(b'/tmp', 2))",
    "ptrace": "must(libc.ptrace(16, 1, 0, 0))",
    "reading another process": "syscall(310, 1, 0, 0, 0, 0, 0)",
    "killing the parent": "os.kill(int(HOST_PID), 9)",
    "limits of the parent": "resource.prlimit(int(HOST_PID), resource.RLIMIT_NOFILE, (0, 0))",
    "signals to the parent by a pipe": "fcntl.fcntl(0, fcntl.F_SETOWN, int(HOST_PID))",
    "setuid": "os.setuid(0)",
    "setgroups": "os.setgroups([0])",
    "capabilities": "syscall(126, 0, 0)",
    "a higher limit": "resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
    "io_uring": "syscall(425, 8, ctypes.create_string_buffer(120))",
    "bpf": "syscall(321, 0, ctypes.create_string_buffer(64), 64)",
    "keyctl": "syscall(250, 0, -3, 0)",
    "perf_event_open": "syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0)",
    "userfaultfd": "syscall(323, 0)",
    "a module": "syscall(313, 0, b'', 0)",
    "kexec": "syscall(246, 0, 0, 0, 0)",
    "reboot": "must(libc.reboot(0x1234567))",
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "the host's name": "socket.sethostname('owned')",
    "typing into a terminal": "must(libc.ioctl(0, 0x5412, b'x'))",
    "shared memory of System V": "syscall(29, 0, 1 << 20, 0o1777)",
    "memory files": "os.memfd_create('x')",
    "an open directory outside": "os.open('/proc/1/root', os.O_RDONLY)",
}

CONTAINED = {
    "endless loop": ("while True: pass", "used more than 1 s"),
    "waiting for ever": ("import time\ntime.sleep(3600)", "took longer"),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "one big allocation": ("bytearray(1 << 40)", "MemoryError"),
    "disk": ("for i in range(99): open(f'{i}', 'wb').write(b'x' * 100000)", "No space left"),
    "one big file": ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 9999)", "File too large"),
    "fork bomb": ("import os\nwhile True: os.fork()", "Operation not permitted"),
    "open files": ("x = [open('/dev/null') for _ in range(9999)]", "Too many open files"),
    "threads": (
        "import threading, time\n"
        "for _ in range(9999): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "can't start new thread",
    ),
    "endless output": ("while True: print('x' * 9999)", "printed more than 1 MiB"),
    "endless errors": (
        "import sys\nwhile True: sys.stderr.write('x' * 9999)",
        "printed more than 1 MiB of errors",
    ),
    "huge integer": ("print(len(str(9 ** 9 ** 9)))", "used more than 1 s"),
    "regular expression": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "used more than 1 s"),
    "deep recursion": ("def f(): f()\nf()", "RecursionError"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "failed"),
    "kill -1": ("import os, signal\nos.kill(-1, signal.SIGKILL)", "No such process"),
    "unpickling a command": (
        "import pickle\npickle.loads(b'cos\\nsystem\\n(S\"echo escaped\"\\ntR.')",
        "differs",
    ),
    "ignored signals": (
        "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "used more than 1 s",
    ),
}

_TESTS = {"test": "def check(f):\n    assert f(2) == 5\n    assert f(3) == 7\n", "entry_point": "f"}
_CALLS = {"inputs": [[2], [3]], "outputs": [5, 7], "fn_name": "f"}
_CASES = {"inputs": ["2", "3"], "outputs": ["5", "7"]}
CHEATS = {
    "exit with success": ("import os\nos._exit(0)", _TESTS),
    "exit in the call": ("import sys\ndef f(x): sys.exit(0)", _TESTS),
    "exit at the end": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): 1 / 0", _TESTS),
    "an equal of everything": (
        "class E:\n def __eq__(self, o): return True\ndef f(x): return E()",
        _TESTS,
    ),
    "an int that equals everything": (
        "class E(int):\n def __eq__(self, o): return True\ndef f(x): return E(1)",
        _CALLS,
    ),
    "patched equality of calls": ("import operator\noperator.eq = lambda a, b: True\n"
                                  "def f(x): return 1", _CALLS),
    "replaced builtins": (
        "import builtins\nbuiltins.abs = builtins.all = lambda *a: True\n"
        "builtins.AssertionError = ValueError\ndef f(x): return 1",
        _TESTS,
    ),
    "an import hook that exits": (
        "import sys\nclass H:\n def find_spec(self, *a): sys.exit(0)\n"
        "sys.meta_path.insert(0, H())\ndef f(x):\n import decimal",
        _TESTS,
    ),
    "its own check": ("def check(f): pass\ndef f(x): return 0", _TESTS),
    "skipped tests": ("import sys\ndef f(x): sys.exit('SKIPPED: 1 passed')", _TESTS),
    "pytest.skip": ("class Skipped(BaseException): pass\ndef f(x): raise Skipped()", _TESTS),
    "unittest's skip": ("import unittest\ndef f(x): raise unittest.SkipTest('1 passed')", _TESTS),
    "a claim on the channel": (
        "import json, os\nm = json.dumps({'passed': True}).encode()\n"
        "for fd in range(3, 64):\n"
        " try: os.write(fd, len(m).to_bytes(4, 'big') + m)\n except OSError: pass\n"
        "def f(x): return 0",
        _TESTS,
    ),
    "answers before the question": (
        "import json, os\nm = json.dumps({'nonce': '', 'value': 5}).encode()\n"
        "for fd in range(3, 64):\n"
        " try: os.write(fd, (len(m).to_bytes(4, 'big') + m) * 9)\n except OSError: pass\n"
        "def f(x): return 0",
        _CALLS,
    ),
    "the answer of another case": ("print(5)", _CASES),
    "all answers": ("print(5)\nprint(7)", _CASES),
    "a claim in words": ("print('All tests passed')\nimport sys\nsys.exit(0)", _CASES),
    "the expected output in memory": (
        "import gc\n"
        "found = [o for o in gc.get_objects() if isinstance(o, dict) and 'outputs' in o]\n"
        "print(found[0]['outputs'][0] if found else 'nothing')",
        _CASES,
    ),
    "the tests in memory": (
        "import sys\ndef f(x):\n k = sys._getframe(1)\n"
        " while k:\n"
        "  if 'tests' in k.f_locals: return 2 * x + 1\n"
        "  k = k.f_back\n"
        " return 0",
        _TESTS,
    ),
    "a value that never ends": ("def f(x):\n a = []\n a.append(a)\n return a", _CALLS),
    "a value too large": ("def f(x): return 'x' * (2 << 20)", _CALLS),
    "a value nested deeply": (
        "def f(x):\n a = []\n for _ in range(9000): a = [a]\n return a",
        _CALLS,
    ),
    "closed pipes": ("import os\nos.closerange(0, 64)\ndef f(x): return 5", _CALLS),
    "infinity": ("def f(x): return float('inf')", _CALLS),
    "not a number": ("def f(x): return float('nan')", _CALLS),
}  # fmt: skip

TEXTS = {
    "tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "factorials": r"\boxed{((9!)!)!}",
    "a factorial": r"\boxed{99999999!}",
    "a binomial": r"\boxed{\binom{10^{9}}{5 \cdot 10^{8}}}",
    "a sum": r"\boxed{\sum_{k=1}^{10^{12}} k^{k}}",
    "an integral": r"\boxed{\int_0^1 \sin(\cos(\tan(x^{x^x})))^{99} dx}",
    "an expansion": r"\boxed{(a+b+c+d+e+f+g)^{9999}}",
    "digits": rf"\boxed{{{'9' * 200_000}}}",
    "braces": r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "fractions in fractions": r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 301,
    "roots in roots": r"\boxed{" + r"\sqrt{" * 300 + "2" + "}" * 301,
    "boxes in boxes": r"\boxed{" * 20_000,
    "python": r"\boxed{__import__('os').system('id')}",
    "python in a name": r"\boxed{\operatorname{exec}(open('/etc/passwd').read())}",
    "every answer": r"\boxed{" + ", ".join(map(str, range(400))) + "}",
    "a set of all": r"\boxed{\mathbb{R}}",
    "a definition": r"\def\x{\x\x}\boxed{\x}",
    "not a number": r"\boxed{\frac{0}{0}}",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judges() -> dict[str, CodeJudge]:
    return {level: await CodeJudge.start(at(level)) for level in LEVELS}


@pytest.fixture
def judge(judges: dict[str, CodeJudge]) -> CodeJudge:
    return judges["bubblewrap"]


def at(level: str, programs: int = 2) -> CodeConfig:
    return CONFIG.model_copy(update={"sandbox": level, "programs": programs})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[JudgePool]:
    async with JudgePool({"math"}, judges=1, deadline_s=1.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """What the attacks are told of the host: a file that everybody may write, a listening port,
    a process."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        secret = Path(directory) / "secret"
        secret.write_text("hunter2")
        secret.chmod(0o666)
        before = host(secret)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.01)
            yield f"{secret} {server.getsockname()[1]} {os.getpid()}"
            with pytest.raises(TimeoutError):
                server.accept()  # nobody ever connected
        assert host(secret) == before


def host(secret: Path) -> dict[str, Any]:
    """What an escape would change."""
    return {
        "secret": (secret.read_text(), sorted(secret.parent.iterdir())),
        "its attributes": (secret.stat().st_mode, secret.stat().st_mtime),
        "files of programs": sorted(Path(tempfile.gettempdir()).glob("scope-program-*")),
        "limits": Path("/proc/self/limits").read_text(),
        "name": socket.gethostname(),
        "mounts": Path("/proc/self/mounts").read_text(),
        "pattern": Path("/proc/sys/kernel/core_pattern").read_text(),
        "shared memory": Path("/proc/sysvipc/shm").read_text(),
        "programs": sandboxed_processes(),
        "clock": time.time() > 1e9,
    }


def sandboxed_processes() -> list[str]:
    """Processes of whichever sandbox this process made: they are told where the driver is."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except (FileNotFoundError, ProcessLookupError):
            continue
        sandboxed = b"/inside.py" in line or b"/landlocked.py" in line
        if sandboxed and _parent(entry) == os.getpid():
            found.append(line.decode())
    return found


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


async def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) + len(CONTAINED) + len(CHEATS) + len(TEXTS) >= 120


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", REFUSED)
async def test_the_system_refuses(
    judges: dict[str, CodeJudge], target: str, name: str, level: str
) -> None:
    case = json.dumps({"inputs": [target], "outputs": ["held"]})
    verdict = await judges[level].judge(attempt(name), case)
    assert verdict.outcome == "correct", verdict.reason


def attempt(name: str) -> str:
    return _ATTEMPT.format(attack=textwrap.indent(REFUSED[name], "    "))


async def test_landlock_protects_what_is_the_program_s_own_user_s() -> None:
    """The program has the same user as the verifier and the secret, and root's rights nowhere.
    Landlock is all that is between them."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        package = Path(directory, "services", "sandbox")
        shutil.copytree(Path(landlock.__file__).parent, package)
        unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        python = find_interpreter(None).path
        done = subprocess.run(
            [*(unprivileged if os.geteuid() == 0 else []), python, "-B", "-c", _ORDINARY_USER],
            input=json.dumps({name: attempt(name) for name in REFUSED}),
            env={"PYTHONPATH": directory},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert {name: said for name, said in json.loads(done.stdout).items() if said != "held\n"} == {}


_ORDINARY_USER = """
import asyncio, json, os, socket, sys, tempfile
from services.sandbox.confined import Limits
from services.sandbox.landlock import Landlock

async def main():
    sandbox = await Landlock.prepare()
    limits = Limits(time_s=2, memory_bytes=256 << 20, disk_bytes=1 << 20, output_bytes=1 << 20)
    with tempfile.NamedTemporaryFile("w+") as secret, socket.create_server(("", 0)) as server:
        secret.write("hunter2")
        secret.flush()
        before = os.stat(secret.name)
        target = f"{secret.name} {server.getsockname()[1]} {os.getpid()}"
        said = {}
        for name, source in json.load(sys.stdin).items():
            async with sandbox.start(limits, "program", source) as running:
                await running.write(target.encode(), last=True)
                said[name] = (await running.output()).decode() + await running.end()
        assert open(secret.name).read() == "hunter2"
        after = os.stat(secret.name)
        assert (before.st_mode, before.st_mtime) == (after.st_mode, after.st_mtime)
    print(json.dumps(said))

asyncio.run(main())
"""


@pytest.mark.parametrize("name", CONTAINED)
async def test_a_limit_ends_it(judge: CodeJudge, target: str, name: str) -> None:
    source, reason = CONTAINED[name]
    verdict = await judge.judge(source, '{"inputs": [""], "outputs": ["escaped"]}')
    assert verdict.outcome == "incorrect"
    assert reason in verdict.reason


# Where the second level ends a bomb otherwise; what a limit of the process ends is the same.
_OTHERWISE = {
    "disk": "wrote more than 1 MiB",
    "kill -1": "Operation not permitted",
    **{name: CONTAINED[name][1] for name in ("one big file", "open files", "threads", "memory")},
    **{name: CONTAINED[name][1] for name in ("endless loop", "ignored signals", "a crash")},
}


@pytest.mark.parametrize("name", [*_OTHERWISE, "files", "a disk that fills up slowly"])
async def test_a_limit_of_landlock_s_level_ends_it(
    judges: dict[str, CodeJudge], target: str, name: str
) -> None:
    bombs = {
        "files": ("for i in range(9999): open(f'{i}', 'w')", "made more than 1000 files"),
        "a disk that fills up slowly": (
            "import time\nopen('a', 'wb').write(b'x' * 600000)\n"
            "open('b', 'wb').write(b'x' * 600000)\ntime.sleep(3600)",
            "wrote more than 1 MiB",
        ),
    }
    source, reason = bombs.get(name) or (CONTAINED[name][0], _OTHERWISE[name])
    verdict = await judges["landlock"].judge(source, '{"inputs": [""], "outputs": ["escaped"]}')
    assert verdict.outcome == "incorrect"
    assert reason in verdict.reason


@pytest.mark.parametrize("name", CHEATS)
async def test_a_wrong_program_is_incorrect(judge: CodeJudge, target: str, name: str) -> None:
    source, reference = CHEATS[name]
    if name == "the tests in memory":
        # It would know the answers if it saw the tests: without them it is wrong.
        assert (await judge.judge("def f(x): return 2 * x + 1", json.dumps(reference))).outcome == (
            "correct"
        )
    assert (await judge.judge(source, json.dumps(reference))).outcome == "incorrect"


@pytest.mark.parametrize("name", TEXTS)
async def test_a_hostile_answer_is_not_correct(
    pool: JudgePool, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = pool.replaced
    verdict = await pool.judge("math", TEXTS[name], "42")
    assert verdict.outcome in ("incorrect", "unknown")
    assert pool.replaced - before <= 2  # two tries, and a deadline for each
    monkeypatch.setattr(pool, "_deadline_s", DEADLINE_S)
    assert (await pool.judge("math", r"\boxed{\frac{84}{2}}", "42")).outcome == "correct"


@pytest.mark.parametrize("level", LEVELS)
async def test_bombs_do_not_slow_the_others(target: str, level: str) -> None:
    """All good programs are through while every bomb still goes off: they wait for none of them,
    in whatever time it takes here."""
    crowd = await CodeJudge.start(at(level, programs=8).model_copy(update={"time_s": 3600.0}))
    right = '{"inputs": ["2"], "outputs": ["4"]}'
    slow = ("endless loop", "waiting for ever", "huge integer", "regular expression")
    quick = ("memory", "threads", "disk", "endless output")
    endless = [asyncio.create_task(crowd.judge(CONTAINED[name][0], right)) for name in slow]
    ending = [asyncio.create_task(crowd.judge(CONTAINED[name][0], right)) for name in quick]
    for _ in range(5):
        assert (await crowd.judge("print(int(input()) * 2)", right)).outcome == "correct"
    assert {(await bomb).outcome for bomb in ending} == {"incorrect"}
    assert not any(bomb.done() for bomb in endless)
    for bomb in endless:
        bomb.cancel()
    await asyncio.wait(endless)
