"""The worker of rollout: prompts in, groups of sampled trajectories out.

    prompts ──▶ sample n completions, many prompts at once ──▶ rollouts
                     ▲                └─▶ or play n episodes with the prompt's environment
    weight store ────┘ long poll, load, check the probe

Versions are those that the engine reports: of the group its oldest, and of every token where the
weights changed on the way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rollout.config import ONE_TURN, EnvironmentConfig, RolloutConfig
from rollout.engine import Completion, Engine, Sampled, build_engine
from rollout.environments import Environments
from rollout.episodes import Episodes
from services.errors import Unavailable, WorkerFailed
from services.models import end_tokens, load_tokenizer
from services.trajectory import Prompt, RolloutGroup, Sampling, Trajectory
from services.weights import WeightFeed
from services.worker import Post, StepWorker

log = logging.getLogger(__name__)

_POLL_S = 2.0  # how long the store holds a request for newer weights; how soon a stop is noticed
_SHOW_WAIT_S = 5.0  # a prompt that waits longer for its weights shows in `scope status`


class NoWeights(WorkerFailed):
    """The learner published no first weights in time."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """What a rollout worker is told.

    Args:
        config: its engine and its limits.
        model_path: the student's directory, for its architecture and tokenizer. Its weights are
            replaced by the learner's before anything is sampled.
        weights: where the learner's weights come from.
        environment: who answers the student, if anybody does.
        longest: tokens of the longest prompt and answer together, all turns included; None: as
            many as the model can read.
    """

    config: RolloutConfig
    model_path: str
    weights: WeightFeed
    environment: EnvironmentConfig = ONE_TURN
    longest: int | None = None


class RolloutWorker(StepWorker[Prompt, RolloutGroup, RolloutSettings]):
    """One worker with its own engine. It ends with `NoWeights` when the learner published none in
    time, and with `services.weights.WeightsMismatch` when the engine came out with others."""

    takes = Prompt
    settings_class = RolloutSettings

    def __init__(self, post: Post, settings: RolloutSettings) -> None:
        super().__init__(post, settings)
        self._config = settings.config
        self._version = -1  # the newest that the engine has; -1 before the first
        self._changed = asyncio.Condition()
        self._prompts = self._sampled_tokens = 0
        self._engine: Engine
        self._tokenizer: PreTrainedTokenizerBase
        self._environments: Environments
        self._episodes: Episodes

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """An engine with the learner's first weights."""
        if self._config.torch_threads is not None:
            torch.set_num_threads(self._config.torch_threads)
        path, longest = self.settings.model_path, self.settings.longest
        async with AsyncExitStack() as resources:
            self._engine = await asyncio.to_thread(build_engine, self._config, path, longest)
            resources.push_async_callback(self._engine.close)
            self._tokenizer = await asyncio.to_thread(load_tokenizer, path)
            environment = self.settings.environment
            self._environments = await Environments.start(environment)
            self._episodes = Episodes(
                self._sample, self._tokenizer, end_tokens(path), environment, self._environments
            )
            await self._load_first()
            yield

    def details(self) -> dict[str, float]:
        """What was sampled, how long that took, and what a forward of decoding costs."""
        reported = {
            "prompts": float(self._prompts),
            "sampled_tokens": float(self._sampled_tokens),
            "sampling_s": self.busy.seconds,
        }
        if (pace := self._engine.pace) is not None:
            reported["forwards"] = float(pace.forwards)
            reported["forward_us"] = 1e6 * (pace.alone_s or 0.0)
        return reported

    # ------------------------------------------------------------------------------ prompts

    async def process(self, prompt: Prompt) -> RolloutGroup:
        """Samples the prompt's group under weights that are new enough."""
        play = self._episodes.group if self._environments.answers(prompt) else self._answers
        while True:
            await self._until_version(prompt)
            group = await play(prompt)
            # A learner that went back to a checkpoint may have published an older version.
            if group.weight_version >= prompt.min_weight_version:
                break
        self._prompts += 1
        self._sampled_tokens += sum(t.sampled_count for t in group.trajectories)
        return group

    async def _answers(self, prompt: Prompt) -> RolloutGroup:
        """A group whose trajectories are one answer each."""
        sampled = await self._sample(prompt.token_ids.tolist(), prompt.sampling)
        made = tuple(_trajectory(c, self._tokenizer) for c in sampled.completions)
        return RolloutGroup(prompt, made, sampled.weight_version)

    async def _sample(self, token_ids: Sequence[int], sampling: Sampling) -> Sampled:
        with self.busy:
            return await self._engine.sample(token_ids, sampling)

    async def _until_version(self, prompt: Prompt) -> None:
        """Waits for weights that are new enough; past a moment it leaves the waiting to the
        stage, which shows it and ends it."""
        wanted = prompt.min_weight_version
        try:
            async with asyncio.timeout(_SHOW_WAIT_S), self._changed:
                await self._changed.wait_for(lambda: self._version >= wanted)
        except TimeoutError:
            raise Unavailable(
                f"prompt {prompt.id} is for weights version {wanted} or newer; the learner's "
                f"newest is {self._version}"
            ) from None

    # ------------------------------------------------------------------------------ weights

    async def _load_first(self) -> None:
        """Waits for the first weights and loads them, unless the worker is stopped before."""
        limit = self._config.weights_timeout_s
        deadline = time.monotonic() + limit
        while not self.stopping.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoWeights(
                    f"{self.post.name} waited {limit:g} s for the learner's first weights, and the "
                    f"weight store has none"
                )
            if await self._load_newer(min(_POLL_S, left)):
                return

    async def background(self) -> None:
        """Keeps the engine at the newest version, until cancelled."""
        while True:
            await self._load_newer(_POLL_S)

    async def _load_newer(self, timeout_s: float) -> bool:
        weights = await self.settings.weights.next(timeout_s)
        if weights is None:
            return False
        version, loading = weights.version, self._engine.load_weights(weights)
        del weights  # the engine lets go of them when it has read them
        await loading
        async with self._changed:
            self._version = version
            self._changed.notify_all()
        log.info("%s: weights version %d", self.post.name, version)
        return True


def _trajectory(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    text = tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)  # a list only for a list of sequences
    return Trajectory(
        completion.token_ids,
        completion.logprobs,
        completion.finish,
        text,
        completion.version_runs,
        top=completion.top,
    )
