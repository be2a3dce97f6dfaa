"""Tokens/s of the rollout's and the teacher's engines, and how soon new weights are sampled from.

    python -m benchmarks.engines rollout --json benchmarks/results/engines-rollout-cpu.json
    python -m benchmarks.engines scoring --json benchmarks/results/engines-scoring-cpu.json

The same prompts go to the transformers engine, to our vLLM engine, and to vLLM's own `generate`:
in the same processes, so what ours costs on top of vLLM shows and nothing else; and, for rollout,
in an engine of its own with vLLM's defaults and without seeds, which says what our settings cost.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks.processor import processor
from rollout.config import RolloutConfig
from rollout.engine import Engine, build_engine
from services import vllm_core
from services.models import probe_tokens
from services.packed import prepare, score
from services.trajectory import Sampling
from services.weights import Weights
from teacher.config import TeacherConfig
from teacher.scorer import build_scorer

PROMPTS, PROMPT_TOKENS, N, NEW_TOKENS = 8, 64, 8, 64
ROUNDS = 3
ARGS = {"kv_cache_memory_bytes": 1 << 30}
# Of what is scored: prompts, tokens of each, answers to each, tokens of each answer.
SHAPES = {
    "one answer a prompt": (12, 128, 1, 128),
    "long prompt, 8 short answers": (1, 512, 8, 32),
    "prompt 4 times an answer, 8 answers": (1, 512, 8, 128),
    "short prompt, 8 long answers": (1, 64, 8, 448),
}


def make_model(directory: Path) -> Qwen3ForCausalLM:
    """A random Qwen3 of 27 million parameters. It knows no end token, so every completion has
    `NEW_TOKENS`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16_384, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, intermediate_size=1536, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=16_383,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def published(model: Qwen3ForCausalLM, version: int) -> Weights:
    """`model` as the learner publishes it."""
    probe = probe_tokens(16_384)
    (logprobs,) = score(model, [probe], [1])
    return Weights.flatten(version, model.named_parameters(), probe, logprobs)


async def race(work: dict[str, Callable[[], Awaitable[int]]]) -> dict[str, Any]:
    """Median tokens/s of each contestant over the rounds, and its median CPU seconds, in this
    process alone, for a thousand tokens: other work on the machine disturbs them least. (vLLM's
    own processes spin while they wait, so theirs say nothing.) Every other round goes through the
    contestants backwards, as a machine's speed drifts."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    costs: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name in list(work)[:: -1 if number % 2 else 1]:
            started, spent = time.perf_counter(), time.process_time()
            tokens = await work[name]()
            if number:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - started))
                costs[name].append(1000 * (time.process_time() - spent) / tokens)
    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "own_cpu_s_per_1000_tokens": {n: statistics.median(values) for n, values in costs.items()},
    }


async def generated(llm: Any, ids: list[int], **params: Any) -> Any:
    """vLLM's own way: one request, its last output."""
    wanted = SamplingParams(
        detokenize=False, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **params
    )
    last = None
    async for output in llm.generate(tokens_input(ids), wanted, uuid.uuid4().hex):
        last = output
    return last


