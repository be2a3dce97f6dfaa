"""One frozen batch of rollouts, for every contestant of `benchmarks.learner` the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.packed import pack, prepare, token_logprobs
from services.trajectory import (
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Trajectory,
    Verdict,
    VerifiedGroup,
)

VOCAB = 4096
PAD, EOS = 0, 1


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and completions are. A log-normal cut at `longest`, as rollouts of
    reasoning models are: most are short, some run into the limit. `sigma` 0: all the same."""

    groups: int = 8
    n: int = 8
    prompt: tuple[int, int] = (16, 33)
    median: int = 64
    sigma: float = 0.9
    longest: int = 384

    def draw(self, seed: int = 0) -> list[list[int]]:
        """Completion lengths, one list a group."""
        random = np.random.default_rng(seed)
        drawn = self.median * np.exp(self.sigma * random.standard_normal((self.groups, self.n)))
        return np.clip(drawn, 4, self.longest).astype(int).tolist()


def make_model(seed: int, *, hidden: int = 256, layers: int = 4) -> Qwen3ForCausalLM:
    """A random Qwen3. Its output matrix is a seventh of its weights, as in Qwen2 1.5B, so that
    neither the layers nor the vocabulary are given more room than they have in earnest."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=hidden // 8, intermediate_size=6 * hidden,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=EOS,
        pad_token_id=PAD, attention_dropout=0.0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def make_groups(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, lengths: Lengths
) -> list[ScoredGroup]:
    """Groups of random tokens with the true log-probs of both models; half are correct."""
    random = np.random.default_rng(1)
    groups = []
    for order, sizes in enumerate(lengths.draw()):
        prompt = random.integers(2, VOCAB, random.integers(*lengths.prompt)).astype(np.int32)
        completions = [random.integers(2, VOCAB, size).astype(np.int32) for size in sizes]
        behaviour = _logprobs(student, prompt, completions)
        scores = _logprobs(teacher, prompt, completions)
        rollout = RolloutGroup(
            Prompt(str(order), order, prompt, "", "", Sampling(lengths.n, lengths.longest)),
            tuple(
                Trajectory(ids, lp, "stop", "")
                for ids, lp in zip(completions, behaviour, strict=True)
            ),
            weight_version=0,
        )
        verdicts = tuple(
            Verdict("correct" if index % 2 else "incorrect", "") for index in range(lengths.n)
        )
        groups.append(ScoredGroup(VerifiedGroup(rollout, verdicts), dict(enumerate(scores)), "t"))
    return groups


@torch.no_grad()
def _logprobs(
    model: Qwen3ForCausalLM, prompt: np.ndarray, completions: list[np.ndarray]
) -> list[np.ndarray]:
    packed = pack(
        [[*prompt.tolist(), *ids.tolist()] for ids in completions], [len(prompt)] * len(completions)
    )
    flat = token_logprobs(prepare(model), packed, [1.0])[0].numpy()
    return np.split(flat, np.cumsum([len(ids) for ids in completions])[:-1])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, `2` to `4095`. The special ones have names of their own: a special token
    is found inside of words as well."""
    words = {"<pad>": PAD, "<eos>": EOS} | {str(i): i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast
