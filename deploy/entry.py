"""The `scope` command's way in, which imports nothing: Ctrl-C ends it in one line from the first
moment on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Runs the command; the status is 130 after Ctrl-C or SIGTERM, as shells have it."""
    with importing():
        from deploy import cli
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops in order does so
    try:
        cli.main()
    except KeyboardInterrupt:
        _say()
        raise SystemExit(130) from None


@contextmanager
def importing() -> Iterator[None]:
    """Here signals end the process at once: nothing has been started, and libraries that are being
    imported swallow a KeyboardInterrupt, so that the command would go on."""
    before = {signum: signal.signal(signum, _leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _leave(*_: object) -> None:
    _say()
    os._exit(130)


def _say() -> None:
    print("scope: interrupted", file=sys.stderr, flush=True)
