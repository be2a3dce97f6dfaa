"""A tiny student that vLLM's CPU kernels take: their smallest attention head is 32 wide."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.builders import VOCAB, tiny_tokenizer

CONTEXT = 256


def vllm_model(seed: int = 0, *, tied: bool = True) -> Qwen3ForCausalLM:
    """Random weights, far enough from uniform that every mistake shows in the log-probs."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config).eval()


def save_vllm_model(path: Path, seed: int = 0, *, tied: bool = True) -> Path:
    """A complete Hugging Face directory."""
    vllm_model(seed, tied=tied).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
