"""The packed forward on a GPU, against the CPU's in float32. There is nothing to test elsewhere:
without a GPU no test is collected. `benchmarks/gpu.sh` runs these on a machine with torch alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from services import attention, fused, layouts, output_layer, packed

SEQUENCES = [[2 + (i * (j + 3)) % 90 for i in range(n)] for j, n in enumerate((40, 7, 130, 8))]
STARTS = [5, 1, 30, 2, 30, 30]
SEQUENCES += [[*SEQUENCES[2][:30], *SEQUENCES[0][:n]] for n in (25, 6)]
APART, TOGETHER = None, [[0], [1], [2, 4, 5], [3]]  # by the prompt that some have in common
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Of each, its layout and what it has. All experts are chosen: near ties would fall either way.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("packed", {}),
    "mistral": ("packed", {"sliding_window": 16}),
    "gpt_oss": ("packed", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2}),  # sinks
    "cohere": ("packed", {"logit_scale": 0.25}),
    "gemma2": ("rows", {**WINDOW, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}),
}


def model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    config = CONFIG_MAPPING[family](**SIZES, **MODELS[family][1])
    made: PreTrainedModel = factory.from_config(config)
    return made.eval()


def outcome(
    family: str,
    device: str,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    families: list[list[int]] | None = APART,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs at two temperatures, and the gradient of all parameters in one row."""
    made = packed.prepare(model(family).to(device=device, dtype=dtype))
    assert layouts.proven(made).layout == MODELS[family][0]
    batch = packed.pack(SEQUENCES, STARTS, families=families).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = packed.token_logprobs(made, batch, [1.0, 0.6])
    found[1].mean().backward()
    gradients = [p.grad.float().cpu().flatten() for p in made.parameters() if p.grad is not None]
    return found.detach().cpu(), torch.cat(gradients)


def compare(family: str, dtype: torch.dtype, tolerance: float, *, autocast: bool = False) -> None:
    expected, gradient = outcome(family, "cpu", torch.float32)
    got, theirs = outcome(family, "cuda", dtype, autocast=autocast)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert float((theirs - gradient).norm() / gradient.norm()) < tolerance


def shared_prompts() -> None:
    """By the kernel, behind one copy of the prompt; on the CPU each answer has its own."""
    assert attention.takes_prefixes(torch.device("cuda", 0), torch.bfloat16)
    assert layouts.proven(packed.prepare(model("qwen2").to("cuda"))).shares  # in float32
    expected, gradient = outcome("qwen2", "cpu", torch.float32)
    got, theirs = outcome("qwen2", "cuda", torch.bfloat16, families=TOGETHER)
    torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)
    assert float((theirs - gradient).norm() / gradient.norm()) < 5e-2


def gradients_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(output_layer.CHUNK_BYTES, "cuda", 4 * 100 * 16)
    compare("qwen2", torch.float32, 1e-3)


def kernels_against_plain_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device, in one precision: what differs is the kernels alone."""
    assert fused.kernels(torch.zeros(1, device="cuda")), "no Triton"
    got, gradient = outcome("qwen2", "cuda", torch.float32)
    monkeypatch.setattr(output_layer, "_kernels", lambda _: None)
    with fused.plainly():
        expected, plain = outcome("qwen2", "cuda", torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert float((gradient - plain).norm() / plain.norm()) < 1e-4


if torch.cuda.is_available():

    @pytest.mark.parametrize("family", MODELS)
    def test_bucketed_attention_in_float32(family: str) -> None:
        compare(family, torch.float32, 1e-3)

    @pytest.mark.parametrize("family", MODELS)
    def test_variable_length_attention_in_bfloat16(family: str) -> None:
        compare(family, torch.bfloat16, 5e-2)

    @pytest.mark.parametrize("family", MODELS)
    def test_float32_masters_with_autocast(family: str) -> None:
        compare(family, torch.float32, 5e-2, autocast=True)

    test_shared_prompts = shared_prompts
    test_many_chunks = gradients_in_chunks
    test_kernels = kernels_against_plain_modules
