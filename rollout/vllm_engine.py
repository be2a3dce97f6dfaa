"""Sampling with vLLM: prompts of all callers in flight at once, weights changed in place.

sample ──▶ turnstile ──▶ AsyncLLM: one request a group, its n samples share the prefill
load_weights ─▶ close the turnstile ─▶ pause ─▶ transfer ─▶ resume
                      ▲                                       │
                      └─── open ◀── probe equals the learner's ┘

Groups in flight are finished before the pause (`wait`) or frozen by it (`keep`). Frozen ones lose
their KV cache, which the old weights filled: on resuming it is computed again from their tokens, so
that each token is sampled from exactly what one version says of all the tokens before it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from rollout import vllm_transfer
from rollout.config import RolloutConfig, SamplingEngineConfig
from rollout.engine import (
    Completion,
    Sampled,
    SamplingError,
    check_request,
)
from services import vllm_core
from services.config import EngineConfig
from services.errors import BadItem, EngineDied, Unavailable
from services.models import PROBE_TOKENS, end_tokens, locate, parameter_shapes, stored_names
from services.trajectory import Sampling
from services.weights import Sender, TransferFailed, Weights, check_manifest, check_probe

SECTION = "rollout.engine"  # of a run's config, for messages
_FIRST = -1  # priority: lower is sooner, and samples have 0
_LOOK_S = 1.0  # how often a process is looked after whose answer is awaited
_EXTENSION = f"{vllm_transfer.__name__}.{vllm_transfer.WorkerExtension.__name__}"


def engine_args(
    config: RolloutConfig, model_path: str, longest: int | None = None
) -> AsyncEngineArgs:
    """What vLLM samples with, prompts and answers of up to `longest` tokens together.

    Raises:
        services.engines.EngineError: an argument is unknown, taken or refused by vLLM.
        services.models.ModelError: there is no such model.
    """
    return vllm_core.engine_args(
        model_path,
        config.engine,
        SECTION,
        resources=config.resources,
        fixed={
            # Of the distribution that was sampled from, temperature applied, as ρ needs them.
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,  # as many as an objective asks for
            # So that the probe need not wait behind what goes on under weights not yet proven.
            "scheduling_policy": "priority",
            # When a prompt is prefilled in parts, vLLM 0.32 rewinds its random stream, which
            # streams on a CPU cannot do: the engine would die.
            **({"enable_chunked_prefill": False} if vllm_core.on_cpu() else {}),
        },
        defaults={
            # vLLM starts only where its cache has room for one sequence of this length.
            **({"max_model_len": _model_length(longest)} if longest else {}),
            # vLLM caches the prefixes of recurrent layers only where it prefills in parts.
            **({"enable_prefix_caching": False} if _recurrent_on_cpu(model_path) else {}),
            "worker_extension_cls": _EXTENSION,
            "weight_transfer_config": {"backend": vllm_transfer.BACKENDS[_transfer(config.engine)]},
        },
    )


def _model_length(longest: int) -> int:
    """With room for the probe and the one token that vLLM insists on generating behind it."""
    return max(longest, PROBE_TOKENS + 1)


def _transfer(engine: SamplingEngineConfig) -> str:
    return "store" if engine.weight_transfer == "auto" else engine.weight_transfer


def _recurrent_on_cpu(model_path: str) -> bool:
    if not vllm_core.on_cpu():
        return False
    text: Any = AutoConfig.from_pretrained(locate(model_path)).get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ())}
    return not kinds <= {"full_attention", "sliding_attention"}


def check(config: RolloutConfig, model_path: str, longest: int | None = None) -> None:
    """See `rollout.engine.check_engine`."""

    def make(engine: EngineConfig) -> AsyncEngineArgs:
        return engine_args(config.model_copy(update={"engine": engine}), model_path, longest)

    vllm_core.check(make, config.engine, SECTION)


class VLLMEngine:
    """See `rollout.engine.Engine`.

    Args:
        config: its engine and its probe tolerance.
        model_path: the student's directory.
        longest: tokens of the longest prompt and answer; None: the model's whole context.

    Raises:
        services.engines.EngineError: vLLM does not start with these arguments.
        services.models.ModelError: there is no such model.
    """

    pace = None  # its forwards are those of another process

    def __init__(self, config: RolloutConfig, model_path: str, longest: int | None = None) -> None:
        self._end_tokens = list(end_tokens(model_path))
        self._shapes = parameter_shapes(model_path)
        self._stored_names = stored_names(model_path, self._shapes)
        self._tolerance = config.probe_tolerance
        self._usual: float | None = None  # see `check_probe`
        if config.engine.weight_transfer == "ipc":
            # CUDA's handles of shared memory reach vLLM's processes as pickles, from this one.
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        self._in_flight = config.engine.in_flight
        self._running = vllm_core.start(engine_args(config, model_path, longest), SECTION)
        self._llm = self._running.llm
        self._turnstile = _Turnstile()
        self._connected = False

    async def sample(self, prompt_ids: Sequence[int], sampling: Sampling) -> Sampled:
        """See `rollout.engine.Engine`. A cancelled call frees its place in the engine."""
        self._check(prompt_ids, sampling)
        async with self._turnstile.passing():
            with _naming_the_dead():
                output = await vllm_core.last_output(self._llm, prompt_ids, self._params(sampling))
        return _sampled(output.outputs)

    async def load_weights(self, weights: Weights) -> None:
        """See `rollout.engine.Engine`. Groups in flight are finished first, or go on under the
        new weights, as `in_flight` says."""
        check_manifest(weights, self._shapes)
        async with AsyncExitStack() as stack:
            update: dict[str, Any] = {}
            if weights.sender is None:  # written before anything stops, and beside what samples
                update = await asyncio.to_thread(
                    stack.enter_context, vllm_transfer.shared(self._as_stored(weights))
                )
                # The wait for what is in flight is long, and the next version needs the room.
                weights = weights.announcement()
            opening = await stack.enter_async_context(
                self._turnstile.closed(drained=self._in_flight == "wait")
            )
            with _naming_the_dead():
                weights = await self._while_alive(self._transfer(weights, update))
                logprobs = await vllm_core.sequence_logprobs(
                    self._llm, weights.probe_ids, priority=_FIRST
                )
            mean = check_probe(weights, logprobs, self._tolerance, self._usual)
            self._usual = mean if self._usual is None else self._usual
            opening.version = weights.version

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await self._running.close()

    async def _while_alive(self, work: Coroutine[Any, Any, Weights]) -> Weights:
        """Unlike a request, a call that changes weights is never answered by vLLM when its
        process dies meanwhile."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_S)
                if self._llm.errored and not task.done():
                    raise EngineDied("vLLM's engine process died while its weights were changed")
            return task.result()
        finally:
            task.cancel()

    async def _transfer(self, weights: Weights, update: dict[str, Any]) -> Weights:
        """Changes the weights, and tells which came. What was cached under the old ones is
        dropped."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        try:
            if weights.sender is not None:
                return await self._receive(weights.sender)
            await self._read(update)
            return weights
        finally:
            await self._llm.resume_generation()

    async def _read(self, update: dict[str, Any]) -> None:
        """From their file, by our own transfer engine."""
        llm = self._llm
        if not self._connected:
            await llm.init_weight_transfer_engine(WeightTransferInitRequest())
            self._connected = True
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update))
        await llm.finish_weight_update(str(update["version"]))

    def _as_stored(self, weights: Weights) -> Weights:
        """Under the names of a multimodal checkpoint, where vLLM has loaded one."""
        names = self._stored_names
        manifest = (
            (names.get(name, name), dtype, shape) for name, dtype, shape in weights.manifest
        )
        return replace(weights, manifest=tuple(manifest))

    async def _receive(self, sender: Sender) -> Weights:
        """From the learner, by one of vLLM's transfer engines, which its other end drives."""
        llm = self._llm
        async for call in sender.calls(llm.vllm_config.parallel_config.world_size):
            match call.method:
                case "init_weight_transfer_engine":
                    await llm.init_weight_transfer_engine(WeightTransferInitRequest(call.argument))
                case "start_weight_update":
                    await llm.start_weight_update()
                case "update_weights":
                    update = renamed(call.argument, self._stored_names)
                    await llm.update_weights(WeightTransferUpdateRequest(update))
                case "finish_weight_update":
                    sent: Weights = call.argument
                    await llm.finish_weight_update(str(sent.version))
        return sent

    def _check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        model = self._llm.model_config
        check_request(prompt_ids, sampling, vocab_size=model.get_vocab_size())
        longest = len(prompt_ids) + sampling.max_tokens
        if longest > model.max_model_len:  # vLLM would cut completions off before max_tokens
            raise BadItem(
                f"prompt and max_tokens are {longest} tokens, more than vLLM's max_model_len "
                f"({model.max_model_len})"
            )

    def _params(self, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            n=sampling.n,
            seed=sampling.seed,  # vLLM adds each sample's place in the group
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._end_tokens,
            ignore_eos=True,  # our end tokens only, not those of vLLM's own reading of the config
            logprobs=sampling.top,  # besides the sampled token
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def renamed(update: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What vLLM's NCCL and IPC engines tell of an update, with other names for its parameters."""
    if "names" not in update:
        return update
    return update | {"names": [names.get(name, name) for name in update["names"]]}


@contextmanager
def _naming_the_dead() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise EngineDied("vLLM's engine process died; its log says why") from error
    except TransferFailed as error:  # half of the weights may be new
        raise EngineDied(f"vLLM's engine was left without weights: {error}") from error


def _sampled(outputs: Sequence[CompletionOutput]) -> Sampled:
    runs = [tuple((s.start, int(s.version)) for s in o.weight_versions or ()) for o in outputs]
    versions = {version for run in runs for _, version in run}
    if len(versions) == 1:
        runs = [()] * len(outputs)
    made = tuple(_completion(o, r) for o, r in zip(outputs, runs, strict=True))
    return Sampled(made, min(versions))


def _completion(output: CompletionOutput, runs: tuple[tuple[int, int], ...]) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise SamplingError(f"vLLM ended a completion with {output.finish_reason!r}")
    flat: Any = output.logprobs
    logprobs = np.array([flat.logprobs[start] for start in flat.start_indices], np.float32)
    if not np.isfinite(logprobs).all():
        raise SamplingError("the model computed log-probs that are not finite")
    ids = np.array(output.token_ids, np.int32)
    # Each place has as many entries: the sampled token's, and the most likely ones.
    every = np.array(flat.token_ids, np.int32).reshape(len(ids), -1)
    top = every[:, 1:] if every.shape[1] > 1 else None
    return Completion(ids, logprobs, output.finish_reason, runs, top)


class _Opening:
    """What a load leaves behind: the version that passed, or None."""

    version: int | None = None


class _Turnstile:
    """Lets groups in while verified weights are loaded, and out when those that sampled them
    are."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._version: int | None = None
        self._closed = False
        self._inside = 0

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Waits while it is closed; and again after the block, when weights changed meanwhile,
        for the verdict on them.

        Raises:
            services.errors.Unavailable: no weights that passed the probe are loaded.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._require_weights()
            self._inside += 1
        try:
            yield
            async with self._changed:
                await self._changed.wait_for(lambda: self._version is not None or not self._closed)
                self._require_weights()
        finally:
            self._inside -= 1
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def closed(self, *, drained: bool) -> AsyncIterator[_Opening]:
        """Closes, waits until nobody is inside if it is to be drained, and opens again after the
        block."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._closed = True
        opening = _Opening()
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not (drained and self._inside))
            self._version = None
            yield opening
        finally:
            async with self._changed:
                self._version, self._closed = opening.version, False
                self._changed.notify_all()

    def _require_weights(self) -> None:
        if self._version is None:
            raise Unavailable("the engine has no weights that passed the probe")
