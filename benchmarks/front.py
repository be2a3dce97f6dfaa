"""What it costs on Ray Serve that several teachers share one address: the hop through the front.

    python -m benchmarks.front --json benchmarks/results/front-cpu.json

The same model, hardly any work in itself, is asked alone and as one of two. Their rounds alternate;
figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.verifier import machine
from services.trajectory import TokenIds
from teacher.client import Target, TeacherClient
from teacher.config import TeachersConfig
from teacher.serve import deploy_teacher, stop_teacher
from tests.builders import VOCAB, save_tiny

LONG = 4096
ASKED = {"256 tokens": (256, 0), "4,096 tokens": (LONG, 0), "4,096 tokens, top 16": (LONG, 16)}
ROUNDS = 15


def deploy(directory: Path) -> dict[str, str]:
    """The URLs of one model alone, and of the same with another one beside it."""
    models = [str(save_tiny(directory / n, seed, context=LONG)) for seed, n in enumerate("ab")]
    settings = {"engine": {"kind": "transformers", "device": "cpu"}, "resources": {"cpus": 0.2}}
    alone = {"default": {"model": models[0], **settings}}
    several = {**alone, "other": {"model": models[1], **settings}}
    made = {
        name: TeachersConfig.model_validate({"teachers": teachers, "scoring": {"port": 0}})
        for name, teachers in (("alone", alone), ("front", several))
    }
    return {
        name: deploy_teacher(config, [], name=name, route_prefix=f"/{name}")
        for name, config in made.items()
    }


async def measure(urls: dict[str, str]) -> dict[str, Any]:
    """Milliseconds of a request, by its size."""
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(TeacherClient(Target(url), timeout_s=60))
            for name, url in urls.items()
        }
        results = {}
        for label, (length, top) in ASKED.items():
            ids: TokenIds = np.random.default_rng(0).integers(0, VOCAB, length).astype(np.int32)
            times: dict[str, list[float]] = {name: [] for name in clients}
            for number in range(ROUNDS + 1):
                said = []
                for name, client in clients.items():
                    started = time.perf_counter()
                    (scores,) = await client.score([(ids[:1], ids[1:])], top)
                    said.append(scores.logprobs)
                    if number:  # the first warms up
                        times[name].append(time.perf_counter() - started)
                np.testing.assert_array_equal(said[0], said[1])
            medians = {n: round(1000 * statistics.median(spent), 1) for n, spent in times.items()}
            results[label] = medians | {"hop": round(medians["front"] - medians["alone"], 1)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    ray.init("local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        with tempfile.TemporaryDirectory() as directory:
            urls = deploy(Path(directory))
            result["ms"] = asyncio.run(measure(urls))
            for name in urls:
                stop_teacher(name)
    finally:
        ray.shutdown()
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
