"""What REST costs on top of the teacher's engine, in JSON and in binary, and under concurrency.

    python -m benchmarks.teacher --json benchmarks/results/teacher-cpu.json

The server is a process of its own, as it is in a run, with the same engine and model as the bare
contestant in this one. Their rounds alternate, as a machine drifts; figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.verifier import machine
from services.trajectory import TokenIds
from teacher import wire
from teacher.admission import Admission
from teacher.api import ScoreRequest, ScoreResponse
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import Target, TeacherClient
from teacher.config import TeacherConfig
from teacher.scorer import Scorer, build_scorer, model_card
from teacher.scores import TokenScores

VOCABULARY = 16_384
LONG, PROMPT = 4096, 512  # tokens of a sequence, and how many of them are its prompt
SHORT = 256
SEQUENCES, ROUNDS = 4, 5
TOP = 64
CONCURRENCY = (1, 4, 16)
REQUESTS = 48  # at each concurrency

Pairs = list[tuple[TokenIds, TokenIds]]


def make_model(directory: Path) -> None:
    """A random Qwen3 of 5 million parameters: large enough that 4,096 tokens take a second."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, intermediate_size=512, max_position_embeddings=LONG,
        tie_word_embeddings=True, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    from tests.builders import tiny_tokenizer

    tiny_tokenizer().save_pretrained(directory)


def pairs(count: int, length: int, prompt: int) -> Pairs:
    """Random sequences."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, length)).astype(np.int32)
    return [(row[:prompt], row[prompt:]) for row in tokens]


def _config(directory: Path) -> TeacherConfig:
    engine = {"kind": "transformers", "device": "cpu"}
    return TeacherConfig.model_validate({"model": str(directory), "engine": engine})


def serve(directory: Path, listener: socket.socket) -> None:
    """The server's process."""
    torch.set_num_threads(1)
    config = _config(directory)
    app = build_app(
        [Teacher(model_card(config), build_scorer(config))],
        KeyRing([]),
        max_body_bytes=config.max_body_bytes,
        admission=Admission(max_requests=256, max_tokens=config.max_held_tokens),
    )
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])


async def alternating(work: dict[str, Callable[[], Awaitable[object]]]) -> dict[str, float]:
    """Median seconds of each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name, run in work.items():
            started = time.perf_counter()
            await run()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


async def throughput(scorer: Scorer, url: str) -> dict[str, Any]:
    """Tokens/s of long sequences, bare and through REST in both forms."""
    asked = pairs(SEQUENCES, LONG, PROMPT)
    ids, starts = [[*p.tolist(), *c.tolist()] for p, c in asked], [PROMPT] * SEQUENCES
    async with AsyncExitStack() as stack:
        clients = {
            form: await stack.enter_async_context(
                TeacherClient(Target(url), timeout_s=600, binary=form == "binary")
            )
            for form in ("binary", "JSON")
        }
        results: dict[str, Any] = {}
        for top in (0, TOP):
            work: dict[str, Callable[[], Awaitable[object]]] = {
                "bare": lambda top=top: scorer.score(ids, starts, top)  # type: ignore[misc]
            }
            for form, client in clients.items():
                work[form] = lambda client=client, top=top: client.score(asked, top)  # type: ignore[misc]
            seconds = await alternating(work)
            rates = {name: round(SEQUENCES * LONG / value) for name, value in seconds.items()}
            results[f"top {top}"] = rates | {
                f"{form} / bare": round(rates[form] / rates["bare"], 3) for form in clients
            }
    return results


def forms() -> dict[str, Any]:
    """Milliseconds of all four encodings and decodings of one long sequence, and its bytes."""
    asked = pairs(1, LONG, PROMPT)
    count = LONG - PROMPT
    random = np.random.default_rng(0)
    results = {}
    for top in (0, TOP):
        values = -np.sort(random.random((count, top)).astype(np.float32), axis=1)
        ids = random.integers(0, VOCABULARY, (count, top)).astype(np.int32)
        scores = [TokenScores(-random.random(count).astype(np.float32), ids, values)]

        def binary(top: int = top, scores: list[TokenScores] = scores) -> int:
            wire.decode_request(request := wire.encode_request(asked, top=top))
            wire.decode_answer(answer := wire.encode_answer("m", "f", scores, top))
            return len(request) + len(answer)

        def plain(top: int = top, scores: list[TokenScores] = scores) -> int:
            request = wire.json_request(asked, top=top)
            ScoreRequest.model_validate_json(request).query()
            answer = ScoreResponse.of("m", "f", scores, top).model_dump_json(exclude_none=True)
            ScoreResponse.model_validate_json(answer)
            return len(request) + len(answer)

        for form, work in (("binary", binary), ("JSON", plain)):
            times = []
            for _ in range(10):
                started = time.perf_counter()
                size = work()
                times.append(time.perf_counter() - started)
            milliseconds = round(1000 * statistics.median(times), 2)
            results[f"{form}, top {top}"] = {"ms": milliseconds, "bytes": size}
    return results


async def latency(url: str) -> dict[str, Any]:
    """p50 and p99 of requests of one short sequence, and their rate, by how many are in flight."""
    async with TeacherClient(Target(url), timeout_s=600) as client:
        asked = pairs(1, SHORT, SHORT // 2)
        results = {}
        for concurrency in CONCURRENCY:
            times: list[float] = []
            left = iter(range(REQUESTS))

            async def ask(left: Any = left, times: list[float] = times) -> None:
                for _ in left:
                    started = time.perf_counter()
                    await client.score(asked)
                    times.append(time.perf_counter() - started)

            started = time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(concurrency)))
            p50, p99 = np.quantile(times, [0.5, 0.99])
            results[str(concurrency)] = {
                "p50_ms": round(1000 * p50, 1),
                "p99_ms": round(1000 * p99, 1),
                "tokens_per_s": round(REQUESTS * SHORT / (time.perf_counter() - started)),
            }
    return results


def paid(metrics: Path) -> dict[str, Any]:
    """Completion tokens that the teacher scored for each that was trained, in a run's record."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if "teacher/scored_tokens" in step and "tokens/trained" in step]
    scored = sum(step["teacher/scored_tokens"] for step in steps)
    trained = sum(step["tokens/trained"] for step in steps)
    return {"steps": len(steps), "scope": round(scored / trained, 3), "scoring everything": 1.0}


async def measure(run: Path | None) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "forms": forms()}
    if run is not None:
        result["scored_per_trained_token"] = paid(run / "metrics.jsonl")
    with tempfile.TemporaryDirectory() as name, socket.socket() as listener:
        make_model(Path(name))
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(Path(name), listener), daemon=True
        )
        server.start()
        try:
            httpx.get(f"{url}/ready", timeout=120).raise_for_status()  # the kernel queues it
            result["latency"] = await latency(url)
            scorer = build_scorer(_config(Path(name)))
            result["tokens_per_s"] = await throughput(scorer, url)
            await scorer.close()
        finally:
            server.terminate()
            server.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, help="A run directory, for what SCOPE paid there.")
    options = parser.parse_args()
    text = json.dumps(asyncio.run(measure(options.run)), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
