"""Small real items and models for the tests of every room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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

VOCAB = 24


def tiny_model(seed: int = 0, *, layers: int = 2, vocab: int = VOCAB) -> Qwen3ForCausalLM:
    """A Qwen3 of some thousand random parameters, with grouped-query attention and tied ends."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # transformers' small initialisation is almost uniform: too easy
        for p in model.parameters():
            p.mul_(4.0) if p.ndim > 1 else p
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Single characters: `<pad>`, `<eos>`, then digits and signs."""
    characters = ["<pad>", "<eos>", *"0123456789+-=;,abcdefg"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def save_tiny(path: Path, seed: int = 0) -> Path:
    """A complete Hugging Face directory."""
    tiny_model(seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


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
) -> ScoredGroup:
    """A group with random tokens; the teacher's log-probs are constant along a trajectory."""
    lengths = lengths or [5] * len(outcomes)
    nlls = teacher_nll or [1.0] * len(outcomes)
    rollout = RolloutGroup(
        prompt(order, n=len(outcomes)),
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