async def rollout(directory: Path, model: Qwen3ForCausalLM) -> dict[str, Any]:
    """Tokens/s of sampling, and seconds from `load_weights` to the first token."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, 16_000, (PROMPTS, PROMPT_TOKENS)).tolist()
    engines: dict[str, Any] = {
        "transformers": build_engine(_rollout("transformers"), str(directory)),
        "vllm": await asyncio.to_thread(build_engine, _rollout("vllm"), str(directory)),
    }
    weights = published(model, 1)
    for engine in engines.values():
        await engine.load_weights(weights)
    plain = await asyncio.to_thread(plain_vllm, directory)

    async def ours(engine: Engine) -> int:
        groups = await asyncio.gather(
            *(engine.sample(p, Sampling(N, NEW_TOKENS, seed=i)) for i, p in enumerate(prompts))
        )
        return sum(len(c.token_ids) for group in groups for c in group.completions)

    async def bare(llm: Any, *, seeded: bool) -> int:
        params = {"n": N, "max_tokens": NEW_TOKENS, "logprobs": 0, "temperature": 1.0}
        outputs = await asyncio.gather(
            *(
                generated(llm, p, seed=i if seeded else None, **params)
                for i, p in enumerate(prompts)
            )
        )
        return sum(len(c.token_ids) for output in outputs for c in output.outputs)

    figures = await race(
        {name: (lambda engine=engine: ours(engine)) for name, engine in engines.items()}
        | {"bare vllm": lambda: bare(engines["vllm"]._llm, seeded=True)}
        | {"bare vllm, its defaults": lambda: bare(plain.llm, seeded=False)}
    )
    await plain.close()
    first = {name: await first_token_s(engine, weights) for name, engine in engines.items()}
    for engine in engines.values():
        await engine.close()
    return figures | {"weights_to_first_token_s": first}


def plain_vllm(directory: Path) -> vllm_core.Running:
    """vLLM as it comes, but for what makes it start on a CPU within seconds."""
    return vllm_core.start(
        AsyncEngineArgs(
            model=str(directory),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **ARGS,
        ),
        "bare vllm",
    )


async def first_token_s(engine: Engine, weights: Weights) -> float:
    """Median seconds from `load_weights` to one token of a short prompt under them."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        await engine.load_weights(weights)
        await engine.sample([1, 2, 3], Sampling(1, 1))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def scoring(directory: Path) -> dict[str, Any]:
    """Tokens/s of scoring answers of each shape. All tokens of all sequences are counted, the
    prompt once for each of its answers: that is what was asked for."""
    scorers: dict[str, Any] = {
        "packed": build_scorer(_teacher("transformers", directory)),
        "vllm": await asyncio.to_thread(build_scorer, _teacher("vllm", directory)),
    }

    figures = {name: await race(scoring_work(scorers, *shape)) for name, shape in SHAPES.items()}
    await scorers["vllm"].close()
    return figures


def scoring_work(
    scorers: dict[str, Any], prompts: int, before: int, n: int, after: int
) -> dict[str, Callable[[], Awaitable[int]]]:
    """What is raced for `prompts` of `before` tokens with `n` answers of `after` tokens each."""
    random = np.random.default_rng(1)
    sequences = [
        prompt + random.integers(0, 16_000, after).tolist()
        for prompt in random.integers(0, 16_000, (prompts, before)).tolist()
        for _ in range(n)
    ]

    async def ours(scorer: Any) -> int:
        await scorer.score(sequences, [before] * len(sequences))
        return sum(map(len, sequences))

    async def bare() -> int:
        llm = scorers["vllm"]._llm
        await asyncio.gather(
            *(generated(llm, ids, max_tokens=1, prompt_logprobs=0) for ids in sequences)
        )
        return sum(map(len, sequences))

    work: dict[str, Callable[[], Awaitable[int]]] = {
        name: (lambda scorer=scorer: ours(scorer))  # type: ignore[misc]
        for name, scorer in scorers.items()
    }
    return work | {"bare vllm": bare}


def _rollout(kind: str) -> RolloutConfig:
    return RolloutConfig.model_validate({"engine": {"kind": kind, "args": _args(kind)}})


def _teacher(kind: str, directory: Path) -> TeacherConfig:
    engine = {"kind": kind, "args": _args(kind)}
    return TeacherConfig.model_validate({"model": str(directory), "engine": engine})


def _args(kind: str) -> dict[str, Any]:
    return ARGS if kind == "vllm" else {}


def machine() -> dict[str, Any]:
    """Where and when the figures were taken."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[1],  # other work on the machine, ours among it
        "python": platform.python_version(),
    }


def table(result: dict[str, Any]) -> Table:
    """The figures of one run, for a person."""
    made = Table(
        "engine", "tokens/s", "own CPU s per 1,000 tokens", "s from new weights to first token"
    )
    for what, figures in result["figures"].items():
        first = figures.get("weights_to_first_token_s", {})
        for name, rate in figures["tokens_per_s"].items():
            seconds = f"{first[name]:.3f}" if name in first else ""
            cost = figures["own_cpu_s_per_1000_tokens"][name]
            made.add_row(f"{what}: {name}", f"{rate:,.0f}", f"{cost:.3f}", seconds)
    return made


async def measure(role: str) -> dict[str, Any]:
    """All engines of one role."""
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name))
        prepare(model)
        if role == "rollout":
            figures = {role: await rollout(Path(name), model)}
        else:
            figures = await scoring(Path(name))
        return {"machine": machine(), "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("rollout", "scoring"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = asyncio.run(measure(options.role))
    Console().print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
