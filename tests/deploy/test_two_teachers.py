"""One run in which rows of two data sources are scored by two models, one of which reads more than
the student, on real Ray, Serve and Redis, as a user starts it. Its objective asks for all that a
teacher tells: log-probs of the student's most likely tokens, and the entropy."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import redis
import torch
import yaml

from services.models import fingerprint, load_model, load_tokenizer
from services.trajectory import ScoredGroup, TokenIds, decode
from tests.deploy.conftest import ROOT, SCOPE, scope, short_run
from tests.waiting import DEADLINE_S

MODELS = {name: ROOT / f"examples/arithmetic/{name}" for name in ("teacher", "student")}
ROUTES = {"arithmetic": "default", "chains": "other"}
GROUPS = 8


def rows(file: Path) -> Path:
    """Some of the demo's prompts: of two data sources, and one that names its teacher."""
    table = pq.read_table(ROOT / "examples/arithmetic/train.parquet").to_pylist()[: 2 * GROUPS]
    made = []
    for number, row in enumerate(table):
        source = "chains" if number % 2 else "arithmetic"
        extra = {"teacher": "other"} if number == 0 else {}
        made.append({**row, "data_source": source, "extra_info": {"index": number, **extra}})
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def start(directory: Path) -> subprocess.Popen[str]:
    other = {
        "model": str(MODELS["student"]), "engine": {"kind": "transformers"},
        "resources": {"cpus": 0.5}, "data_sources": ["chains"], "context": "{reference};{prompt}",
    }  # fmt: skip
    return subprocess.Popen(
        [
            SCOPE, *short_run(directory), "trainer.max_steps=2", "evaluation=null",
            "trainer.objective.kind=eopd", "trainer.objective.top_k=4",
            "trainer.objective.top_k_of=student", "trainer.checkpoint.every_steps=100",
            f"data.path={rows(directory / 'rows.jsonl')}", "data.shuffle=false",
            f"teachers.other={yaml.safe_dump(other, default_flow_style=True)}",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def collect(
    run: subprocess.Popen[str], directory: Path, count: int = 2 * GROUPS
) -> dict[int, ScoredGroup]:
    """Every scored group by its order: the learner takes none out of the stream before its
    checkpoint, which is at the end."""
    address, client = directory / "demo/redis/url", None
    found: dict[int, ScoredGroup] = {}
    while run.poll() is None and len(found) < count:
        if client is None and address.exists():
            client = redis.Redis.from_url(address.read_text())
        if client is not None:
            entries: Any = client.xrange("scope:{demo}:scored")
            groups = [decode(ScoredGroup, fields[b"item"]) for _, fields in entries]
            found |= {group.prompt.order: group for group in groups}
        time.sleep(0.05)
    return found


@torch.no_grad()
def logprobs(model: Any, prompt: TokenIds, completion: TokenIds) -> torch.Tensor:
    """[L, V] of the whole vocabulary in each place of the completion."""
    ids = torch.tensor([*prompt.tolist(), *completion.tolist()])
    table: torch.Tensor = model(ids[None]).logits[0].float().log_softmax(-1)
    return table[len(prompt) - 1 : -1]


@pytest.mark.slow
def test_rows_of_two_data_sources_are_scored_by_two_teachers(tmp_path: Path) -> None:
    run = start(tmp_path)
    found = collect(run, tmp_path)
    output, _ = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0, output
    assert "teacher other: loading" in output
    assert sorted(found) == list(range(2 * GROUPS))
    models = {"default": MODELS["teacher"], "other": MODELS["student"]}
    loaded = {name: load_model(str(path)) for name, path in models.items()}
    tokenizer = load_tokenizer(str(MODELS["teacher"]))
    asked = [
        json.loads(line)["prompt"][0]["content"]
        for line in (tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    prints = {name: fingerprint(str(path)).model for name, path in models.items()}
    for order, group in found.items():
        name = "other" if order == 0 else ROUTES[group.prompt.data_source]
        assert (group.prompt.teacher, group.teacher) == (name, prints[name])
        assert len(group.teacher_logprobs) == len(group.rollout.trajectories)
        shown = tokenizer.decode(group.prompt.token_ids.tolist())
        assert shown == asked[order]  # and no more
        read = f"{group.prompt.reference};{shown}" if name == "other" else shown
        before = np.array(tokenizer(read)["input_ids"], np.int32)
        for index, scores in group.teacher_logprobs.items():
            sampled, top = group.rollout.trajectories[index], group.teacher_top[index]
            assert sampled.top is not None and sampled.top.shape == (len(scores), 4)
            np.testing.assert_array_equal(top.ids, sampled.top)
            table = logprobs(loaded[name], before, sampled.token_ids)
            chosen = table.gather(1, torch.tensor(sampled.token_ids)[:, None].long())[:, 0]
            named = table.gather(1, torch.tensor(top.ids).long())
            spread = -(table.exp() * table).sum(1)
            np.testing.assert_allclose(scores, chosen, atol=1e-4)
            np.testing.assert_allclose(top.logprobs, named, atol=1e-4)
            np.testing.assert_allclose(group.teacher_entropy[index], spread, atol=1e-4)
    status = json.loads(scope("status", tmp_path / "demo", "--json").stdout)
    assert (status["trained"], status["dead"], status["in_flight"]) == (2 * GROUPS, 0, 0)
