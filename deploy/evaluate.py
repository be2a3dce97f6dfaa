"""Accuracy on a run's own rollout and verifier workers, through a lane of its own.

    prompts ──▶ rollout ──▶ verifier ──▶ one tally a prompt ──▶ Avg@k, Pass@k, by data source

Evaluation prompts go before training prompts in every worker and never touch the training ledger,
so a run is evaluated while it trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.accuracy import Estimate, average, passed, passed_bootstrap
from rollout.prompts import PromptSource
from services.disk import write_whole
from services.errors import RunFailed
from services.pipeline import EVAL
from services.stage import Connection
from services.streams import Streams, claim
from services.trajectory import VerifiedGroup, decode, encode

CONSUMER = "evaluator"


class EvaluationStalled(RunFailed):
    """An evaluation did not finish in time; the message says where its prompts are."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of one prompt's samples. A sample that is neither correct nor unknown is
    incorrect; a truncated one may be any of the three, by `verifier.overlong`."""

    id: str
    data_source: str
    samples: int
    correct: int
    unknown: int
    truncated: int
    weight_version: int

    @staticmethod
    def of(group: VerifiedGroup) -> Tally:
        """Counts a verified group."""
        return Tally(
            id=group.rollout.prompt.id,
            data_source=group.rollout.prompt.data_source,
            samples=len(group.verdicts),
            correct=len(group.indices("correct")),
            unknown=len(group.indices("unknown")),
            truncated=sum(t.finish == "length" for t in group.rollout.trajectories),
            weight_version=group.rollout.weight_version,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy over some prompts. `k` is the number of samples of each; an unknown verdict is
    not correct."""

    prompts: int
    k: int
    avg_at_k: Estimate
    pass_at_k: Estimate
    pass_at_k_bootstrap: Estimate
    unknown: int
    truncated: int

    @staticmethod
    def of(tallies: Sequence[Tally]) -> Score:
        """Every estimate of `deploy.accuracy`."""
        correct, samples = [t.correct for t in tallies], [t.samples for t in tallies]
        k = max(samples, default=0)
        return Score(
            prompts=len(tallies),
            k=k,
            avg_at_k=average(correct, samples),
            pass_at_k=passed(correct, samples, k),
            pass_at_k_bootstrap=passed_bootstrap(correct, samples, k),
            unknown=sum(t.unknown for t in tallies),
            truncated=sum(t.truncated for t in tallies),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation. `version` is the oldest weights that were allowed to sample; while a run
    trains, newer ones may have."""

    version: int
    tallies: tuple[Tally, ...]

    @property
    def score(self) -> Score:
        """Over all prompts."""
        return Score.of(self.tallies)

    @property
    def by_source(self) -> dict[str, Score]:
        """Of each data source, by its name."""
        sources = sorted({t.data_source for t in self.tallies})
        return {s: Score.of([t for t in self.tallies if t.data_source == s]) for s in sources}

    def as_json(self) -> dict[str, Any]:
        """Scores first, for people; the tallies behind them are all that `of_json` needs."""
        return {
            "version": self.version,
            **_readable(self.score),
            "by_source": {source: _readable(score) for source, score in self.by_source.items()},
            "tallies": [asdict(t) for t in self.tallies],
        }

    @staticmethod
    def of_json(fields: dict[str, Any]) -> Result:
        """What `as_json` made."""
        return Result(fields["version"], tuple(Tally(**t) for t in fields["tallies"]))

    def write(self, run_dir: Path, label: str) -> None:
        """Keeps the result as `evaluation-{label}.json`."""
        write_whole(run_dir / f"evaluation-{label}.json", json.dumps(self.as_json()))

    @staticmethod
    def read(run_dir: Path, label: str) -> Result | None:
        """What `write` kept, or None."""
        path = run_dir / f"evaluation-{label}.json"
        return (
            Result.of_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
        )


def _readable(score: Score) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Estimate) else value
        for name, value in ((n, getattr(score, n)) for n in Score.__slots__)
    }


async def evaluate(
    connection: Connection,
    source: PromptSource,
    orders: Sequence[int],
    *,
    version: int,
    timeout_s: float,
    done: Callable[[Tally], None] = lambda _: None,
) -> Result:
    """Samples and verifies the prompts at `orders` under weights of at least `version`.

    Args:
        done: is told of every prompt as soon as it is verified.

    Raises:
        EvaluationStalled: nothing was verified for `timeout_s`.
    """
    async with connection.streams(EVAL) as streams:
        await streams.create()
        before = await streams.ledger()
        prompts = [source.prompt(order) for order in orders]
        payloads = [encode(replace(p, min_weight_version=version)) for p in prompts]
        await streams.feed(payloads, expected_fed=before.fed, max_in_flight=10**9)
        tallies = await _collect(streams, len(orders), before.dead, timeout_s, done)
        await streams.advance(consumed=before.fed + len(orders), step=version)
        return Result(version, tuple(sorted(tallies, key=lambda t: t.id)))


async def _collect(
    streams: Streams,
    count: int,
    dead_before: int,
    timeout_s: float,
    done: Callable[[Tally], None],
) -> list[Tally]:
    deadline = time.monotonic() + timeout_s
    tallies: list[Tally] = []
    while len(tallies) < count - ((ledger := await streams.ledger()).dead - dead_before):
        if time.monotonic() > deadline:
            raise EvaluationStalled(
                f"evaluation waited {timeout_s:.0f} s for the next of its prompts and has "
                f"{len(tallies)} of {count}; in the streams: {ledger.depth}"
            )
        for item in await claim([streams], streams.results, CONSUMER, count=64, block_ms=500):
            tallies.append(Tally.of(decode(VerifiedGroup, item.payload)))
            done(tallies[-1])
            await streams.settle(streams.results, [item.id])
            deadline = time.monotonic() + timeout_s
    return tallies
