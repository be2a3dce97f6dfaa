"""Episodes on a real engine: what is sampled stays, what is heard is masked, limits and faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from rollout.config import EnvironmentConfig
from rollout.engine import Completion, Sampled
from rollout.environment import EnvironmentFailed, UnknownEnvironment
from rollout.environments import Environments
from rollout.episodes import Episodes, Sample, turn_seed
from rollout.transformers_engine import TransformersEngine
from services.errors import BadItem
from services.trajectory import Prompt, RolloutGroup, Sampling, Verdict, decode, encode
from tests.builders import prompt as make_prompt
from tests.builders import tiny_model
from tests.rollout import worlds
from tests.rollout.conftest import full_logprobs, published
from tests.waiting import DEADLINE_S

COUNTING = "tests.rollout.worlds:counting"


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[TransformersEngine]:
    made = TransformersEngine(tiny_model(), [1], batch_sequences=64, probe_tolerance=1e-3)
    await made.load_weights(published(tiny_model(3), 3))
    yield made
    await made.close()


def episodes(sample: Sample, kind: str = COUNTING, **settings: Any) -> Episodes:
    config = EnvironmentConfig(kind=kind, **settings)
    return Episodes(sample, worlds.tokenizer(), [1], config, Environments(config))


def question(order: int = 0, *, n: int = 4, max_tokens: int = 200, **changes: Any) -> Prompt:
    messages = ({"role": "user", "content": "12"},)
    ids = worlds.tokenizer().apply_chat_template(list(messages), add_generation_prompt=True)
    made = replace(make_prompt(order, n=n, ids=ids["input_ids"]), messages=messages, **changes)
    return replace(made, sampling=replace(made.sampling, max_tokens=max_tokens))


async def test_episodes_are_the_whole_conversation_with_the_log_probs_of_a_plain_forward(
    engine: TransformersEngine,
) -> None:
    played = await episodes(engine.sample).group(question(n=8))
    group = decode(RolloutGroup, encode(played))
    tokenizer, over = worlds.tokenizer(), 0
    for t in group.trajectories:
        assert t.episode is not None and t.mask is not None
        ids = [*group.prompt.token_ids.tolist(), *t.token_ids.tolist()]
        logprobs = full_logprobs(tiny_model(3), ids)[len(group.prompt.token_ids) - 1 :].numpy()
        np.testing.assert_allclose(t.logprobs, np.where(t.mask, logprobs, 0.0), atol=1e-4)
        messages = [*group.prompt.messages]
        ends = [-1, *np.flatnonzero((t.token_ids == 1) & t.mask)]
        for start, end in pairwise(ends):
            turn = t.token_ids[start + 1 : end][t.mask[start + 1 : end]]
            text = tokenizer.decode(turn.tolist())
            messages.append({"role": "assistant", "content": text})
            if len(messages) < 6:
                messages.append({"role": "tool", "content": str(len(text))})
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if t.finish == "stop":
            over += 1
            assert [*ids, *tokenizer.encode("c")] == whole
            assert (t.text, t.episode.turns) == ("5 said", 3)
            assert t.episode.verdict == Verdict("correct", "it counted")
        else:
            assert ids[: len(whole)] == whole
    assert over >= 2 and group.weight_version == 3


async def test_the_same_prompt_is_played_the_same_whatever_shares_the_batch(
    engine: TransformersEngine,
) -> None:
    play = episodes(engine.sample)
    alone = await play.group(question(3))
    _, among, _ = await asyncio.gather(*(play.group(question(order)) for order in (2, 3, 4)))
    for one, other in zip(alone.trajectories, among.trajectories, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
    assert len({turn_seed(7, index, turn) for index in range(9) for turn in range(1, 9)}) == 72


async def test_limits_of_turns_and_tokens_cut_an_episode_off(engine: TransformersEngine) -> None:
    group = await episodes(engine.sample, max_turns=2).group(question(n=8))
    ended = [t for t in group.trajectories if t.token_ids[-1] == 1]
    assert ended and all(t.finish == "length" for t in ended)
    assert {t.episode.turns for t in ended if t.episode} == {2}
    group = await episodes(engine.sample).group(question(n=8, max_tokens=30))
    assert all(len(t.token_ids) <= 30 for t in group.trajectories)
    assert any(t.finish == "length" and t.mask is not None for t in group.trajectories)
    group = await episodes(engine.sample, turn_tokens=5).group(question(n=8))
    for t in group.trajectories:
        mask = t.sampled
        assert np.diff(np.flatnonzero(np.diff([False, *mask, False]))).tolist()[::2] <= [5] * 9


@pytest.mark.parametrize(
    ("what", "error", "sentence"),
    [
        ("hang", EnvironmentFailed, r"took longer than environment.deadline_s \(0.05 s\)"),
        ("bad", BadItem, "no answer"),
        ("raise", RuntimeError, "out of order"),
        ("nothing", EnvironmentFailed, "no messages, and not Over"),
        ("no text", EnvironmentFailed, "role and content, as text"),
    ],
)
async def test_an_environment_that_breaks_fails_its_group(
    engine: TransformersEngine, what: str, error: type[Exception], sentence: str
) -> None:
    play = episodes(engine.sample, "tests.rollout.worlds:broken", deadline_s=0.05)
    with pytest.raises(error, match=sentence):
        await play.group(question(n=16, reference=what))


async def test_an_environment_is_closed_with_its_episode(engine: TransformersEngine) -> None:
    worlds.closed.clear()
    await episodes(engine.sample, "tests.rollout.worlds:closing").group(question(9, n=3))
    assert worlds.closed == ["0-9"] * 3


def test_an_environment_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownEnvironment, match="worlds:nobody'"):
        Environments(EnvironmentConfig(kind="tests.rollout.worlds:nobody"))


async def test_forty_episodes_that_wait_for_their_world_leave_the_sampler_to_others(
    engine: TransformersEngine,
) -> None:
    play = episodes(engine.sample, "tests.rollout.worlds:broken", concurrent=2, deadline_s=9e9)
    waiting = [
        asyncio.create_task(play.group(question(order, n=4, reference="hang")))
        for order in range(10)
    ]
    await episodes(engine.sample).group(question(99))  # in turn behind their first turns
    async with asyncio.timeout(DEADLINE_S):
        await episodes(engine.sample).group(question(100))
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_every_token_tells_the_weights_that_sampled_it() -> None:
    """Two turns of one episode under weights that change between them, and within the second."""
    made = [
        Sampled((Completion(*_turn(4), "stop", top=np.full((4, 2), 7, np.int32)),), 5),
        Sampled(
            (Completion(*_turn(5), "stop", ((0, 5), (2, 6)), np.full((5, 2), 8, np.int32)),), 5
        ),
        Sampled((Completion(*_turn(3), "stop", top=np.full((3, 2), 9, np.int32)),), 7),
    ]
    prompts: list[Sequence[int]] = []

    async def sample(prompt_ids: Sequence[int], sampling: Sampling) -> Sampled:
        prompts.append(prompt_ids)
        return made[len(prompts) - 1]

    asked = question(n=1)
    group = await episodes(sample).group(asked)
    (t,) = group.trajectories
    heard = len(worlds.tokenizer().encode("b3ec"))
    assert t.version_runs == ((0, 5), (4 + heard + 2, 6), (9 + 2 * heard, 7))
    assert group.weight_version == 5
    versions = group.token_versions(0)[t.sampled].tolist()
    assert versions == [5] * 4 + [5, 5, 6, 6, 6] + [7] * 3
    assert group.mean_weight_version == np.mean(versions)
    assert t.top is not None
    assert t.top[t.sampled].tolist() == [[7, 7]] * 4 + [[8, 8]] * 5 + [[9, 9]] * 3
    assert t.top[~t.sampled].tolist() == [[0, 1]] * (2 * heard)
    whole = [*asked.token_ids.tolist(), *t.token_ids.tolist()]
    for given in prompts:  # each turn goes on from the very tokens before it
        assert list(given) == whole[: len(given)]


def _turn(length: int) -> tuple[Any, Any]:
    return np.array([5] * (length - 1) + [1], np.int32), np.full(length, -1.0, np.float32)
