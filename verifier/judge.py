"""The process that judges untrusted text: confined first, then one job after another.

Started by `verifier.judge_pool` as `python -m verifier.judge SETUP`. Standard input is a socket.
Each frame on it is a length (4 bytes, big endian) and that many bytes of JSON:

    in   {"kind": …, "text": …, "reference": …}    text: the completion
    out  {"ready": true} once, then {"outcome": …, "reason": …} or {"fault": …} for each job

A fault, and any other end of a job, is this process's end too: the parent kills it and starts
another. Only the standard library is imported before the limits are in force.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from services.sandbox.inside import LENGTH_BYTES, frame

if TYPE_CHECKING:
    from services.trajectory import Verdict

Judge: TypeAlias = "Callable[[str, str], Verdict]"

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_OPEN_FILES = 64
_LOG_BYTES = 64 * 1024  # all that may be written to a file: standard error, a traceback


@dataclass(frozen=True, slots=True)
class Setup:
    """What a judge is told when it starts. `parent` is the process id that it must not outlive,
    `cpu_s` are seconds of a processor for one job, `options` the named arguments of the judges of
    our own, by kind."""

    parent: int
    memory_mb: int
    cpu_s: float
    kinds: tuple[str, ...]
    options: dict[str, dict[str, Any]]


def main() -> None:
    """Confines itself, then judges whatever it is sent."""
    setup = Setup(**json.loads(sys.argv[1]))
    _confine(setup)
    jobs, replies = _take_socket()
    logging.disable()  # libraries log what they read; standard error is for this one's end
    judges = {kind: _load(kind, setup.options.get(kind, {})) for kind in setup.kinds}
    _send(replies, {"ready": True})
    while header := jobs.read(LENGTH_BYTES):
        _allow(setup.cpu_s)
        try:
            job = json.loads(jobs.read(int.from_bytes(header, "big")))
            verdict = judges[job["kind"]](job["text"], job["reference"])
        except MemoryError:
            _send(replies, {"fault": f"ran out of its {setup.memory_mb} MiB of memory"})
            signal.pause()  # the parent kills it; an exit could reset the socket under the reply
        else:
            _send(replies, {"outcome": verdict.outcome, "reason": verdict.reason})


def _confine(setup: Setup) -> None:
    """Takes away what judging does not need, for good: hard limits, which nothing raises again."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != setup.parent:  # it died before it could take this process along
        sys.exit("the parent is gone")
    for limit, most in (
        (resource.RLIMIT_AS, setup.memory_mb * 2**20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _LOG_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),  # no child and no thread; the kernel exempts root
    ):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def _allow(cpu_s: float) -> None:
    """Lets this process use so many more seconds of a processor, rounded up. Past them the kernel
    ends it, even where the parent, which keeps the deadline, cannot."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = math.ceil(time.process_time() + cpu_s) + 1
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _take_socket() -> tuple[BinaryIO, BinaryIO]:
    """Both directions of the socket, under numbers that a stray input() does not know."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(0), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return jobs, replies


def _load(kind: str, options: dict[str, Any]) -> Judge:
    """Imports one kind of judge."""
    if kind == "exact":
        from verifier import exact

        return functools.partial(exact.judge, **options)
    if kind == "math":
        from verifier import math_answer

        return functools.partial(math_answer.judge, **options)
    module, _, function = kind.partition(":")
    own: Judge = getattr(importlib.import_module(module), function)
    return own


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(frame(message))
    replies.flush()


if __name__ == "__main__":
    main()
