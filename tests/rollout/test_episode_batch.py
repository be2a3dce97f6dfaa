"""From a played episode to a gradient: the same as those of the paper's equations, by hand."""

from __future__ import annotations

import numpy as np

from rollout.transformers_engine import TransformersEngine
from services.teacher_need import SCORED
from services.trajectory import Outcome, ScoredGroup, Verdict, VerifiedGroup
from tests.builders import tiny_model
from tests.rollout.conftest import full_logprobs
from tests.rollout.test_episodes import engine, episodes, question
from tests.trainer.test_learner import assert_close, expected_gradients, gradients, settings
from trainer.batch import Batch
from trainer.config import ScopeConfig

__all__ = ["engine"]  # a fixture


async def test_an_episode_is_trained_on_as_the_equations_say(engine: TransformersEngine) -> None:
    rollout = await episodes(engine.sample).group(question(n=8))
    outcomes: list[Outcome] = ["correct", "incorrect"] * 4
    teacher, start = tiny_model(9), len(rollout.prompt.token_ids)
    scores = {}
    for index, t in enumerate(rollout.trajectories):
        if outcomes[index] in SCORED["incorrect"]:  # in its whole context, the world's tokens too
            whole = [*rollout.prompt.token_ids.tolist(), *t.token_ids.tolist()]
            scores[index] = full_logprobs(teacher, whole)[start - 1 :].numpy().astype(np.float32)
    verdicts = tuple(Verdict(outcome, "by hand") for outcome in outcomes)
    group = ScoredGroup(VerifiedGroup(rollout, verdicts), scores, "teacher")
    assert any(t.mask is not None for t in rollout.trajectories)

    batch = Batch.of([group])
    assert batch.sampled.tolist() == [t.sampled.sum() for t in rollout.trajectories]
    got = gradients(settings(), made=[group])
    assert_close(got, expected_gradients(tiny_model(), ScopeConfig(), 1.0, [group]))
