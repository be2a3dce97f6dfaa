"""Where kernels take the place of a model's own functions, and that the model stays the same. The
kernels themselves are in tests/gpu_emulation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, Qwen3Config

from benchmarks.families import tiny
from services import fused, packed

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
}  # fmt: skip


def model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def replaced(made: Any) -> Counter[str]:
    modules = (m for m in made.modules() if hasattr(m, "scope_own_forward"))
    return Counter(type(m).__name__ for m in modules)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Kernels that run on a CPU, written plainly, and how often each was called."""
    calls: Counter[str] = Counter()

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls["norm"] += 1
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def silu_product(a: Tensor, b: Tensor) -> Tensor:
        calls["product"] += 1
        return torch.nn.functional.silu(a) * b

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        calls["rotation"] += 1
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    plain = SimpleNamespace(rms_norm=rms_norm, silu_product=silu_product, rotate=rotate)
    monkeypatch.setattr(fused, "kernels", lambda x: None if fused._plain else plain)
    yield calls


def test_a_model_computes_the_same_with_kernels_in_every_place(seen: Counter[str]) -> None:
    made, own = model(Qwen3Config(**SMALL)), model(Qwen3Config(**SMALL))
    fused.fuse(made)
    assert replaced(made) == {"Qwen3RMSNorm": 9, "Qwen3MLP": 2}
    ids = torch.arange(7)[None]
    with fused.plainly():
        expected = own(ids).logits
    torch.testing.assert_close(made(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert seen == {"norm": 9, "product": 2, "rotation": 4}
    # The reference of the proof at load is the model without them.
    seen.clear()
    with fused.plainly():
        assert torch.equal(made(ids).logits, expected)
    assert not seen


def test_a_kernel_that_is_wrong_is_found_out_at_load(
    seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(**vars(fused.kernels(torch.ones(1))))
    wrong.silu_product = lambda a, b: torch.nn.functional.gelu(a) * b
    monkeypatch.setattr(fused, "kernels", lambda x: None if fused._plain else wrong)
    with pytest.raises(ValueError, match="no layout gives what each sequence gives by itself"):
        packed.prepare(model(LlamaConfig(**SMALL)))


def test_what_computes_something_else_is_left_alone() -> None:
    gemma = model(Gemma2Config(**SMALL, hidden_activation="gelu_pytorch_tanh"))
    assert not replaced(fused.fuse(gemma))  # norms of 1 + weight, and another activation
    with torch.no_grad():
        for parameter in gemma.parameters():
            parameter.fill_(1.0)
    assert not replaced(fused.fuse(gemma))
    gpt = model(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))
    assert replaced(fused.fuse(gpt)) == {
        "GptOssRMSNorm": 5
    }  # its halves turn without being laid out
    family = sys.modules[type(gpt).__module__]
    assert not hasattr(family.apply_rotary_pos_emb, "scope_own_forward")  # type: ignore[attr-defined]


def test_a_family_that_rotates_queries_alone_stays_the_same(seen: Counter[str]) -> None:
    made, ids = tiny("qwen4_exp_text"), torch.arange(5, 17)[None]
    with torch.no_grad():
        before = made(input_ids=ids, use_cache=False).logits
        fused.fuse(made)
        after = made(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
