"""A real `vllm serve` beside a server of ours, both of one teacher: one process for the module."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.errors import BadItem
from services.ports import free_port
from services.trajectory import TokenIds
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import Target
from teacher.config import TeacherConfig
from teacher.openai_client import CompletionsClient, Probe
from teacher.pool import Servers, TeacherPool
from teacher.scorer import build_scorer, model_card
from tests.builders import VLLM_HEAD, save_tiny
from tests.teacher.conftest import Reference
from tests.teacher.fakes import listening
from tests.waiting import DEADLINE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm")]

KEY = "the-key"
CONTEXT = 256
PAIRS: list[tuple[TokenIds, TokenIds]] = [
    (np.arange(2, 2 + p, dtype=np.int32) % 20, np.arange(5, 5 + t, dtype=np.int32) % 20)
    for p, t in [(1, 1), (3, 40), (60, 7), (1, 120)]
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served"), head=VLLM_HEAD, vocab=300)


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of vLLM's own server."""
    port = free_port("127.0.0.1")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", "the-teacher", "--host", "127.0.0.1", "--port", str(port),
        "--api-key", KEY, "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT),
        "--kv-cache-memory-bytes", str(1 << 26), "--block-size", "32", "--enable-prefix-caching",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
    }
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url, process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-3000:]}")


async def test_vllm_serve_scores_as_transformers_does(
    served: tuple[str, subprocess.Popen[bytes]], directory: Path
) -> None:
    async with CompletionsClient(
        Target(served[0], KEY), timeout_s=DEADLINE_S, probe=Probe()
    ) as client:
        await client.check()
        assert client.fingerprint == "name:the-teacher"
        reference = Reference(directory)
        for (prompt, completion), scores in zip(PAIRS, await client.score(PAIRS, 4), strict=True):
            ids = [*prompt.tolist(), *completion.tolist()]
            expected = reference.score(prompt.tolist(), completion.tolist())
            np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
            values, places = reference.table(ids)[len(prompt) - 1 : -1].topk(4)
            np.testing.assert_array_equal(scores.top_ids, places)
            np.testing.assert_allclose(scores.top_logprobs, values, atol=1e-4)
        with pytest.raises(BadItem, match="answered 400"):
            await client.score([(PAIRS[0][0], np.full(CONTEXT, 3, np.int32))])
        with pytest.raises(BadItem, match="answered 400"):
            await client.score([(PAIRS[0][0], np.array([10_000], np.int32))])


async def test_with_prefix_caching_scores_do_not_depend_on_the_order_of_requests(
    served: tuple[str, subprocess.Popen[bytes]], directory: Path
) -> None:
    """Answers of 9 to 50 tokens after a prompt of three whole blocks, which the cache holds."""
    url, prompt = served[0], (np.arange(96, dtype=np.int32) * 7) % 290
    answers = [(np.arange(n, dtype=np.int32) * n) % 290 for n in (9, 20, 35, 50)]
    pairs = [(prompt, answer) for answer in answers]
    http = httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=DEADLINE_S
    )

    def hits() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines
            if line.startswith("vllm:prefix_cache_hits_total")
        )  # fmt: skip

    for _ in range(2):  # what generates fills the cache, and reads it
        body = {"model": "the-teacher", "prompt": prompt.tolist(), "max_tokens": 1}
        http.post("/v1/completions", json=body).raise_for_status()
    assert hits() >= 64
    async with CompletionsClient(Target(url, KEY), timeout_s=DEADLINE_S, probe=Probe()) as client:
        await client.check()
        forth = await client.score(pairs, 2)
        back = (await client.score(pairs[::-1], 2))[::-1]
        alone = [(await client.score([pair], 2))[0] for pair in pairs]
    reference = Reference(directory)
    for index, answer in enumerate(answers):
        expected = reference.score(prompt.tolist(), answer.tolist())
        for scores in (forth[index], back[index], alone[index]):
            np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)


async def test_vllm_serve_killed_under_load_costs_no_request(
    served: tuple[str, subprocess.Popen[bytes]], directory: Path
) -> None:
    config = TeacherConfig.model_validate(
        {"model": str(directory), "engine": {"kind": "transformers", "device": "cpu"}}
    )
    card = model_card(config)
    app = build_app(
        [Teacher(card, build_scorer(config))],
        KeyRing([]),
        max_body_bytes=1 << 20,
        admission=Admission(max_requests=100, max_tokens=100_000),
    )
    reference = Reference(directory)
    expected = [reference.score(p.tolist(), c.tolist()) for p, c in PAIRS]
    with listening(app) as ours:
        asked = [Target(served[0], KEY), Target(ours)]
        async with TeacherPool(
            Servers(asked, timeout_s=DEADLINE_S, fingerprint=card.fingerprint)
        ) as servers:
            stop, answered = asyncio.Event(), 0

            async def load() -> None:
                nonlocal answered
                while not stop.is_set():
                    for scores, wanted in zip(await servers.score(PAIRS), expected, strict=True):
                        np.testing.assert_allclose(scores.logprobs, wanted, atol=1e-4)
                    answered += 1

            loads = [asyncio.create_task(load()) for _ in range(6)]
            await until(lambda: servers.down == 0 and answered > 20)
            os.killpg(served[1].pid, signal.SIGKILL)
            await until(lambda: servers.down == 1)
            before = answered
            await until(lambda: answered > before + 20)
            stop.set()
            await asyncio.gather(*loads)
