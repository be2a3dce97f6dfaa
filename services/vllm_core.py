"""What the rollout's and the teacher's vLLM engines share: start-up, and scoring given tokens.

    this process                      engine core process          worker processes
    AsyncLLM (ids in, ids out) ──zmq──▶ scheduler, KV cache ──────▶ model (one per GPU)

Imports vLLM, which takes seconds: only builders of engines import this module, and late.
"""

from __future__ import annotations

import asyncio
import difflib
import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from services.config import EngineConfig
from services.engines import EngineError
from services.models import locate

_CPU_DEFAULTS: Mapping[str, Any] = {
    "enforce_eager": True,  # compiling costs a minute and gains nothing on small models
    "kv_cache_memory_bytes": 1 << 30,  # vLLM's own default is most of the machine's memory
    "block_size": 32,  # not 128: only whole blocks of a prompt are shared by its samples
}
# What vLLM reads from the environment while it starts; what the user has set there wins.
_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    # Each update of tied weights would be warned of as incomplete.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # By default each engine binds its threads to the same first cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # A sequence of the model's whole context leaves no room for the one token that vLLM insists
    # on generating; it is never fed back, so no position past the context is ever computed.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


# Its standard input ends when this process does.
_WATCHDOG = """
import os, signal, sys
sys.stdin.buffer.read()
for pid in sys.argv[1:]:
    try:
        os.kill(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        pass
"""


class Running:
    """`llm` and its processes, which end with this one however it ends: by itself vLLM outlives
    a parent that is killed, and keeps the GPU from the one that replaces it."""

    def __init__(self, make: Callable[[], AsyncLLM]) -> None:
        before = set(multiprocessing.active_children())
        self.llm = make()
        pids = [str(child.pid) for child in set(multiprocessing.active_children()) - before]
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", _WATCHDOG, *pids], stdin=subprocess.PIPE, start_new_session=True
        )

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await asyncio.to_thread(self.llm.shutdown)
        await asyncio.to_thread(self._watchdog.communicate)


def on_cpu() -> bool:
    """Whether this build of vLLM runs on the CPU."""
    return bool(current_platform.is_cpu())


def engine_args(
    model: str,
    engine: EngineConfig,
    section: str,
    *,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> AsyncEngineArgs:
    """What vLLM is started with.

    Args:
        model: a Hugging Face directory or hub name.
        engine: the user's settings.
        section: where they stand in the run's config, for messages.
        fixed: engine arguments that the caller's correctness rests on.
        defaults: engine arguments that `engine.args` may override.

    Raises:
        services.engines.EngineError: an argument is unknown, taken or refused by vLLM.
        services.models.ModelError: there is no such model.
    """
    if engine.device not in ("auto", current_platform.device_type):
        raise EngineError(
            f"this vLLM runs on {current_platform.device_type!r}, not on {engine.device!r}: set "
            f"{section}.device to 'auto'; which GPUs it takes is up to CUDA_VISIBLE_DEVICES"
        )
    dtype = engine.dtype
    own = {
        "model": str(locate(model)),
        "dtype": ("float32" if on_cpu() else "bfloat16") if dtype == "auto" else dtype,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **fixed,
    }
    _check_names(engine.args, own, section)
    merged = {**(_CPU_DEFAULTS if on_cpu() else {}), **defaults, **engine.args, **own}
    with _refusals(section):
        return AsyncEngineArgs(**merged)


def check(args: AsyncEngineArgs, section: str) -> None:
    """Lets vLLM validate its arguments against the model and this machine, starting nothing.

    Raises:
        services.engines.EngineError: vLLM refuses them.
    """
    with _refusals(section), _environment(args):
        args.create_engine_config()


def start(args: AsyncEngineArgs, section: str) -> Running:
    """Loads the model into engine processes of its own. Takes half a minute and more.

    Raises:
        services.engines.EngineError: vLLM refuses its arguments, or did not start.
    """
    with _refusals(section), _environment(args):
        try:
            return Running(lambda: AsyncLLM.from_engine_args(args))
        except RuntimeError as error:
            raise EngineError(f"{section}: vLLM did not start for {args.model}: {error}") from error


async def last_output(
    llm: AsyncLLM, token_ids: Sequence[int], params: SamplingParams
) -> RequestOutput:
    """The finished output of one prompt. Cancelling the caller aborts it in the engine.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: the engine's processes are gone.
    """
    prompt = tokens_input(list(token_ids))
    final: RequestOutput | None = None
    async for output in llm.generate(prompt, params, uuid.uuid4().hex):
        final = output
    assert final is not None  # vLLM ends with an output or an error
    return final


async def sequence_logprobs(llm: AsyncLLM, token_ids: Sequence[int]) -> list[float]:
    """Log-probs (nats, temperature 1) of `token_ids[1:]`, by one prefill."""
    params = SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    flat: Any = (await last_output(llm, token_ids, params)).prompt_logprobs
    # The first token has none; of every other one, the first entry is the token itself.
    return [float(flat.logprobs[start]) for start in flat.start_indices[1:]]


@contextmanager
def _refusals(section: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:  # pydantic's errors among them
        raise EngineError(f"{section}.args: vLLM refuses its arguments: {error}") from error


@contextmanager
def _environment(args: AsyncEngineArgs) -> Iterator[None]:
    """Sets what is not set, for as long as the block runs and for the processes it starts."""
    wanted = dict(_ENVIRONMENT)
    if on_cpu() and args.enforce_eager:
        # The sampler is compiled even so, with a C++ compiler, and that takes 20 s.
        wanted["TORCH_COMPILE_DISABLE"] = "1"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _check_names(args: Mapping[str, Any], own: Mapping[str, Any], section: str) -> None:
    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in args:
        if name in own:
            raise EngineError(f"{section}.args.{name} is set by this engine itself: leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known - own.keys(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise EngineError(f"{section}.args: vLLM's engine has no argument {name!r}{hint}")
