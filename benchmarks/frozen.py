"""One frozen batch of rollouts, for every contestant of `benchmarks.learner` the same, and the
random models that it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Models:
    """A student, a teacher that differs from it, and their tokenizer; each call makes new ones."""

    student: Callable[[], PreTrainedModel]
    teacher: Callable[[], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerBase]


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


def random_groups(lengths: Lengths) -> list[ScoredGroup]:
    """Groups of random tokens, under the random models."""
    random = np.random.default_rng(1)
    drawn = [
        (
            random.integers(2, VOCAB, random.integers(*lengths.prompt)).astype(np.int32),
            [random.integers(2, VOCAB, size).astype(np.int32) for size in sizes],
        )
        for sizes in lengths.draw()
    ]
    return as_groups(TINY, drawn, longest=lengths.longest)


def as_groups(
    models: Models, drawn: Sequence[tuple[Tokens, Sequence[Tokens]]], *, longest: int
) -> list[ScoredGroup]:
    """Groups of prompts with their completions, and the true log-probs of both models; half of the
    completions are correct.

    Args:
        longest: that a completion may be, in tokens.
    """
    behaviour, scores = (_logprobs(make(), drawn) for make in (models.student, models.teacher))
    groups = []
    for order, (prompt, completions) in enumerate(drawn):
        rollout = RolloutGroup(
            Prompt(str(order), order, prompt, "", "", Sampling(len(completions), longest)),
            tuple(
                Trajectory(ids, lp, "stop", "")
                for ids, lp in zip(completions, behaviour[order], strict=True)
            ),
            weight_version=0,
        )
        verdicts = tuple(
            Verdict("correct" if index % 2 else "incorrect", "")
            for index in range(len(completions))
        )
        verified = VerifiedGroup(rollout, verdicts)
        groups.append(ScoredGroup(verified, dict(enumerate(scores[order])), "t"))
    return groups


@torch.no_grad()
def _logprobs(
    model: PreTrainedModel, drawn: Sequence[tuple[Tokens, Sequence[Tokens]]]
) -> list[list[npt.NDArray[np.float32]]]:
    """Of each prompt's completions."""
    prepared, made = prepare(model), []
    for prompt, completions in drawn:
        packed = pack(
            [np.concatenate([prompt, ids]) for ids in completions],
            [len(prompt)] * len(completions),
        )
        flat = token_logprobs(prepared, packed, [1.0])[0].numpy()
        made.append(np.split(flat, np.cumsum([len(ids) for ids in completions])[:-1]))
    return made


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


TINY = Models(partial(make_model, 0), partial(make_model, 1), make_tokenizer)
