"""A stage's worker that waits to be stopped: for what happens to workers, whatever they do."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import ray

from deploy.roles import Role
from services.config import Config, Resources
from services.pipeline import PIPELINE, TRAIN
from services.trajectory import Prompt
from services.worker import Post, StepWorker


class IdleWorker(StepWorker[Prompt, Prompt, Config]):
    """Once it was stopped it works until `finish`."""

    takes = Prompt

    def __init__(self, post: Post, settings: Config) -> None:
        super().__init__(post, settings)
        self._finished = asyncio.Event()

    async def process(self, item: Prompt) -> Prompt:
        return item

    async def run(self) -> None:
        await self.stopping.wait()
        await self._finished.wait()

    async def finish(self) -> None:
        self._finished.set()

    async def node(self) -> str:
        """The id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())


def idle_role(name: str, workers: int, **resources: Any) -> Role:
    step = replace(PIPELINE[name], worker="tests.deploy.idle:IdleWorker")
    return Role(name, step, workers, 1, Resources(**resources), (TRAIN,))
