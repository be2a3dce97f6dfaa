"""A teacher that follows the student: which weights score what, and what they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from services.models import load_model
from services.weights import Weights
from teacher.config import TeacherConfig
from teacher.following_scorer import FollowingScorer
from teacher.packed_scorer import PackedScorer
from teacher.scorer import ScorerDied
from tests.waiting import DEADLINE_S, until

PROBE = (3, 1, 4, 1, 5)
SEQUENCES = [[2, 3, 4, 5 + place] for place in range(12)]
STARTS = [1] * len(SEQUENCES)


class Feed:
    """A `WeightFeed` that gives what is put into it, and says when that was taken."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Weights] = asyncio.Queue()

    async def next(self, timeout_s: float) -> Weights | None:
        found = await self._queue.get()
        self._queue.task_done()
        return found

    async def publish(self, weights: Weights) -> None:
        await self._queue.put(weights)
        async with asyncio.timeout(DEADLINE_S):
            await self._queue.join()


def student(model_dir: Path, version: int) -> PreTrainedModel:
    """The student after so many steps."""
    model = load_model(str(model_dir))
    torch.manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * version * torch.randn_like(parameter))
    return model


def published(model: PreTrainedModel, version: int, *, off: float = 0.0) -> Weights:
    (logprobs,) = plain(model, [list(PROBE)])
    return Weights.flatten(
        version, model.named_parameters(), PROBE, [float(value) + off for value in logprobs]
    )


@torch.no_grad()
def plain(model: PreTrainedModel, sequences: list[list[int]]) -> list[Any]:
    """transformers' own log-probs of all tokens but the first."""
    rows = []
    for ids in sequences:
        table: Any = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows.append(table[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).numpy())
    return rows


def made(model_dir: Path, feed: Feed, **settings: Any) -> FollowingScorer:
    config = TeacherConfig(model=str(model_dir), weights="student", **settings)
    scorer = PackedScorer(load_model(str(model_dir)), batch_tokens=1)  # a forward each
    return FollowingScorer(scorer, feed, config)


@pytest.fixture
async def following(model_dir: Path) -> AsyncIterator[tuple[FollowingScorer, Feed]]:
    feed = Feed()
    scorer = made(model_dir, feed)
    await scorer.check()  # begins to follow
    yield scorer, feed
    await scorer.close()


async def scored_by(scorer: FollowingScorer) -> tuple[int, list[Any]]:
    scores = await scorer.score(SEQUENCES, STARTS)
    (version,) = {score.version for score in scores}
    assert version is not None
    return version, [score.logprobs for score in scores]


async def reaches(scorer: FollowingScorer, version: int) -> list[Any]:
    """The scores of `version`, once it is the one that scores."""

    async def newest() -> list[Any] | None:
        found, scores = await scored_by(scorer)
        return scores if found == version else None

    return await until(newest)


async def test_every_score_tells_the_version_that_made_it(
    model_dir: Path, following: tuple[FollowingScorer, Feed]
) -> None:
    scorer, feed = following
    first = asyncio.create_task(scored_by(scorer))  # waits for the first weights
    await feed.publish(published(student(model_dir, 3), 3))
    version, scores = await first
    assert version == 3
    np.testing.assert_allclose(scores, plain(student(model_dir, 3), SEQUENCES), atol=1e-4)
    await feed.publish(published(student(model_dir, 4), 4))
    scores = await reaches(scorer, 4)
    np.testing.assert_allclose(scores, plain(student(model_dir, 4), SEQUENCES), atol=1e-4)
    await feed.publish(published(student(model_dir, 2), 2))  # the learner went back
    await reaches(scorer, 2)


async def test_a_group_is_scored_by_one_version(
    model_dir: Path, following: tuple[FollowingScorer, Feed]
) -> None:
    scorer, feed = following
    await feed.publish(published(student(model_dir, 0), 0))
    await scored_by(scorer)
    for version in range(1, 4):
        groups = [asyncio.create_task(scored_by(scorer)) for _ in range(3)]
        await asyncio.sleep(0)  # they have begun
        await feed.publish(published(student(model_dir, version), version))
        for found, scores in await asyncio.gather(*groups):
            expected = plain(student(model_dir, found), SEQUENCES)
            np.testing.assert_allclose(scores, expected, atol=1e-4)
        await reaches(scorer, version)


async def test_versions_in_between_are_passed_over(model_dir: Path) -> None:
    feed = Feed()
    scorer = made(model_dir, feed, refresh_steps=2)
    await scorer.check()  # begins to follow
    for version in (0, 1, 2, 3):
        await feed.publish(published(student(model_dir, version), version))
    scores = await reaches(scorer, 2)
    np.testing.assert_allclose(scores, plain(student(model_dir, 2), SEQUENCES), atol=1e-4)
    await scorer.close()


async def test_a_moving_average_is_that_of_the_versions_it_saw(model_dir: Path) -> None:
    feed = Feed()
    scorer = made(model_dir, feed, ema=0.75)
    await scorer.check()
    for version in (0, 1):
        await feed.publish(published(student(model_dir, version), version))
        await reaches(scorer, version)
    await feed.publish(published(student(model_dir, 3), 3))  # 2 was missed: it counts as this one
    scores = await reaches(scorer, 3)
    models = [dict(student(model_dir, version).named_parameters()) for version in (0, 1, 3)]
    expected = student(model_dir, 0)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            zero, one, three = (model[name] for model in models)
            average = 0.75 * zero + 0.25 * one
            parameter.copy_(0.75**2 * average + (1 - 0.75**2) * three)
    np.testing.assert_allclose(scores, plain(expected, SEQUENCES), atol=1e-4)
    await scorer.close()


async def test_the_average_of_a_run_that_is_resumed_begins_anew(model_dir: Path) -> None:
    """With the newest weights, whatever the average was before, and goes on from there; so it does
    when the learner itself goes back to a checkpoint."""

    def between(first: int, second: int) -> list[Any]:
        model = student(model_dir, first)
        with torch.no_grad():
            newer = dict(student(model_dir, second).named_parameters())
            for name, parameter in model.named_parameters():
                parameter.lerp_(newer[name], 0.25)
        return plain(model, SEQUENCES)

    feed = Feed()
    scorer = made(model_dir, feed, ema=0.75)
    await scorer.check()
    for version, expected in (
        (5, plain(student(model_dir, 5), SEQUENCES)),
        (6, between(5, 6)),
        (2, plain(student(model_dir, 2), SEQUENCES)),  # it went back
        (3, between(2, 3)),
    ):
        await feed.publish(published(student(model_dir, version), version))
        np.testing.assert_allclose(await reaches(scorer, version), expected, atol=1e-4)
    await scorer.close()


async def test_weights_that_fail_the_probe_score_nothing(
    model_dir: Path, following: tuple[FollowingScorer, Feed]
) -> None:
    scorer, feed = following
    waiting = asyncio.create_task(scored_by(scorer))
    await feed.publish(published(student(model_dir, 1), 1, off=0.1))
    with pytest.raises(ScorerDied, match=r"version 1: .* by 0\.1 nats, more than"):
        await waiting
    with pytest.raises(ScorerDied, match="cannot follow the student"):
        await scorer.check()
