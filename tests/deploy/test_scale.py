"""Workers that join and leave while a run goes on, as real Ray actors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy import crew as crew_module
from deploy.config import ConfigError, dump, load
from deploy.crew import Crew
from deploy.scale import parse, scale
from deploy.status import open_streams
from services.config import Config, StageConfig
from services.stage import Connection
from tests.deploy.conftest import ROOT
from tests.deploy.idle import idle_role
from tests.waiting import until


def actor(role: str, number: int) -> Any:
    return ray.get_actor(f"scaled-{role}-{number}")


def exists(role: str, number: int) -> bool:
    try:
        actor(role, number)
    except ValueError:
        return False
    return True


@pytest.mark.slow
async def test_workers_join_and_leave(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    crew = Crew(Connection("redis://nowhere", "scaled", StageConfig()), said.append)
    crew.staff(idle_role("rollout", 1, cpus=0.1), Config())
    for _ in range(2):  # the driver asks for the same again and again
        crew.scale("rollout", 3)
    await asyncio.gather(*(actor("rollout", number).__ray_ready__.remote() for number in range(3)))
    assert said == ["rollout: 1 → 3 workers"]

    # The newest leave, and not before they have finished what they hold.
    crew.scale("rollout", 1)
    assert crew.revive() == []
    assert exists("rollout", 1)
    await asyncio.gather(*(actor("rollout", number).finish.remote() for number in (1, 2)))
    await until(lambda: not crew.revive() and not exists("rollout", 1) and not exists("rollout", 2))
    assert exists("rollout", 0)

    # One that found no room waits for it, and leaves at once when it is not wanted any more.
    monkeypatch.setattr(crew_module, "_STOP_S", 0.2)
    crew.staff(idle_role("verifier", 2, cpus=100), Config())
    crew.scale("verifier", 1)
    await until(lambda: not crew.revive() and not exists("verifier", 1))
    assert exists("verifier", 0)

    # A name is never given twice: what its first bearer held in Redis must not seem the second's.
    crew.scale("rollout", 2)
    assert exists("rollout", 3)
    for role, number in (("rollout", 0), ("rollout", 3), ("verifier", 0)):
        ray.kill(actor(role, number))


async def test_a_wish_waits_in_the_run_s_redis(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(load(ROOT / "deploy/runs/demo.yaml")))
    await scale(tmp_path, ["rollout=8", "verifier=2"])
    await scale(tmp_path, ["rollout=3"])
    async with open_streams(tmp_path) as streams:
        assert await streams.wanted() == {"rollout": 3, "verifier": 2}


@pytest.mark.parametrize("wish", ["rollout", "rollout=0", "rollout=-1", "learner=2", "=2"])
def test_a_wish_that_makes_no_sense_is_one_sentence(wish: str) -> None:
    with pytest.raises(ConfigError, match="the roles are rollout, verifier, teacher"):
        parse([wish])
