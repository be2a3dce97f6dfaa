"""The learner's life on Ray Train: every rank runs `train_loop`.

┌─▶ wait        a step's groups from Redis (rank 0), broadcast to all ranks
│   learn       perplexity, weights, gradients, AdamW          trainer.learner
│   publish     new weights into the object store (rank 0); rollout picks them up
│   record      metrics, and progress: the feeder admits more prompts
└── checkpoint  every n steps: durable first, then the groups are acknowledged in Redis
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, get_device

from services.models import load_model, load_tokenizer
from services.stage import Connection, totals
from services.trajectory import ScoredGroup, decode
from trainer import checkpoint
from trainer.batch import Batch
from trainer.config import TrainerConfig
from trainer.learner import Learner, Metrics
from trainer.reader import GroupReader

log = logging.getLogger(__name__)

_PUBLISH_TIMEOUT_S = 300.0
_PUBLISH_RETRY_S = 0.5
_LOOK_AFTER_S = 5.0


@dataclass(frozen=True)
class LoopConfig:
    """All that a rank needs."""

    connection: Connection
    trainer: TrainerConfig
    student: str
    temperature: float
    total_groups: int
    run_dir: Path
    weight_store: Any = field(repr=False)  # handle of services.weight_store.WeightStore
    seed: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def export(self) -> Path:
        return self.run_dir / "export"


def train_loop(config: LoopConfig) -> None:
    """Trains until every prompt of the run is trained or dead, then exports the student."""
    if config.trainer.torch_threads:
        torch.set_num_threads(config.trainer.torch_threads)
    torch.manual_seed(config.seed)
    rank = get_context().get_world_rank()
    found = checkpoint.latest(config.checkpoints)
    learner = _learner(config, found)
    if rank == 0:
        _Leader(config, learner).lead(found)
    else:
        while groups := _broadcast(None):
            learner.step(_batch(groups))


def _learner(config: LoopConfig, found: checkpoint.Checkpoint | None) -> Learner:
    device = str(get_device())
    source = str(found.model) if found else config.student
    model = load_model(source, dtype=config.trainer.dtype, device=device)
    steps = -(-config.total_groups // config.trainer.groups_per_step)
    learner = Learner(model, config.trainer, temperature=config.temperature, total_steps=steps)
    if found:
        learner.load_state_dict(found.trainer())
        log.info("continuing from %s", found.path)
    return learner


class _Leader:
    """Rank 0: the one that talks to Redis, the weight store and the disk."""

    def __init__(self, config: LoopConfig, learner: Learner) -> None:
        self._config = config
        self._learner = learner
        self._tokenizer = load_tokenizer(config.student)
        self._store_checked = time.monotonic()
        self._carried: Metrics = {}  # time spent after the last step's record
        self._reader = GroupReader(
            config.connection,
            need=learner.objective.teacher,
            groups_per_step=config.trainer.groups_per_step,
            total=config.total_groups,
            timeout_s=config.trainer.stall_timeout_s,
        )

    def lead(self, found: checkpoint.Checkpoint | None) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._reader.start(found.progress if found else None))
            self._publish()
            while self._one_step(runner):
                pass
            self._checkpoint(runner)
            checkpoint.export(self._config.export, self._learner.model, self._tokenizer)
            runner.run(self._reader.streams.redis.aclose())

    def _one_step(self, runner: asyncio.Runner) -> bool:
        """One turn of the loop in the module's docstring; False when nothing is left."""
        laps, self._carried = self._carried, {}
        with _timed(laps, "wait"):
            taken = runner.run(self._reader.next_step(self._look_after_store))
            groups = _broadcast([item.payload for item in taken])
        if not groups:
            return False
        version = self._learner.step_number
        batch = _batch(groups)
        metrics = self._learner.step(batch)
        with _timed(laps, "publish"):
            self._publish()
        orders = [group.prompt.order for group in batch.groups]
        runner.run(self._reader.trained(self._learner.step_number, taken, orders))
        runner.run(self._record(metrics | laps | _group_metrics(batch.groups, version)))
        # After the record, so that no step of the surviving history goes without one. The time
        # that it takes is the next step's, which waits for it.
        if self._learner.step_number % self._config.trainer.checkpoint.every_steps == 0:
            with _timed(self._carried, "checkpoint"):
                self._checkpoint(runner)
        return True

    def _publish(self) -> None:
        """Hands this version to the store; returns when the store owns it."""
        weights = self._learner.weights()
        deadline = time.monotonic() + _PUBLISH_TIMEOUT_S
        while True:
            done = self._config.weight_store.publish.remote(weights.version, weights)
            try:
                ray.get(done, timeout=_PUBLISH_TIMEOUT_S)
                return
            except RayActorError:  # it is being restarted
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PUBLISH_RETRY_S)

    def _look_after_store(self) -> None:
        """Publishes again when the store was restarted: without weights nothing is sampled, and
        without samples there would be no next step to publish after."""
        if time.monotonic() - self._store_checked < _LOOK_AFTER_S:
            return
        self._store_checked = time.monotonic()
        try:
            held = ray.get(self._config.weight_store.version.remote(), timeout=_LOOK_AFTER_S)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("the weight store cannot be reached: %s", error)
            return
        if held is None:
            self._publish()

    def _checkpoint(self, runner: asyncio.Runner) -> None:
        checkpoint.save(
            self._config.checkpoints,
            self._learner.model,
            self._tokenizer,
            self._learner.state_dict(),
            checkpoint.Progress(
                step=self._learner.step_number,
                entries=self._reader.unsettled,
                covered=checkpoint.ranges(self._reader.covered),
            ),
            keep_last=self._config.trainer.checkpoint.keep_last,
        )
        runner.run(self._reader.settle())

    async def _record(self, metrics: Metrics) -> None:
        """Leaves the step's metrics for the driver, which writes them (XADD)."""
        seconds = sum(v for k, v in metrics.items() if k.startswith("timing_s/"))
        metrics["throughput/trained_tokens_per_s"] = metrics["tokens/trained"] / seconds
        streams = self._reader.streams
        ledger = await streams.ledger()
        depths = {f"queue/{name}": float(depth) for name, depth in ledger.depth.items()}
        record = {"step": self._learner.step_number, "time": time.time()} | metrics | depths
        record["queue/dead"] = float(ledger.dead)
        record |= totals((await streams.reports()).values())
        await streams.redis.xadd(streams.key("metrics"), {"record": json.dumps(record)})


