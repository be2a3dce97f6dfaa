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
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, fields
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil  # which vLLM needs itself
import torch
import vllm.config
from pydantic import ValidationError
from transformers import AutoConfig
from vllm import ModelRegistry, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from services.config import EngineConfig, Resources
from services.engines import EngineError
from services.models import locate

_CPU_DEFAULTS: Mapping[str, Any] = {
    "enforce_eager": True,  # compiling costs a minute and gains nothing on small models
    "kv_cache_memory_bytes": 1 << 30,  # vLLM's own default is most of the machine's memory
    "block_size": 32,  # not 128: only whole blocks of a prompt are shared by its samples
}
# On a CPU vLLM 0.32 rotates one head alone of what LFM2 gives it, as [tokens, heads, width]: its
# kernel reads the number of heads off a last axis that is taken to hold them all.
_ROTARY = "rotary_embedding"
# Decides how many sequences and tokens a step takes: with none, 128 and 2,048 on whatever GPU.
_USAGE = UsageContext.OPENAI_API_SERVER
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


# Its standard input ends when this process does. Then vLLM's processes end, and after them the
# segments of shared memory that killed ones leave behind: hundreds of megabytes each time.
_WATCHDOG = """
import os, signal, sys, time
import psutil

def runs(process):  # and is not another one under its number
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

ours = []
for argument in sys.argv[1:]:
    pid, created = argument.split(":")
    try:
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(created)) < 1:  # or its number was given again
            ours.append(process)
    except psutil.NoSuchProcess:
        pass
names = sys.stdin.read().split()
deadline = time.monotonic() + 20
for signum in (signal.SIGTERM, signal.SIGKILL):
    for process in filter(runs, ours):
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            pass
    while time.monotonic() < deadline and any(map(runs, ours)):
        time.sleep(0.05)
for name in names:
    try:
        os.unlink(name)
    except FileNotFoundError:
        pass
"""
_END_S = 120.0  # for what is left of a process that was killed
_SHARED = re.compile(r"/dev/shm/(?:psm_|sem\.mp-|vllm_)\S+")


class Running:
    """`llm` and its processes, which end with this one however it ends: by itself vLLM outlives
    a parent that is killed, and keeps the GPU from the one that replaces it."""

    def __init__(self, make: Callable[[], AsyncLLM]) -> None:
        before = set(multiprocessing.active_children())
        self.llm = make()
        self._children = set(multiprocessing.active_children()) - before
        pids = [child.pid for child in self._children if child.pid]
        watched = (f"{pid}:{psutil.Process(pid).create_time()}" for pid in pids)
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", _WATCHDOG, *watched],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write("\n".join(shared_memory(pids)))
        self._watchdog.stdin.flush()

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await asyncio.to_thread(self.llm.shutdown)
        await asyncio.to_thread(self._watchdog.communicate)
        for child in self._children:  # its first thread can be gone before its others are
            await asyncio.to_thread(child.join, _END_S)


