"""The whole system on one screen: every stage, the stream that it reads, and the one it writes.

    prompts ─▶ rollout ─▶ rollouts ─▶ verifier ─▶ verified ─▶ teacher ─▶ scored ─▶ learner

The feeder writes the first stream and the learner reads the last. Streams, workers, placement,
`scope scale`, metrics and status are loops over this table. A new stage is a row here, a worker
(`services.worker`), and its section of the configuration; a stage of one's own is a row in the
run's `steps`, and needs no change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from typing import Any

TRAIN, EVAL = "", "eval"  # the lanes of training and of evaluation prompts


@dataclass(frozen=True, slots=True)
class Step:
    """One stage. `lanes` are those that it works for, the first one first; its `worker` is
    `package.module:Class`."""

    name: str  # of the stage, and of its workers' role
    reads: str
    writes: str
    worker: str
    lanes: tuple[str, ...] = (EVAL, TRAIN)
    section: str = ""  # of the configuration, where that is not called like the stage

    @property
    def worker_name(self) -> str:
        """The class alone, as Ray names its processes."""
        return self.worker.rpartition(":")[2]

    def worker_class(self) -> Any:
        """The worker, imported.

        Raises:
            ImportError, AttributeError: there is none of that name.
        """
        module, _, name = self.worker.partition(":")
        return getattr(import_module(module), name)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages in the order in which an item goes through them."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for before, after in pairwise(self.steps):
            if before.writes != after.reads:
                raise ValueError(f"{before.name} writes {before.writes!r}, which nobody reads")
            if not {*after.lanes} <= {*before.lanes}:
                raise ValueError(f"{before.name} does not work for every lane of {after.name}")
        for what, names in (("stage", self.names), ("stream", self.streams)):
            if len({*names}) < len(names):
                raise ValueError(f"two {what}s have one name: {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the stages."""
        return tuple(step.name for step in self.steps)

    @property
    def streams(self) -> tuple[str, ...]:
        """All streams, in order."""
        return (*(step.reads for step in self.steps), self.results())

    @property
    def source(self) -> str:
        """The stream that the feeder writes."""
        return self.steps[0].reads

    def results(self, lane: str = TRAIN) -> str:
        """The stream that items of `lane` are in when every stage has worked on them: the
        learner's, or the evaluation's."""
        return [step for step in self.steps if lane in step.lanes][-1].writes

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def with_steps(self, own: Sequence[tuple[str, Step]]) -> Pipeline:
        """This pipeline with more stages, each directly behind the stage of the name beside it.
        Such a stage reads what that one writes, and what comes next, whose lanes it takes, reads
        what it writes.

        Raises:
            ValueError: there is no such stage, or two have one name.
        """
        steps = list(self.steps)
        for after, step in own:
            at = next((i for i, s in enumerate(steps) if s.name == after), None)
            if at is None:
                known = ", ".join(s.name for s in steps)
                raise ValueError(f"step {step.name!r} comes after {after!r}: the steps are {known}")
            lanes = steps[at + 1].lanes if at + 1 < len(steps) else (TRAIN,)
            steps[at + 1 :] = [
                replace(step, reads=steps[at].writes, lanes=lanes),
                *(replace(s, reads=step.writes) for s in steps[at + 1 : at + 2]),
                *steps[at + 2 :],
            ]
        return Pipeline(tuple(steps))


PIPELINE = Pipeline(
    (
        Step("rollout", "prompts", "rollouts", "rollout.worker:RolloutWorker"),
        Step("verifier", "rollouts", "verified", "verifier.worker:VerifierWorker"),
        Step(
            "teacher",
            "verified",
            "scored",
            "teacher.worker:TeacherWorker",
            lanes=(TRAIN,),
            section="scoring",
        ),
    )
)
