"""The system calls that sandboxed code may make, as the program that the kernel filters them by.

An allow list: what a single-process Python program needs. All else fails with EPERM: sockets,
new processes and namespaces, mounts, ptrace, io_uring, bpf, keyctl, perf, System V memory,
memfd, setuid and whatever future kernels add. Calls of another architecture, which have other
numbers, end the process.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from services.sandbox.confined import SandboxRefused

# struct sock_filter: code, jump if true, jump if false, constant (linux/filter.h).
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets into struct seccomp_data (linux/seccomp.h); arguments are eight bytes, low half first.
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # the same numbers with this bit are another interface of x86-64

_CLONE_THREAD = 0x00010000
_CLONE_NEW_NAMESPACE = 0x7E020080  # cgroup, uts, ipc, user, pid, network, mount, time
# What Python asks of its own files. Not TIOCSTI, which types into a terminal.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# What can reach other processes of the same user, or files that may not be opened.
_ON_OTHERS = frozenset(
    {"execve", "kill", "tkill", "tgkill", "chmod", "fchmod", "fchmodat", "utimensat"}
)
_ITSELF = 0
# Duplicates, flags and locks. Not F_SETOWN and F_SETSIG, which make the kernel send signals.
_FCNTLS = (*range(8), 36, 37, 38, 1030)

_X86_64 = """
    read:0 write:1 readv:19 writev:20 pread64:17 pwrite64:18 open:2 openat:257 close:3
    close_range:436 stat:4 fstat:5 lstat:6 newfstatat:262 statx:332 statfs:137 fstatfs:138 poll:7
    ppoll:271 select:23 pselect6:270 epoll_create1:291 epoll_ctl:233 epoll_wait:232
    epoll_pwait:281 eventfd2:290 pipe:22 pipe2:293 lseek:8 mmap:9 mprotect:10 munmap:11 mremap:25
    brk:12 madvise:28 rt_sigaction:13 rt_sigprocmask:14 rt_sigreturn:15 rt_sigtimedwait:128
    rt_sigpending:127 rt_sigsuspend:130 sigaltstack:131 access:21 faccessat:269 faccessat2:439
    sched_yield:24 sched_getaffinity:204 dup:32 dup2:33 dup3:292 nanosleep:35 clock_nanosleep:230
    clock_gettime:228 clock_getres:229 gettimeofday:96 time:201 times:100 getitimer:36
    setitimer:38 alarm:37 pause:34 getpid:39 gettid:186 getppid:110 getuid:102 geteuid:107
    getgid:104 getegid:108 getresuid:118 getresgid:120 getgroups:115 getpgrp:111 getpgid:121
    getsid:124 getrusage:98 getrlimit:97 prlimit64:302 exit:60 exit_group:231 futex:202
    set_robust_list:273 get_robust_list:274 set_tid_address:218 rseq:334 arch_prctl:158 getcpu:309
    getrandom:318 uname:63 sysinfo:99 getcwd:79 chdir:80 fchdir:81 mkdir:83 mkdirat:258 rmdir:84
    unlink:87 unlinkat:263 rename:82 renameat:264 renameat2:316 readlink:89 readlinkat:267
    symlink:88 symlinkat:266 link:86 linkat:265 ftruncate:77 truncate:76 fsync:74 fdatasync:75
    chmod:90 fchmod:91 fchmodat:268 umask:95 getdents64:217 fcntl:72 flock:73 utimensat:280
    sendfile:40 copy_file_range:326 restart_syscall:219 socketpair:53 sendto:44 recvfrom:45
    shutdown:48 getsockopt:55 setsockopt:54 kill:62 tkill:200 tgkill:234 wait4:61 waitid:247
    execve:59
