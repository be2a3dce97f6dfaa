"""The short form of the example with a real language model: two steps of `make smollm`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm import fetch
from examples.smollm.measure import Tally
from services.metrics import read
from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]
STEPS, GROUPS, SAMPLES, STORIES = 2, 2, 3, 2


@pytest.mark.slow
def test_two_steps_train_a_real_model_and_lose_no_story(tmp_path: Path) -> None:
    """Fetched, converted, measured, distilled by `scope run`, exported and measured again."""
    run = tmp_path / "short"
    command = [
        sys.executable, "-m", "examples.smollm.distil", "--run-dir", run, "--stories", STORIES,
        f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}", f"sampling.n={SAMPLES}",
        "trainer.checkpoint.every_steps=100", "ray.dashboard=false",
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
        timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    ledger = json.loads((run / "ledger.json").read_text())
    records = read(run)
    assert ledger["fed"] == ledger["trained"] == STEPS * GROUPS and ledger["dead"] == 0
    assert [record["tokens/trained"] > 0 for record in records] == [True] * STEPS
    assert all(record["reward/accuracy"] < 1 for record in records)
    assert "| after |" in done.stdout and "Avg@8 rose by" in done.stdout
    for name in ("before", "before-cool", "with-solution", "after", "after-cool"):
        kept = json.loads((tmp_path / "short-measured" / f"{name}-{STORIES}.json").read_text())
        assert [Tally(**fields).samples for fields in kept] == [8] * STORIES

    model, trained = (
        AutoModelForCausalLM.from_pretrained(p) for p in (fetch.MODEL, run / "export")
    )
    moved = {
        name for (name, before), after in
        zip(model.state_dict().items(), trained.state_dict().values(), strict=True)
        if not torch.equal(before, after)
    }  # fmt: skip
    assert moved == set(model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(fetch.MODEL).chat_template
