"""The learner's life on Ray Train: every rank runs `train_loop`.

┌─▶ wait        a step's groups from Redis (rank 0); each rank is sent what it works on
│   learn       perplexity, weights, gradients, AdamW          trainer.learner
│   publish     new weights off the device; a thread hands them to the store, rollout picks them up
│   record      metrics, and progress: the feeder admits more prompts
└── checkpoint  every n steps: off the device, a thread makes it durable; then, and only then, the
                groups are acknowledged in Redis
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from ray.train import get_context
from ray.train.torch import get_device
from safetensors import SafetensorError

from services.errors import Unavailable
from services.models import load_model, load_tokenizer, probe_tokens, write_model
from services.stage import Connection, totals
from trainer.batch import Batch
from trainer.checkpoint import Checkpoint, CheckpointFailed, Progress, Saver, latest, ranges
from trainer.config import CheckpointConfig, TrainerConfig
from trainer.group_metrics import group_metrics
from trainer.learner import Clock, Learner, Metrics
from trainer.lora import write_adapters
from trainer.publisher import Publisher, Transfer, pusher
from trainer.reader import GroupReader, LoopThread
from trainer.samples import due, samples
from trainer.step_plan import StepPlan
from trainer.storage import Storage
from trainer.student import is_sharded

log = logging.getLogger(__name__)


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
    weight_transfer: Transfer = "store"
    engine_dtype: str = "float32"  # what all engines compute in that follow the weights
    seed: int = 0

    @property
    def export(self) -> Path:
        """Where the trained student goes."""
        return self.run_dir / "export"


def checkpoints_of(config: CheckpointConfig, run_dir: Path) -> Storage:
    """Where the checkpoints of a run are kept."""
    if config.storage is None:
        return Storage(run_dir / "checkpoints")
    return Storage(config.storage, below=run_dir.name)


class ExportFailed(Unavailable):
    """The student could not be written; it is in the last checkpoint."""


@contextmanager
def exporting(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path`, whole or not at all.

    Raises:
        ExportFailed: there is no room, or no access.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        yield unfinished
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ExportFailed(
            f"the student cannot be exported to {path}: {error}; it is in the last checkpoint"
        ) from error


def train_loop(config: LoopConfig) -> None:
    """Trains until every prompt of the run is trained or dead, then exports the student."""
    if config.trainer.torch_threads:
        torch.set_num_threads(config.trainer.torch_threads)
    torch.manual_seed(config.seed)
    rank = get_context().get_world_rank()
    storage = checkpoints_of(config.trainer.checkpoint, config.run_dir)
    restored = _from_first(latest(storage) if rank == 0 else None)
    learner = _learner(config, restored)
    saves = _Saves(learner, storage, config.trainer.checkpoint)
    if rank == 0:
        _Leader(config, learner, saves).lead(restored.progress if restored else None)
    else:
        _follow(learner, saves)
    saves.close()


def _learner(config: LoopConfig, restored: Checkpoint | None) -> Learner:
    device = get_device()
    # A model that is to be sharded need not fit on the device as a whole.
    at = "cpu" if is_sharded(config.trainer, get_context().get_world_size()) else str(device)
    model = load_model(config.student, dtype=config.trainer.dtype, device=at)
    vocab_size = model.config.get_text_config().vocab_size
    learner = Learner(
        model,
        config.trainer,
        temperature=config.temperature,
        total_steps=-(-config.total_groups // config.trainer.groups_per_step),
        device=device,
        probe=probe_tokens(vocab_size, load_tokenizer(config.student)),
        engine_dtype=config.engine_dtype,
    )
    if restored:
        state = learner.state()
        restored.load(state)
        learner.load_state(state)
        log.info("continuing from %s", restored)
    return learner


def _follow(learner: Learner, saves: _Saves) -> None:
    """What the other ranks do: the leader's steps, without Redis and without the weight store."""
    learner.weights()
    while (plan := _scattered(None)) is not None:
        learner.step(plan)
        learner.weights()
        if saves.due:
            saves.take()
            saves.begin()
    saves.take()
    saves.last()
    learner.student.adapters()