def _broadcast(payloads: list[bytes] | None) -> list[bytes]:
    """Rank 0's groups on every rank; an empty list ends the training."""
    box = [payloads]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0] or []


def _batch(payloads: Sequence[bytes]) -> Batch:
    return Batch.of([decode(ScoredGroup, payload) for payload in payloads])


def _group_metrics(groups: Sequence[ScoredGroup], version: int) -> Metrics:
    """What can be said of a step before any mathematics."""
    trajectories = [t for g in groups for t in g.rollout.trajectories]
    outcomes = [v.outcome for g in groups for v in g.verified.verdicts]
    count = len(trajectories)
    return {
        "batch/groups": float(len(groups)),
        "reward/accuracy": outcomes.count("correct") / count,
        "scope/unknown_fraction": outcomes.count("unknown") / count,
        "staleness/mean": float(np.mean([version - g.rollout.weight_version for g in groups])),
        "response_length/mean": float(np.mean([len(t.token_ids) for t in trajectories])),
        "response_length/truncated_fraction": sum(t.finish == "length" for t in trajectories)
        / count,
        "teacher/scored_tokens": float(
            sum(len(lp) for g in groups for lp in g.teacher_logprobs.values())
        ),
    }


class _timed:
    """Adds the seconds that its block took to `laps`."""

    def __init__(self, laps: Metrics, name: str) -> None:
        self._laps, self._key = laps, f"timing_s/{name}"

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._laps[self._key] = time.perf_counter() - self._started


def trainer(config: LoopConfig) -> Any:
    """The Ray Train run of the learner: `config.trainer.ranks` workers, restarted from the last
    checkpoint when one dies."""
    resources = config.trainer.resources
    return TorchTrainer(
        # Not as train_loop_config: Ray Train shows that in its dashboard, passwords and all.
        functools.partial(train_loop, config),
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
