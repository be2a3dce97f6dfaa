"""Waiting for conditions. The one deadline of all tests ends what hangs and nothing else: what a
test waits for takes far less, even on a machine that is busy with other work."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 600.0


async def until(condition: Callable[[], Any], *, every_s: float = 0.01) -> Any:
    """The first true value of `condition`, which may be a coroutine function."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(every_s)


def wait_until(condition: Callable[[], Any], *, every_s: float = 0.02) -> Any:
    """The same outside of an event loop."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not so within {DEADLINE_S:.0f} s"
        time.sleep(every_s)
    return value
