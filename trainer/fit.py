"""Starts the learner's loop on Ray Train, and ends it."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import actors
from ray._private.worker import global_worker
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)

from trainer.loop import LoopConfig, train_loop

# Ranks wait in a collective while rank 0 waits for groups, for evaluations and for engines that
# start: Ray's default of 1,800 s would end rank 1 whatever `stall_timeout_s` says. Rank 0 and the
# driver's watch end what stalls; a rank that died closes its connections, which needs no clock.
_COLLECTIVE_S = 30 * 24 * 3600
_END_S, _END_POLL_S = 10.0, 0.2


async def end_fit(fit: asyncio.Future[None]) -> None:
    """Ends a `fit` of Ray Train that waits in another thread, before `ray.shutdown`: that would
    take apart what the thread waits in, and sometimes crash the process (SIGSEGV, Ray 2.60). Ray
    keeps the controller to itself, and its own way to abort it is for the main thread's Ctrl-C."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            while not fit.done():
                for actor, facts in actors(job_id=job, actor_state_name="ALIVE").items():
                    if facts["ActorClassName"] == "TrainController":
                        global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)
                await asyncio.wait({fit}, timeout=_END_POLL_S)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train without two of its callbacks.

    The cleaner of placement groups asks the dashboard whether the controller lives, takes "not
    known yet" of a dashboard that is just starting for no, and removes the ranks' group under them
    (Ray 2.60, on a slow machine). The group goes with its controller anyway. That of Ray Data
    starts a process for datasets, of which there are none: trajectories come through Redis.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unwanted)]


def trainer(config: LoopConfig) -> Any:
    """The Ray Train run of the learner: `config.trainer.ranks` workers, restarted from the last
    checkpoint when one dies."""
    resources = config.trainer.resources
    return _Trainer(
        # Not as train_loop_config: Ray Train shows that in its dashboard, passwords and all.
        functools.partial(train_loop, config),
        # Checkpoints and what is offloaded travel between CPUs, gradients between devices.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo", timeout_s=_COLLECTIVE_S
        ),
        scaling_config=ScalingConfig(
            num_workers=config.trainer.ranks,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus}
            | ({"GPU": resources.gpus} if resources.gpus else {})
            | resources.custom,
            placement_strategy="PACK",  # gradients are exchanged every step: the fewest nodes
        ),
        run_config=RunConfig(
            name="learner",
            storage_path=str((config.run_dir / "ray_train").resolve()),
            failure_config=FailureConfig(max_failures=config.trainer.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
