"""Held-out accuracy on the run's own rollout and verifier workers, through a lane of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path

import numpy as np

from deploy.config import EvaluationConfig
from rollout.prompts import PromptSource
from services.stage import EVAL, Connection
from services.streams import Streams, claim
from services.trajectory import VerifiedGroup, decode, encode

CONSUMER = "evaluator"


class EvaluationStalled(RuntimeError):
    """An evaluation did not finish in time; the message says where its prompts are."""


@dataclass(frozen=True, slots=True)
class Result:
    """Accuracy over prompts, as fractions. `k` is the number of samples of each."""

    version: int
    prompts: int
    k: int
    avg_at_k: float
    pass_at_k: float
    unknown: int
    truncated: int

    def write(self, run_dir: Path, label: str) -> None:
        """Keeps the result as `evaluation-{label}.json`."""
        (run_dir / f"evaluation-{label}.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(run_dir: Path, label: str) -> Result | None:
        """What `write` kept, or None."""
        path = run_dir / f"evaluation-{label}.json"
        return Result(**json.loads(path.read_text())) if path.exists() else None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of `k` samples is correct: the unbiased estimator
    1 − C(n − c, k) / C(n, k) of Chen et al., arXiv 2107.03374."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


async def evaluate(
    connection: Connection, source: PromptSource, config: EvaluationConfig, *, version: int
) -> Result:
    """Samples and verifies every held-out prompt under weights of at least `version`.

    Raises:
        EvaluationStalled: not done within `config.timeout_s`.
    """
    streams = connection.streams(EVAL)
    await streams.create()
    try:
        count = min(len(source), config.prompts or len(source))
        before = await streams.ledger()
        prompts = [source.prompt(order) for order in range(count)]
        payloads = [encode(replace(p, min_weight_version=version)) for p in prompts]
        await streams.feed(payloads, expected_fed=before.fed, max_in_flight=10**9)
        groups = await _collect(streams, count, before.dead, config.timeout_s)
        await streams.advance(consumed=before.fed + count, step=version)
        return summarise(groups, version=version)
    finally:
        await streams.redis.aclose()


async def _collect(
    streams: Streams, count: int, dead_before: int, timeout_s: float
) -> list[VerifiedGroup]:
    deadline = time.monotonic() + timeout_s
    groups: list[VerifiedGroup] = []
    while len(groups) < count - ((ledger := await streams.ledger()).dead - dead_before):
        if time.monotonic() > deadline:
            raise EvaluationStalled(
                f"evaluation waited {timeout_s:.0f} s and has {len(groups)} of {count} prompts; "
                f"in the streams: {ledger.depth}"
            )
        claims = await claim([streams], "verified", CONSUMER, count=64, block_ms=500)
        groups += [decode(VerifiedGroup, item.payload) for item in claims]
        await streams.settle("verified", [item.id for item in claims])
        await asyncio.sleep(0)
    return groups


def summarise(groups: Sequence[VerifiedGroup], *, version: int) -> Result:
    """Avg@k and Pass@k, each a mean over prompts; an unknown verdict is not correct."""
    k = max((len(g.verdicts) for g in groups), default=0)
    correct = [len(g.indices("correct")) for g in groups]
    return Result(
        version=version,
        prompts=len(groups),
        k=k,
        avg_at_k=float(np.mean([c / k for c in correct])) if groups else 0.0,
        pass_at_k=float(np.mean([pass_at_k(k, c, k) for c in correct])) if groups else 0.0,
        unknown=sum(len(g.indices("unknown")) for g in groups),
        truncated=sum(t.finish == "length" for g in groups for t in g.rollout.trajectories),
    )
