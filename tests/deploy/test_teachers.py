"""A run that is told to stop while its teachers start."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from typing import Any

import pytest

from deploy import teachers
from deploy.config import load
from rollout.own_weights import OwnWeights
from services.tasks import end
from teacher.serve import TeacherFailed
from tests.deploy.conftest import ROOT
from tests.waiting import DEADLINE_S


async def test_nothing_is_taken_down_before_the_thread_that_starts_them_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began, order = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def deploy(*_: Any, stopping: threading.Event, **__: Any) -> str:
        loop.call_soon_threadsafe(began.set)
        assert stopping.wait(DEADLINE_S)
        order.append("thread ended")
        raise TeacherFailed("told to stop")

    monkeypatch.setattr(teachers, "deploy_teacher", deploy)
    monkeypatch.setattr(teachers, "stop_teacher", lambda _: order.append("teacher stopped"))

    async def run() -> None:
        async with AsyncExitStack() as stack:
            stack.callback(lambda: order.append("Ray shut down"))
            config = load(ROOT / "deploy/runs/demo.yaml")
            weights = OwnWeights(config.student)
            await teachers.start_teachers(
                config, {"default": None}, {}, stack, lambda _: None, weights
            )

    running = asyncio.create_task(run())
    await began.wait()
    await end([running])
    assert running.cancelled()
    assert order == ["thread ended", "teacher stopped", "Ray shut down"]