def shared_memory(pids: Sequence[int]) -> set[str]:
    """Files of shared memory that these processes and all below them have mapped."""
    names: set[str] = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            for process in (one := psutil.Process(pid), *one.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # a compiler, say, has ended
                    paths = (mapped.path for mapped in process.memory_maps())
                    names |= {path for path in paths if _SHARED.fullmatch(path)}
    return names


def on_cpu() -> bool:
    """Whether this build of vLLM runs on the CPU."""
    return bool(current_platform.is_cpu())


def engine_args(
    model: str,
    engine: EngineConfig,
    section: str,
    *,
    resources: Resources,
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> AsyncEngineArgs:
    """What vLLM is started with.

    Args:
        model: a Hugging Face directory or hub name.
        engine: the user's settings.
        section: where they stand in the run's config, for messages.
        resources: what the role reserves. An engine on a part of a GPU takes that part of its
            memory, and is refused more: others live in the rest.
        fixed: engine arguments that the caller's correctness rests on.
        defaults: engine arguments that `engine.args` may override.

    Raises:
        services.engines.EngineError: an argument is unknown, taken or refused by vLLM.
        services.models.ModelError: there is no such model.
    """
    device = current_platform.device_type  # empty where vLLM finds no device at all
    if device and engine.device not in ("auto", device):
        raise EngineError(
            f"this vLLM runs on {device!r}, not on {engine.device!r}: set {section}.device to "
            "'auto'; which GPUs it takes is up to CUDA_VISIBLE_DEVICES"
        )
    dtype = engine.dtype
    own = {
        "model": str(locate(model)),
        "dtype": ("float32" if on_cpu() else "bfloat16") if dtype == "auto" else dtype,
        "skip_tokenizer_init": True,
        # Of a multimodal checkpoint: its other parts would be started with a tokenizer.
        "language_model_only": True,
        "disable_log_stats": True,
        **fixed,
    }
    _check_names(engine.args, own, section)
    if on_cpu() and own["dtype"] != "bfloat16" and _has_delta_rule(model):
        raise EngineError(
            f"vLLM computes linear attention like that of {model} on a CPU in bfloat16 alone: set "
            f"{section}.dtype to 'bfloat16', or {section}.kind to 'transformers'"
        )
    merged = {
        **(_CPU_DEFAULTS if on_cpu() else _gpu_memory(engine, resources, section)),
        **defaults,
        **engine.args,
        **own,
    }
    if on_cpu():
        merged["compilation_config"] = _plain_rotary(merged.get("compilation_config", {}))
    with _refusals(section):
        return AsyncEngineArgs(**merged)


def _has_delta_rule(model: str) -> bool:
    """Whether some layers are Qwen's gated delta rules (Qwen3-Next, Qwen3.5), which alone have
    kernels of vLLM's for CPUs."""
    text: Any = AutoConfig.from_pretrained(locate(model)).get_text_config()
    return hasattr(text, "linear_num_value_heads") and text.model_type.startswith("qwen")


def _plain_rotary(given: Any) -> Any:
    """The user's compilation settings, with rotary embeddings by PyTorch unless these name them."""
    if not isinstance(given, Mapping):
        return given  # vLLM says what is wrong with it
    operations = given.get("custom_ops", [])
    if any(name in operations for name in (f"+{_ROTARY}", f"-{_ROTARY}")):
        return given
    return {**given, "custom_ops": [*operations, f"-{_ROTARY}"]}


def _gpu_memory(engine: EngineConfig, resources: Resources, section: str) -> dict[str, float]:
    """The share of each GPU's memory that is this role's."""
    if not 0 < resources.gpus < 1:
        return {}
    share = engine.gpu_share(resources)
    if share > resources.gpus:
        raise EngineError(
            f"{section}.args.gpu_memory_utilization is {share:g}, and the role reserves "
            f"{resources.gpus:g} of a GPU: others would find no memory"
        )
    return {"gpu_memory_utilization": share}


def check(
    make: Callable[[EngineConfig], AsyncEngineArgs], engine: EngineConfig, section: str
) -> None:
    """Lets vLLM validate its arguments against the model and this machine, starting nothing. Where
    vLLM finds no device, only their names and forms are checked.

    Args:
        make: what vLLM would be started with under given settings.
        engine: the settings.
        section: where they stand in the run's config.

    Raises:
        services.engines.EngineError: vLLM refuses them; the culprit is named, if it is only one.
    """

    def refusal(args: Mapping[str, Any]) -> str:
        try:
            made = make(engine.model_copy(update={"args": args}))
            with _refusals(section), _environment(made):
                if current_platform.device_type:
                    made.create_engine_config(_USAGE)
        except EngineError as error:
            return str(error)
        return ""

    message = refusal(engine.args)
    if not message:
        return
    for name in engine.args:
        if not refusal({other: v for other, v in engine.args.items() if other != name}):
            message = message.replace(f"{section}.args:", f"{section}.args.{name}:", 1)
    raise EngineError(message)


def start(args: AsyncEngineArgs, section: str) -> Running:
    """Loads the model into engine processes of its own. Takes half a minute and more.

    Raises:
        services.engines.EngineError: vLLM refuses its arguments, or did not start.
    """
    with _refusals(section), _environment(args):
        try:
            return Running(lambda: AsyncLLM.from_engine_args(args, usage_context=_USAGE))
        except RuntimeError as error:
            raise EngineError(f"{section}: vLLM did not start for {args.model}: {error}") from error


async def last_output(
    llm: AsyncLLM, token_ids: Sequence[int], params: SamplingParams, priority: int = 0
) -> RequestOutput:
    """The finished output of one prompt. Cancelling the caller aborts it in the engine. A lower
    priority is served sooner, where the engine schedules by it.

    Raises:
        vllm.v1.engine.exceptions.EngineDeadError: the engine's processes are gone.
    """
    prompt = tokens_input(list(token_ids))
    final: RequestOutput | None = None
    async for output in llm.generate(prompt, params, uuid.uuid4().hex, priority=priority):
        final = output
    assert final is not None  # vLLM ends with an output or an error
    return final


class PromptLogprobs(NamedTuple):
    """Of each of the `T` tokens behind the first, in nats at temperature 1."""

    ids: npt.NDArray[np.int64]  # [T, 1 + top]: the token itself, then the most likely first
    logprobs: npt.NDArray[np.float64]  # [T, 1 + top]
    candidates: npt.NDArray[np.float32]  # [C, m] of the last `C`; [0, 0] where there are none


async def prompt_logprobs(
    llm: AsyncLLM,
    token_ids: Sequence[int],
    top: int = 0,
    priority: int = 0,
    *,
    candidates: npt.NDArray[np.int32] | None = None,
    start: int = 1,
) -> PromptLogprobs:
    """By one prefill, for each of the `T` tokens behind the first: itself and the `top` most
    likely tokens in its place. `candidates` [C, m] are scored in the places from `start` on."""
    params = SamplingParams(
        max_tokens=1,
        prompt_logprobs=top,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        prompt_logprob_token_ids=candidates,
        prompt_logprob_start=None if candidates is None else start - 1,
    )
    output: Any = await last_output(llm, token_ids, params, priority)
    flat, named = output.prompt_logprobs, output.prompt_token_id_logprobs
    # The first token has no entries, every other one has the same number.
    shape = (len(token_ids) - 1, 1 + top)
    return PromptLogprobs(
        np.array(flat.token_ids).reshape(shape),
        np.array(flat.logprobs).reshape(shape),
        np.empty((0, 0), np.float32) if named is None else named,
    )


async def sequence_logprobs(
    llm: AsyncLLM, token_ids: Sequence[int], priority: int = 0
) -> list[float]:
    """Log-probs (nats, temperature 1) of `token_ids[1:]`, by one prefill."""
    scored = await prompt_logprobs(llm, token_ids, priority=priority)
    return scored.logprobs[:, 0].tolist()  # type: ignore[no-any-return]


@contextmanager
def _refusals(section: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problems = "; ".join(_sentence(error.title, problem) for problem in error.errors())
        raise EngineError(f"{section}.args: vLLM refuses: {problems}") from error
    except (ValueError, TypeError) as error:
        raise EngineError(f"{section}.args: vLLM refuses: {_cause(str(error))}") from error


def _cause(message: str) -> str:
    """With what vLLM leaves to its log: why it could not import a model's code."""
    if "failed to be inspected" not in message:
        return message
    for name in re.findall(r"'(\w+)'", message):
        try:
            import_module(ModelRegistry.models[name].module_name)
        except (ImportError, RuntimeError) as error:  # of one that does not fit torch, the latter
            return (
                f"its code of {name} cannot be imported: {error}; install what fits torch "
                f"{torch.__version__}, or set kind to 'transformers'"
            )
    return message


def _sentence(title: str, problem: Any) -> str:
    """One of pydantic's errors about vLLM's config class `title`, in words."""
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        return f"{title} has no field {name!r}{_hint(name, fields(getattr(vllm.config, title)))}"
    message = _cause(problem["msg"].removeprefix("Value error, "))
    return f"{name}: {message}" if name else message


def _hint(name: str, known: Iterable[Field[Any]]) -> str:
    near = difflib.get_close_matches(name, [field.name for field in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@contextmanager
def _environment(args: AsyncEngineArgs) -> Iterator[None]:
    """Sets what is not set, for as long as the block runs and for the processes it starts."""
    wanted = dict(_ENVIRONMENT)
    if on_cpu() and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # One process that imports vLLM instead of two, as on one GPU: it keeps its worker out of
        # the core's process on a CPU to bind that one's threads, and none are bound here.
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
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
    free = [field for field in fields(AsyncEngineArgs) if field.name not in own]
    for name in args:
        if name in own:
            raise EngineError(f"{section}.args.{name} is set by this engine itself: leave it out")
        if all(field.name != name for field in free):
            raise EngineError(
                f"{section}.args: vLLM's engine has no argument {name!r}{_hint(name, free)}"
            )
