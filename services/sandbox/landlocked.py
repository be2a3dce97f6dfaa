"""Takes this process's rights away for good, then becomes inside.py. Standard library only, one
file, started by `services.sandbox.landlock` as

    python landlocked.py PARENT USER DIRECTORY VERSION FILTER READABLE MODE ...

PARENT is the process that this one must not outlive, USER whom it shall run as, DIRECTORY where
it may make files, VERSION that of Landlock's interface, FILTER a system call filter in
hexadecimal digits, READABLE what it may read. What follows is for inside.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

NO_CAPABILITY = (
    "root here lacks a capability; add CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_SETUID and CAP_SETGID, "
    "or run this worker as another user"
)
_INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside.py")
_THREADS = 5  # the place of THREADS among the arguments of inside.py

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
# System calls of Landlock, the same on every architecture, and its rights (linux/landlock.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
_READ = _READ_FILE | _READ_DIR
_ALL_FS, _IOCTL_DEV = (1 << 15) - 1, 1 << 15  # the latter since version 5
_ALL_NET, _ALL_SCOPES = 0b11, 0b11  # since version 4: TCP; since version 6: signals, sockets
_DEVICES = {
    "/dev/null": _READ_FILE | _WRITE_FILE | _TRUNCATE,
    "/dev/zero": _READ_FILE,
    "/dev/urandom": _READ_FILE,
}

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("fs", "net", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def main() -> None:
    """Gives its rights away, then becomes what its arguments name."""
    parent, user, directory, version, rules, readable = sys.argv[1:7]
    sys.argv[:7] = [_INSIDE]
    with open(_INSIDE, encoding="utf-8") as file:
        inside = compile(file.read(), _INSIDE, "exec", dont_inherit=True)
    os.chdir(directory)
    os.umask(0o077)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(int(user), int(user), int(user))
            os.setresuid(int(user), int(user), int(user))
        except PermissionError:
            sys.exit(NO_CAPABILITY)
    else:  # the kernel counts the threads of a user, not those of a program
        sys.argv[_THREADS] = str(int(sys.argv[_THREADS]) + _tasks_of(int(user)))
    _drop_capabilities()
    _must(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _must(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))  # another user's process loses it
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")
    _restrict_files(int(version), directory, readable.split(os.pathsep))
    _restrict_calls(bytes.fromhex(rules))
    exec(inside, {"__name__": "__main__"})


def _tasks_of(user: int) -> int:
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == user:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return count


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _must(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def _restrict_files(version: int, directory: str, readable: list[str]) -> None:
    handled = _Ruleset(
        fs=_ALL_FS | (_IOCTL_DEV if version >= 5 else 0),
        net=_ALL_NET if version >= 4 else 0,
        scoped=_ALL_SCOPES if version >= 6 else 0,
    )
    size = ctypes.c_size_t(ctypes.sizeof(handled))  # what an old kernel does not know is zero
    ruleset = _must(_libc.syscall(_CREATE_RULESET, ctypes.byref(handled), size, 0))
    allowed = dict.fromkeys(filter(os.path.isdir, readable), _READ) | _DEVICES
    allowed[directory] = _READ | _WRITE_FILE | _TRUNCATE | _MAKE_REG
    for path, rights in allowed.items():
        # The working directory by its name "." because this user may not walk to where it is.
        parent = os.open("." if path == directory else path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.byref(_PathBeneath(rights, parent))
        _must(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
        os.close(parent)
    _must(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _restrict_calls(rules: bytes) -> None:
    program = _Filter(len(rules) // 8, rules)
    _must(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def _must(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


if __name__ == "__main__":
    main()
