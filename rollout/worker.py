"""The worker of rollout: prompts in, groups of sampled trajectories out.

    prompts ──▶ decode ─▶ sample n completions, many prompts at once ─▶ encode ──▶ rollouts
                               ▲
    weight store ── long poll ─┘ load ─▶ check the probe

Versions are those that the engine reports: of the group its oldest, and of every token where the
weights changed on the way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rollout.config import RolloutConfig
from rollout.engine import Completion, Engine, build_engine
from rollout.pace import Pace
from services.models import load_tokenizer
from services.stage import EVAL, TRAIN, Busy, Connection, Stage, Unavailable, end, new_consumer
from services.trajectory import Prompt, RolloutGroup, Trajectory, decode, encode
from services.weights import WeightFeed

log = logging.getLogger(__name__)

_POLL_S = 2.0  # how long the store holds a request for newer weights; how soon a stop is noticed
_SHOW_WAIT_S = 5.0  # a prompt that waits longer for its weights shows in `scope status`


class NoWeights(RuntimeError):
    """The learner published no first weights in time."""


class RolloutWorker:
    """One worker with its own engine.

    Args:
        connection: the run.
        config: its engine and its limits.
        model_path: the student's directory, for its architecture and tokenizer. Its weights are
            replaced by the learner's before anything is sampled.
        weights: where the learner's weights come from.
        name: for logs and status; it need not be unique.
        lanes: whose prompts it takes, first one first.
    """

    def __init__(
        self,
        connection: Connection,
        config: RolloutConfig,
        model_path: str,
        weights: WeightFeed,
        name: str,
        lanes: Sequence[str] = (EVAL, TRAIN),
    ) -> None:
        self._connection = connection
        self._config = config
        self._model_path = model_path
        self._weights = weights
        self._name = name
        self._lanes = lanes
        self._version = -1  # the newest that the engine has; -1 before the first
        self._changed = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._busy = Busy()
        self._prompts = self._sampled_tokens = 0
        self._pace: Pace | None = None

    async def run(self) -> None:
        """Works until `stop`; then finishes the prompts that it holds.

        Raises:
            NoWeights: the learner published none in time.
            rollout.engine.WeightsMismatch: the engine came out with other weights.
            services.stage.PatienceExceeded, redis.exceptions.RedisError: see `Stage.run`.
        """
        if self._config.torch_threads is not None:
            torch.set_num_threads(self._config.torch_threads)
        async with AsyncExitStack() as resources:
            engine = await asyncio.to_thread(build_engine, self._config, self._model_path)
            resources.push_async_callback(engine.close)
            self._pace = engine.pace
            tokenizer = await asyncio.to_thread(load_tokenizer, self._model_path)
            if not await self._load_first(engine):
                return
            lanes = [self._connection.streams(lane) for lane in self._lanes]
            for lane in lanes:
                resources.push_async_callback(lane.redis.aclose)

            async def process(payload: bytes) -> bytes:
                return encode(await self._sample(decode(Prompt, payload), engine, tokenizer))

            stage = Stage(
                name="rollout",
                # Never the name of a worker before: what that one held must go stale, not be ours.
                consumer=new_consumer(self._name),
                lanes=lanes,
                source="prompts",
                target="rollouts",
                process=process,
                capacity=self._config.capacity,
                config=self._connection.config,
                stopping=self._stopping,
                details=self._details,
            )
            await _both(stage.run(), self._follow(engine))

    async def stop(self) -> None:
        """Lets `run` finish what it holds and return."""
        self._stopping.set()

    def _details(self) -> dict[str, float]:
        told = {
            "workers": 1.0,
            "prompts": float(self._prompts),
            "sampled_tokens": float(self._sampled_tokens),
            "sampling_s": self._busy.seconds,
        }
        if self._pace is not None:
            told["forwards"] = float(self._pace.forwards)
            told["forward_us"] = 1e6 * (self._pace.alone_s or 0.0)
        return told

    # ------------------------------------------------------------------------------ prompts

    async def _sample(
        self, prompt: Prompt, engine: Engine, tokenizer: PreTrainedTokenizerBase
    ) -> RolloutGroup:
        while True:
            await self._until_version(prompt)
            with self._busy:
                sampled = await engine.sample(prompt.token_ids.tolist(), prompt.sampling)
            # A learner that went back to a checkpoint may have published an older version.
            if sampled.weight_version >= prompt.min_weight_version:
                break
        self._prompts += 1
        self._sampled_tokens += sum(len(c.token_ids) for c in sampled.completions)
        return RolloutGroup(
            prompt=prompt,
            trajectories=tuple(_trajectory(c, tokenizer) for c in sampled.completions),
            weight_version=sampled.weight_version,
        )

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

    async def _load_first(self, engine: Engine) -> bool:
        """Waits for the first weights and loads them; False if the worker was stopped before."""
        limit = self._config.weights_timeout_s
        deadline = time.monotonic() + limit
        while not self._stopping.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoWeights(
                    f"{self._name} waited {limit:g} s for the learner's first weights, and the "
                    f"weight store has none"
                )
            if await self._load_newer(engine, min(_POLL_S, left)):
                return True
        return False

    async def _follow(self, engine: Engine) -> None:
        """Keeps the engine at the newest version, until cancelled."""
        while True:
            await self._load_newer(engine, _POLL_S)

    async def _load_newer(self, engine: Engine, timeout_s: float) -> bool:
        weights = await self._weights.next(timeout_s)
        if weights is None:
            return False
        await engine.load_weights(weights)
        async with self._changed:
            self._version = weights.version
            self._changed.notify_all()
        log.info("%s: weights version %d", self._name, weights.version)
        return True


def _trajectory(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    text = tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)  # a list only for a list of sequences
    return Trajectory(
        completion.token_ids, completion.logprobs, completion.finish, text, completion.version_runs
    )


async def _both(work: Coroutine[Any, Any, None], background: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end. `background` is cancelled then; its failure ends both."""
    tasks = [asyncio.create_task(background), asyncio.create_task(work)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
