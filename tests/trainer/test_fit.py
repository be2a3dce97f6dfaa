"""What Ray Train is told of the learner; the runs of tests/deploy start it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config import Resources
from services.stage import Connection
from trainer.config import TrainerConfig
from trainer.fit import trainer
from trainer.loop import LoopConfig


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "cpu:gloo,cuda:nccl")])
def test_ranks_outwait_whatever_rank_0_waits_for(
    connection: Connection, tmp_path: Path, gpus: float, backend: str
) -> None:
    """A collective ends a rank whose clock runs out. Ray's own is 1,800 s, less than rank 0 may
    wait for groups, for evaluations and for engines that start."""
    settings = TrainerConfig(ranks=2, stall_timeout_s=7 * 24 * 3600, resources=Resources(gpus=gpus))
    config = LoopConfig(
        connection=connection,
        trainer=settings,
        student="student",
        temperature=1.0,
        total_groups=1,
        run_dir=tmp_path,
        weight_store=None,
        weight_transfer="store",
        engine_dtype="float32",
        seed=0,
    )
    group = trainer(config).backend_config
    assert group.backend == backend
    assert group.timeout_s > settings.stall_timeout_s
