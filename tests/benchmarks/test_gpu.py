"""The rows for a GPU, rehearsed on the CPU: the same code at small shapes."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import gpu
from benchmarks.gpu import Shapes, apart, cost, matrix_rate, model_flops, utilisation

SMALL = Shapes(
    device="cpu", vocab=300, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, prompt=8,
    completion=40, scored=60, matrix=64,
)  # fmt: skip


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
    assert (
        sum(
            p.numel()
            for name, p in _qwen2_of_1_5_billion().named_parameters()
            if p.ndim == 2 and "embed" not in name
        )
        == 28 * 46_792_704
    )


def _qwen2_of_1_5_billion() -> Qwen2ForCausalLM:
    with torch.device("meta"):
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=151_936,
                hidden_size=1536,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                intermediate_size=8960,
                tie_word_embeddings=True,
            )
        )


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
    assert counter.get_total_flops() - other_half == model_flops(SMALL, [n], scored=n)


def test_the_parts_run_at_small_shapes() -> None:
    assert matrix_rate(SMALL) > 0
    for contestant in ("ours", "naive"):
        assert cost(contestant, SMALL)[1] > 0
    reached = utilisation(SMALL, 120)  # two completions and what is left of the third
    assert reached.flops / reached.tokens == pytest.approx(
        model_flops(SMALL, [48, 48, 24], scored=40 + 40 + 16) / 120
    )


def test_what_fails_or_dies_is_told_and_leaves_the_others_alone() -> None:
    assert apart(math.sqrt, 4.0) == (2.0, "")
    assert apart(math.sqrt, -1.0) == (None, "ValueError: math domain error")
    nothing, why = apart(os._exit, 3)
    assert nothing is None and why.startswith("BrokenProcessPool: ")


def test_every_row_comes_when_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "apart", lambda part, *_: (None, f"RuntimeError: {part.__name__}"))
    monkeypatch.setattr(gpu, "PACKAGES", {"naive": "", "absent": "no_such_package"})
    made = {row.name: row for row in gpu.rows(replace(SMALL, small_pack=100, large_pack=150))}
    assert [name.removeprefix("gpu: ") for name in made] == [
        "bf16 matrix rate",
        "log-probs, naive, memory",
        "log-probs, naive, time",
        "log-probs, absent, memory",
        "log-probs, absent, time",
        "packed to 100 tokens",
        "packed to 150 tokens",
    ]
    assert all(row.ours is None and "RuntimeError: " in row.note for row in made.values())
    assert made["gpu: log-probs, absent, time"].note == "ours: RuntimeError: cost; not installed"


def test_a_row_has_what_could_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "apart", lambda part, *args: (part(*args), ""))
    share, flops, tokens = gpu.utilisation_rows(SMALL, 100, None)
    assert share.ours is None and share.note == "no matrix rate to compare with"
    assert flops.ours and tokens.ours
    share, flops, _ = gpu.utilisation_rows(SMALL, 100, 2e9)
    assert share.ours and flops.ours and share.ours == pytest.approx(flops.ours * 1e12 / 2e9)
