"""Asyncio tasks that belong together: one ends the others, and none is forgotten."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_AGAIN_S = 0.5


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels tasks until they are over. Once may not be enough: the Redis client sends with
    `wait_for`, which can swallow a cancellation before Python 3.12 (python/cpython#86296)."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)


async def beside(work: Awaitable[T], *others: Awaitable[object]) -> T:
    """The result of `work`, while `others` run beside it: when one of them fails, everything ends
    with its error, and when the work is over, whichever of them was started here is cancelled. A
    task that is passed in goes on, and is its owner's to end."""
    mine = asyncio.ensure_future(work)
    tasks = [asyncio.ensure_future(other) for other in others]
    started = [t for t, other in zip(tasks, others, strict=True) if t is not other]
    try:
        running = {mine, *tasks}
        while not mine.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            failed = [t for t in tasks if t in done and not t.cancelled() and t.exception()]
            if failed:
                failed[0].result()
        return mine.result()
    finally:
        await end([mine, *started])


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order, of what runs side by side. One failure ends the others' work too, and
    is raised as it is: whoever called decides by its type what follows."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def in_thread(work: Callable[[], object]) -> asyncio.Future[None]:
    """Runs blocking `work` on a daemon thread: unlike asyncio's own threads, one that never
    comes back does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # is looked at

    def settle(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def main() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as caught:  # carried over to whoever awaits the future
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=main, daemon=True, name="work").start()
    return future
