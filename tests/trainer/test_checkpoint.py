from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.packed import prepare
from tests.builders import scored_group, tiny_model, tiny_tokenizer
from trainer import checkpoint
from trainer.batch import Batch
from trainer.checkpoint import Progress
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Learner


def write(directory: Path, step: int, keep_last: int = 2) -> Path:
    return checkpoint.save(
        directory,
        tiny_model(step),
        tiny_tokenizer(),
        {"step": step},
        Progress(step=step, entries=[f"{step}-0"], covered=[(0, 4 * step), (50, 51)]),
        keep_last=keep_last,
    )


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.progress == Progress(step=3, entries=["3-0"], covered=[(0, 12), (50, 51)])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000002", "step-000003"]


@pytest.mark.parametrize("victim", ["trainer.pt", "state.json", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_torn_one_falls_back_to_the_one_before(
    tmp_path: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / victim
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.progress.step == 1
    assert "step-000002 cannot be used" in caplog.text


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_exactly_the_orders(orders: set[int]) -> None:
    made = checkpoint.ranges(orders)
    assert list(Progress(0, [], made).orders) == sorted(orders)
    assert all(a[1] < b[0] for a, b in pairwise(made))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / ".step-000001.tmp").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_an_export_loads_in_transformers(tmp_path: Path) -> None:
    model = prepare(tiny_model())
    checkpoint.export(tmp_path, model, tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert loaded(torch.tensor([[2, 3]])).logits.shape == (1, 2, 24)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([2, 3]) == "01"


def test_training_continues_bit_for_bit(tmp_path: Path) -> None:
    config = TrainerConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine"))
    batches = [
        Batch.of([scored_group(["correct", "correct", "incorrect"], order=i)]) for i in range(4)
    ]

    def learner(model: torch.nn.Module) -> Learner:
        return Learner(model, config, temperature=1.0, total_steps=4)  # type: ignore[arg-type]

    straight = learner(tiny_model())
    expected = [straight.step(b)["loss/mle"] for b in batches]
    first = learner(tiny_model())
    got = [first.step(b)["loss/mle"] for b in batches[:2]]
    checkpoint.save(
        tmp_path,
        first.model,
        tiny_tokenizer(),
        first.state_dict(),
        Progress(2, [], []),
        keep_last=1,
    )
    found = checkpoint.latest(tmp_path)
    assert found is not None
    second = learner(AutoModelForCausalLM.from_pretrained(found.model))
    second.load_state_dict(found.trainer())
    got += [second.step(b)["loss/mle"] for b in batches[2:]]
    assert got == expected
    for a, b in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)
