"""The packed forward on a GPU, against the CPU's in float32. There is nothing to test elsewhere:
without a GPU no test is collected. `benchmarks/gpu.sh` runs these on a machine with torch alone."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from services import packed

SEQUENCES = [[2 + (i * (j + 3)) % 90 for i in range(n)] for j, n in enumerate((40, 7, 130, 8))]
STARTS = [5, 1, 30, 2]


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def outcome(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs at two temperatures, and the gradient of all parameters in one row."""
    made = packed.prepare(model().to(device=device, dtype=dtype))
    found = packed.token_logprobs(made, packed.pack(SEQUENCES, STARTS).to(device), [1.0, 0.6])
    found[1].mean().backward()
    gradients = [p.grad.float().cpu().flatten() for p in made.parameters() if p.grad is not None]
    return found.detach().cpu(), torch.cat(gradients)


def compare(dtype: torch.dtype, tolerance: float) -> None:
    expected, gradient = outcome("cpu", torch.float32)
    got, theirs = outcome("cuda", dtype)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert float((theirs - gradient).norm() / gradient.norm()) < tolerance


def gradients_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed.CHUNK_BYTES, "cuda", 4 * 100 * 16)
    compare(torch.float32, 1e-3)


if torch.cuda.is_available():

    def test_bucketed_attention_in_float32() -> None:
        compare(torch.float32, 1e-3)

    def test_variable_length_attention_in_bfloat16() -> None:
        compare(torch.bfloat16, 5e-2)

    test_many_chunks = gradients_in_chunks
