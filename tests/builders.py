"""Small real items and models for the tests of every room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.pipeline import PIPELINE
from services.stage import Connection
from services.trajectory import (
    Outcome,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Trajectory,
    Verdict,
    VerifiedGroup,
)
from services.worker import Post

VOCAB = 24
CONTEXT = 256
VLLM_HEAD = 32  # the narrowest attention head that vLLM's CPU kernels take


def tiny_model(
    seed: int = 0,
    *,
    layers: int = 2,
    vocab: int = VOCAB,
    context: int = CONTEXT,
    head: int = 8,
    tied: bool = True,
    spread: float = 0.08,
) -> Qwen3ForCausalLM:
    """A Qwen3 of some thousand random parameters, with grouped-query attention. Their `spread` is
    wider than transformers' own, which is almost uniform: there a mistake would hardly show."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        intermediate_size=48,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=spread,
    )
    return Qwen3ForCausalLM(config).eval()


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Single characters: `<pad>`, `<eos>`, then digits, signs, and the rest of Unicode."""
    characters = ["<pad>", "<eos>", *"0123456789+-=;,abcdefg", *map(chr, range(256, 256 + vocab))]
    ids = {c: i for i, c in enumerate(characters[:vocab])}
    tokenizer = Tokenizer(models.WordLevel(ids, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def save_tiny(path: Path, seed: int = 0, *, vocab: int = VOCAB, **shape: Any) -> Path:
    """A complete Hugging Face directory of `tiny_model`."""
    tiny_model(seed, vocab=vocab, **shape).save_pretrained(path)
    tiny_tokenizer(vocab).save_pretrained(path)
    return path


def post(
    connection: Connection,
    step: str,
    *,
    capacity: int = 16,
    lanes: tuple[str, ...] | None = None,
) -> Post:
    """The place of a worker that is run without Ray."""
    row = PIPELINE[step]
    return Post(connection, row, capacity, row.lanes if lanes is None else lanes, f"{step}-0")


def prompt(order: int = 0, *, n: int = 2, ids: Sequence[int] = (2, 3, 4)) -> Prompt:
    return Prompt(
        id=f"0-{order}",
        order=order,
        token_ids=np.array(ids, np.int32),
        data_source="test",
        reference="5",
        sampling=Sampling(n=n, max_tokens=8, seed=order),
    )


def trajectory(length: int, *, nll: float = 1.0, seed: int = 0, text: str = "5") -> Trajectory:
    tokens = np.random.default_rng(seed).integers(2, VOCAB, length).astype(np.int32)
    return Trajectory(tokens, np.full(length, -nll, np.float32), "stop", text)


def scored_group(
    outcomes: Sequence[Outcome],
    *,
    order: int = 0,
    lengths: Sequence[int] | None = None,
    teacher_nll: Sequence[float] | None = None,
    score: Sequence[Outcome] = ("incorrect",),
    prompt_length: int | None = None,
) -> ScoredGroup:
    """A group with random tokens; the teacher's log-probs are constant along a trajectory."""
    lengths = lengths or [5] * len(outcomes)
    nlls = teacher_nll or [1.0] * len(outcomes)
    asked = prompt(order, n=len(outcomes))
    if prompt_length:
        drawn = np.random.default_rng(order).integers(2, VOCAB, prompt_length)
        asked = replace(asked, token_ids=drawn.astype(np.int32))
    rollout = RolloutGroup(
        asked,
        tuple(trajectory(t, seed=100 * order + i) for i, t in enumerate(lengths)),
        weight_version=0,
    )
    return ScoredGroup(
        VerifiedGroup(rollout, tuple(Verdict(o, "because") for o in outcomes)),
        {
            i: np.full(lengths[i], -nlls[i], np.float32)
            for i, o in enumerate(outcomes)
            if o in score
        },
        "fingerprint",
    )
