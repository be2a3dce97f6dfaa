"""The seam between an episode and the world that answers in it.

the student's turn ──step──▶ Environment ──▶ Reply: the world's next messages
                                        └──▶ Over, with a note or a verdict of its own
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from services.errors import WorkerFailed
from services.trajectory import Message, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Reply:
    """The world's next messages, to which the student answers. `failed` says that the student's
    call of a tool did, for the metrics."""

    messages: Sequence[Message]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Over:
    """The episode is over. `note` is what the verifier reads in the place of the last turn;
    a `verdict` stands in the place of its judgement."""

    note: str | None = None
    verdict: Verdict | None = None


class Environment(Protocol):
    """The world of one episode."""

    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        """What follows the student's newest turn.

        Args:
            said: all messages before it, the prompt's first.
            text: the turn, with special tokens as text and without its end token.

        Raises:
            services.errors.BadItem: this prompt can never be played.
            services.errors.Unavailable: something that the world needs is down; the prompt waits.
        """
        ...


Opened: TypeAlias = AbstractAsyncContextManager[Environment]
Factory: TypeAlias = Callable[[Prompt], Environment | Opened]
"""Makes the environment of one episode, or a context manager that is closed when it is over."""


class EnvironmentFailed(RuntimeError):
    """The environment broke, which is no fault of the prompt: it is tried again."""


class UnknownEnvironment(WorkerFailed):
    """There is no such environment; the message says why."""


def factory(kind: str) -> Factory:
    """The factory of an environment of one's own, `package.module:factory`.

    Raises:
        UnknownEnvironment: it cannot be imported.
    """
    module, _, name = kind.partition(":")
    try:
        made: Factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnknownEnvironment(f"environment: {kind!r}: {error}") from error
    return made
