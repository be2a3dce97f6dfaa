"""The environments of one worker, by the kind that a prompt's data source has."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any, Self

from rollout.config import EnvironmentConfig
from rollout.environment import Environment, Factory, factory
from rollout.python_tool import python_tool
from services.sandbox.confined import Sandbox
from services.sandbox.levels import prepare
from services.trajectory import Prompt


class Environments:
    """Begins episodes.

    Args:
        config: who answers whom.
        sandbox: for the programs of `python`, where it is used.

    Raises:
        rollout.environment.UnknownEnvironment: one of one's own cannot be imported.
    """

    def __init__(self, config: EnvironmentConfig, sandbox: Sandbox | None = None) -> None:
        self._config = config
        own = (kind for kind in config.used_kinds if ":" in kind)
        self._factories: dict[str, Factory] = {kind: factory(kind) for kind in own}
        if sandbox is not None:
            tool = partial(python_tool, sandbox, config.python, config.role)
            self._factories["python"] = lambda prompt: tool()

    @classmethod
    async def start(cls, config: EnvironmentConfig) -> Self:
        """With a sandbox where one is needed.

        Raises:
            services.sandbox.confined.SandboxRefused: programs cannot be confined here.
        """
        if "python" not in config.used_kinds:
            return cls(config)
        return cls(config, await prepare(config.python.sandbox, config.python.python))

    def answers(self, prompt: Prompt) -> bool:
        """Whether `prompt` has an environment."""
        return self._config.kind_of(prompt.data_source) != "none"

    def begin(self, prompt: Prompt) -> AbstractAsyncContextManager[Environment]:
        """The environment of a new episode."""
        made: Any = self._factories[self._config.kind_of(prompt.data_source)](prompt)
        return made if isinstance(made, AbstractAsyncContextManager) else nullcontext(made)