class _Leader:
    """Rank 0: the one that talks to Redis and the weight store."""

    def __init__(self, config: LoopConfig, learner: Learner, saves: _Saves) -> None:
        self._config = config
        self._learner = learner
        self._saves = saves
        self._tokenizer = load_tokenizer(config.student)
        store = config.weight_store
        self._publisher = Publisher(store, pusher(store, config.weight_transfer))
        self._watch = LogpWatch(config.trainer.logp_difference_warning)
        self._clock = Clock()
        self._reader = GroupReader(
            config.connection,
            need=learner.objective.teacher,
            top=config.trainer.objective.top_tokens,
            entropy=config.trainer.objective.teacher_entropy,
            vocabulary=learner.vocabulary,
            groups_per_step=config.trainer.groups_per_step,
            max_staleness=(
                config.trainer.max_staleness if learner.objective.sampler == "student" else None
            ),
            total=config.total_groups,
            timeout_s=config.trainer.stall_timeout_s,
        )

    def lead(self, progress: Progress | None) -> None:
        with LoopThread() as runner, runner.holding(self._reader):
            runner.run(self._reader.start(progress))
            self._publish()
            while self._one_step(runner):
                pass
            self._settle(runner, self._saves.take())
            self._settle(runner, self._saves.last(self._progress(), self._model_writer()))
        self._publisher.wait()
        adapters, settings = self._learner.student.adapters(), self._config.trainer.lora
        with exporting(self._config.export) as path:
            self._model_writer()(path)
            if settings is not None:
                write_adapters(path / "adapter", adapters, settings, base=self._config.student)

    def _one_step(self, runner: LoopThread) -> bool:
        """One turn of the loop in the module's docstring; False when nothing is left."""
        version = self._learner.step_number
        taken = runner.run(self._reader.next_step(version, self._publisher.look_after_store))
        self._clock.lap("wait_groups")
        if not taken:
            _scattered([None] * self._learner.student.ranks)
            return False
        batch = Batch.of([item.group for item in taken])
        plan = _scattered(self._learner.plans(batch))
        assert plan is not None
        self._clock.lap("scatter")
        metrics = self._learner.step(plan, self._clock)
        metrics |= self._watch.see(metrics["sampling/logp_difference"])
        self._publish()
        orders = [group.prompt.order for group in batch.groups]
        claims = [item.claim for item in taken]
        runner.run(self._reader.trained(self._learner.step_number, claims, orders))
        shown = self._samples(batch)
        runner.run(self._record(metrics | group_metrics(batch.groups, version), shown))
        self._clock.lap("record")
        # After the record, so that no step of the surviving history goes without one.
        if self._saves.due or self._saves.idle:
            self._settle(runner, self._saves.take())
            self._clock.lap("wait_checkpoint")
        if self._saves.due:
            self._saves.begin(self._progress(), self._model_writer())
            self._clock.lap("checkpoint")
        return True

    def _publish(self) -> None:
        """Copies this version off the device; it reaches the store beside the training."""
        self._publisher.wait()
        self._clock.lap("wait_publish")
        weights = self._learner.weights()
        assert weights is not None  # this is the first rank
        self._publisher.publish(weights)
        self._clock.lap("publish")

    def _progress(self) -> Progress:
        return Progress(
            step=self._learner.step_number,
            entries=list(self._reader.unsettled),
            covered=ranges(self._reader.covered),
        )

    def _settle(self, runner: LoopThread, durable: Progress | None) -> None:
        """Acknowledges what a durable checkpoint contains."""
        if durable is not None:
            runner.run(self._reader.settle(durable.entries))

    def _model_writer(self) -> Callable[[Path], None]:
        """What writes this version as a Hugging Face directory, whenever it is called."""
        weights = self._publisher.published

        def write(path: Path) -> None:
            tensors = {name: tensor.clone() for name, tensor in weights.tensors()}
            write_model(path, self._learner.model.config, tensors, self._tokenizer)

        return write

    def _samples(self, batch: Batch) -> list[dict[str, Any]]:
        step = self._learner.step_number
        if not due(step):
            return []
        return samples(step, batch, self._learner.coefficients, self._tokenizer)

    async def _record(self, metrics: Metrics, shown: list[dict[str, Any]]) -> None:
        """Leaves the step's metrics and samples for the driver, which writes them (XADD)."""
        self._clock.lap("record")
        laps, now = self._clock.take(), time.time()
        metrics |= laps | {"checkpoint/failures": float(self._saves.failures)}
        metrics["throughput/trained_tokens_per_s"] = metrics["tokens/trained"] / sum(laps.values())
        record = {"step": self._learner.step_number, "time": now} | metrics
        streams = self._reader.streams
        ledger = await streams.ledger()
        record |= {f"queue/{name}": float(depth) for name, depth in ledger.depth.items()}
        record["queue/dead"] = float(ledger.dead)
        record |= totals((await streams.reports()).values())
        entry: Any = {"record": json.dumps(record), "samples": json.dumps(shown)}
        await streams.redis.xadd(streams.key("metrics"), entry)


