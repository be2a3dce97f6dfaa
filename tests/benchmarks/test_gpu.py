"""The figures of a GPU, rehearsed on the CPU: the same script at small shapes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu import Figure, Part, apart, parts, take
from benchmarks.gpu_parts import (
    CONTESTANTS,
    PACKAGES,
    REGIMES,
    TINY,
    Shapes,
    answers_that_fill,
    model_flops,
    random_model,
)

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "vllm", "redis")


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of one without what the service runs on."""
    missing = tmp_path / "missing"
    missing.mkdir()
    for name in ABSENT:
        (missing / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    return {
        **os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(missing),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_one_command_takes_every_row_once(tmp_path: Path, bare_machine: dict[str, str]) -> None:
    command = ["sh", str(ROOT / "benchmarks/gpu.sh"), str(tmp_path)]
    first = subprocess.run(command, env=bare_machine, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    file = tmp_path / "gpu-cpu.json"
    lines = file.read_text().splitlines()
    rows = {row["name"]: row for row in map(json.loads, lines)}
    assert [*rows] == [name for part in parts(TINY) for name in part.rows]
    assert len(rows) == len(lines)
    absent = {part for part, package in PACKAGES.items() if not find_spec(package)}
    assert {name for name, row in rows.items() if row["ours"] is None} == {
        f"gpu: log-probs, {part}, {what}" for part in absent for what in ("memory", "time")
    }
    assert rows["gpu: log-probs, naive, time"]["peer"] > 0

    cut = lines[:-2]  # its writer was killed before the last two
    file.write_text("\n".join([*cut, lines[-2][:40]]))
    subprocess.run(command, env=bare_machine, capture_output=True, check=True)
    again = file.read_text().splitlines()
    assert again[:-2] == cut
    assert [json.loads(row)["name"] for row in again] == [*rows]

    second = subprocess.run(command, env=bare_machine, capture_output=True, text=True, check=True)
    assert second.stdout == "" and file.read_text().splitlines() == again


def test_the_most_valuable_rows_come_first() -> None:
    names = [part.name for part in parts(Shapes())]
    assert names == [
        "tests",
        "bf16 matrix rate",
        *(f"{regime}, packed to {n} tokens" for n in ("16,384", "32,768") for regime in REGIMES),
        *(f"log-probs, {name}" for name in CONTESTANTS),
        "weights off the device",
        "sampling with transformers",
        "scoring with transformers",
        "a small model's whole loop",
    ]


def test_answers_fill_a_pack() -> None:
    assert answers_that_fill(Shapes(), 16_384) == [12_288, 3_840]
    assert answers_that_fill(Shapes(), 32_768) == [12_288, 12_288, 7_808]
    assert answers_that_fill(TINY, 96) == [40, 40]


def test_qwen2_of_1_5_billion_by_hand() -> None:
    """One completion of 12,288 tokens behind a prompt of 128.

    A layer's weights: q and o 2 · 1536 · 1536 = 4,718,592; k and v, of 2 heads of 128,
    2 · 1536 · 256 = 786,432; gate, up and down 3 · 1536 · 8960 = 41,287,680; together
    46,792,704, and 28 of them 1,310,195,712. Six operations a weight and token, 12,416 tokens:
    97,604,339,761,152. The output layer has 151,936 · 1536 = 233,373,696 weights and sees the
    12,288 scored tokens: 17,206,175,858,688. Attention, 12 · layers · width a pair of tokens, half
    of all pairs: 6 · 28 · 1536 · 12,416² = 39,779,919,986,688.
    """
    expected = 97_604_339_761_152 + 17_206_175_858_688 + 39_779_919_986_688
    assert model_flops(Shapes(), [12_416], scored=12_288) == expected == 154_590_435_606_528
    model = random_model(Shapes(device="meta"), "bfloat16")
    layers = (p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    assert sum(p.numel() for p in layers) == 28 * 46_792_704
    assert model.num_parameters() == 1_777_088_000  # as its model card's files have


def test_as_many_operations_as_torch_counts() -> None:
    """torch counts those of transformers' own forward and backward, which computes all pairs of
    tokens where ours counts the causal half."""
    n = 50
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 300, (1, n))).logits.sum().backward()
    other_half = 6 * 2 * 64 * n * n
    assert counter.get_total_flops() - other_half == model_flops(TINY, [n], scored=n)


def test_what_fails_or_dies_or_hangs_is_told_and_leaves_the_others_alone() -> None:
    assert apart(math.sqrt, 4.0, limit_s=600) == (2.0, "")
    assert apart(math.sqrt, -1.0, limit_s=600) == (None, "ValueError: math domain error")
    nothing, why = apart(os._exit, 3, limit_s=600)
    assert nothing is None and why == "the process died with exit code 3"
    with pytest.raises(TimeoutError):
        apart(time.sleep, 1e6, limit_s=0.5)


def test_what_has_no_figure_says_why_and_what_had_no_time_is_left(tmp_path: Path) -> None:
    def part(name: str, limit_s: float) -> Part:
        return Part(name, [Figure("time", "s")], math.sqrt, limit_s=limit_s)  # type: ignore[arg-type]

    file, usual = tmp_path / "gpu.json", Shapes()
    todo = [part("broken", 600), part("slow", 0)]
    assert [one.partition(":")[0] for one in take(usual, iter(todo), file, minutes=60)] == [
        "broken",
        "slow",
    ]
    notes = {row["name"]: row["note"] for row in map(json.loads, file.read_text().splitlines())}
    assert notes["gpu: broken, time"].startswith("TypeError: ")
    assert notes["gpu: slow, time"] == "killed after 0 s"
    assert take(usual, iter([*todo, part("late", 600)]), file, minutes=0) == [
        "no time was left for late"
    ]
    assert len(file.read_text().splitlines()) == 2