"""
_AARCH64 = """
    read:63 write:64 readv:65 writev:66 pread64:67 pwrite64:68 openat:56 close:57 close_range:436
    fstat:80 newfstatat:79 statx:291 statfs:43 fstatfs:44 ppoll:73 pselect6:72 epoll_create1:20
    epoll_ctl:21 epoll_pwait:22 eventfd2:19 pipe2:59 lseek:62 mmap:222 mprotect:226 munmap:215
    mremap:216 brk:214 madvise:233 rt_sigaction:134 rt_sigprocmask:135 rt_sigreturn:139
    rt_sigtimedwait:137 rt_sigpending:136 rt_sigsuspend:133 sigaltstack:132 faccessat:48
    faccessat2:439 sched_yield:124 sched_getaffinity:123 dup:23 dup3:24 nanosleep:101
    clock_nanosleep:115 clock_gettime:113 clock_getres:114 gettimeofday:169 times:153
    getitimer:102 setitimer:103 getpid:172 gettid:178 getppid:173 getuid:174 geteuid:175
    getgid:176 getegid:177 getresuid:148 getresgid:150 getgroups:158 getpgid:155 getsid:156
    getrusage:165 getrlimit:163 prlimit64:261 exit:93 exit_group:94 futex:98 set_robust_list:99
    get_robust_list:100 set_tid_address:96 rseq:293 getcpu:168 getrandom:278 uname:160 sysinfo:179
    getcwd:17 chdir:49 fchdir:50 mkdirat:34 unlinkat:35 renameat:38 renameat2:276 readlinkat:78
    symlinkat:36 linkat:37 ftruncate:46 truncate:45 fsync:82 fdatasync:83 fchmod:52 fchmodat:53
    umask:166 getdents64:61 fcntl:25 flock:32 utimensat:88 sendfile:71 copy_file_range:285
    restart_syscall:128 socketpair:199 sendto:206 recvfrom:207 shutdown:210 getsockopt:209
    setsockopt:208 kill:129 tkill:130 tgkill:131 wait4:260 waitid:95 execve:221
"""


@dataclass(frozen=True, slots=True)
class _Architecture:
    audit: int  # linux/audit.h
    clone: int
    clone3: int
    ioctl: int
    allowed: dict[str, int]


def _numbers(table: str) -> dict[str, int]:
    entries = (entry.partition(":") for entry in table.split())
    return {name: int(number) for name, _, number in entries}


_ARCHITECTURES = {
    "x86_64": _Architecture(0xC000003E, 56, 435, 16, _numbers(_X86_64)),
    "aarch64": _Architecture(0xC00000B7, 220, 435, 29, _numbers(_AARCH64)),
}


def program(machine: str, *, among_others: bool = False) -> bytes:
    """The filter for `machine` (as `platform.machine()` names it), as `struct sock_filter`s.

    Args:
        machine: the architecture.
        among_others: the process shares its user, process ids and files' attributes with the
            host, so calls that act on those are refused too, and so is execve.

    Raises:
        SandboxRefused: there is no table of this architecture's system calls.
    """
    calls = _ARCHITECTURES.get(machine)
    if calls is None:
        raise SandboxRefused(f"there is no system call filter for {machine}")
    deny = _step(_RETURN, _ERROR | errno.EPERM)
    allow = _step(_RETURN, _ALLOW)
    steps = [
        *_unless_equal(_ARCHITECTURE, calls.audit, _step(_RETURN, _KILL)),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, _KILL),
        # glibc tries clone3, whose flags are out of a filter's reach, and then clone.
        *_when(calls.clone3, [_step(_RETURN, _ERROR | errno.ENOSYS)]),
        *_when(
            calls.clone,
            [
                _step(_LOAD, _ARGUMENT_0),
                _step(_ANY_BIT, _CLONE_NEW_NAMESPACE, 0, 1),
                deny,
                _step(_ANY_BIT, _CLONE_THREAD, 0, 1),
                allow,
                deny,
            ],
        ),
        *_when(calls.ioctl, [_step(_LOAD, _ARGUMENT_1), *_any_of(_IOCTLS, allow, deny)]),
        *(_alone_only(calls.allowed, allow, deny) if among_others else ()),
        *_any_of(tuple(calls.allowed.values()), allow, deny),
    ]
    return b"".join(steps)


def _alone_only(numbers: dict[str, int], allow: bytes, deny: bytes) -> list[bytes]:
    refused = [number for name, number in numbers.items() if name in _ON_OTHERS]
    return [
        *(step for number in refused for step in _when(number, [deny])),
        *_when(
            numbers["prlimit64"],
            [_step(_LOAD, _ARGUMENT_0), *_any_of((_ITSELF,), allow, deny)],
        ),
        *_when(numbers["fcntl"], [_step(_LOAD, _ARGUMENT_1), *_any_of(_FCNTLS, allow, deny)]),
    ]


def _step(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, constant)


def _unless_equal(offset: int, value: int, otherwise: bytes) -> list[bytes]:
    return [_step(_LOAD, offset), _step(_EQUAL, value, 1, 0), otherwise]


def _when(number: int, block: list[bytes]) -> list[bytes]:
    """`block`, which must end in a return, for one system call."""
    return [_step(_EQUAL, number, 0, len(block)), *block]


def _any_of(values: tuple[int, ...], then: bytes, otherwise: bytes) -> list[bytes]:
    jumps = [
        _step(_EQUAL, value, len(values) - index, 0)  # over the rest of the list and `otherwise`
        for index, value in enumerate(values)
    ]
    return [*jumps, otherwise, then]