class _Saves:
    """A rank's checkpoints: all ranks go through the same calls. A save that fails (a full disk)
    does not end the training: the one before is intact, and what was trained since stays in Redis
    until one succeeds. Only the last one must."""

    def __init__(self, learner: Learner, storage: Storage, config: CheckpointConfig) -> None:
        self.failures = 0
        self._learner, self._every = learner, config.every_steps
        self._saver = Saver(storage, keep_last=config.keep_last, keep_every=config.keep_every)
        self._durable_step = -1

    @property
    def due(self) -> bool:
        return self._learner.step_number % self._every == 0

    @property
    def idle(self) -> bool:
        """Whether `take` would not wait."""
        return self._saver.idle

    def begin(
        self, progress: Progress | None = None, model: Callable[[Path], None] | None = None
    ) -> None:
        """Copies the state off the device and lets it be written; only the first rank has more
        to say of it."""
        progress = progress or Progress(self._learner.step_number, [], [])
        self._saver.save(self._learner.state(), progress, model)

    def take(self) -> Progress | None:
        """What the checkpoint that was begun contains, once it is durable; None when there is
        none, or when it failed."""
        try:
            return self._finish()
        except CheckpointFailed as error:
            self.failures += 1
            log.error("%s; training goes on and tries again", error)
            return None

    def last(
        self, progress: Progress | None = None, model: Callable[[Path], None] | None = None
    ) -> Progress | None:
        """Makes this very step durable, unless it is.

        Raises:
            CheckpointFailed: it could not be written.
        """
        if self._durable_step == self._learner.step_number:
            return None
        self.begin(progress, model)
        return self._finish()

    def close(self) -> None:
        self._saver.close()

    def _finish(self) -> Progress | None:
        done = self._saver.finish()
        if done is not None:
            self._durable_step = done.step
        return done


class LogpWatch:
    """Warns when rollout's log-probs are not those that the learner computes, which makes ρ wrong:
    once, until they are within `limit` nats again."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._warned = False

    def see(self, difference: float) -> Metrics:
        """Takes a step's mean absolute difference in nats; a metric that is 1 where it is high."""
        high = difference > self._limit
        if high and not self._warned:
            log.warning(
                "rollout's log-probs differ from the learner's by %.3g nats on average, more than "
                "trainer.logp_difference_warning (%g): other precision, or very stale groups?",
                difference,
                self._limit,
            )
        self._warned = high
        return {"sampling/logp_difference_high": float(high)}


T = TypeVar("T")


def _from_first(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _scattered(plans: Sequence[StepPlan | None] | None) -> StepPlan | None:
    """This rank's of rank 0's `plans`; None ends the training."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return plans[0] if plans else None
    box: list[StepPlan | None] = [None]
    dist.scatter_object_list(box, None if plans is None else list(plans), src=0)
    return box[0]
