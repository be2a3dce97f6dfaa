"""Avg@8 and Pass@8 of a model on the held-out prompts, by the rule of the `exact` verifier.

python -m examples.arithmetic.measure examples/arithmetic/student [more folders]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.arithmetic.task import (
    HELD_OUT_PROMPTS,
    Problem,
    build_tokenizer,
    held_out_problems,
)

SAMPLES = 8
MAX_NEW_TOKENS = 40
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of `SAMPLES` completions per prompt: the mean that is right, and the share with one right."""

    average: float
    passed: float


def is_correct(completion: str, answer: str) -> bool:
    return completion.rpartition(";")[2] == answer


def ended_text(tokens: Tensor, tokenizer: PreTrainedTokenizerFast) -> str:
    """What a completion says; nothing if it never ended: training counts that as wrong too."""
    if not tokens.eq(tokenizer.eos_token_id).any():
        return ""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[str]:
    """`SAMPLES` completions of each prompt, sampled at temperature 1 from the whole vocabulary."""
    encoded = tokenizer(list(prompts), padding=True, return_tensors="pt")
    sampling = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        # transformers types `generate` for a protocol that its own model classes do not meet.
        generated = model.generate(**encoded, generation_config=sampling)  # type: ignore[misc]
    sequences = cast(Tensor, generated)
    return [ended_text(row, tokenizer) for row in sequences[:, encoded["input_ids"].shape[1] :]]


def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> Accuracy:
    verdicts: list[bool] = []
    for start in range(0, len(problems), PROMPTS_AT_ONCE):
        some = problems[start : start + PROMPTS_AT_ONCE]
        texts = complete(model, tokenizer, [problem.prompt for problem in some])
        answers = [problem.answer for problem in some for _ in range(SAMPLES)]
        verdicts += map(is_correct, texts, answers)
    correct = torch.tensor(verdicts, dtype=torch.float32).view(len(problems), SAMPLES)
    return Accuracy(correct.mean().item(), correct.amax(dim=1).mean().item())


def measure(folder: Path, prompts: int = HELD_OUT_PROMPTS, seed: int = 0) -> Accuracy:
    """The accuracy of a saved model on the first so many held-out prompts."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return accuracy(model, build_tokenizer(), held_out_problems()[:prompts])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measured = measure(Path(name))
        print(f"{name}: Avg@{SAMPLES} {measured.average:.1%}, Pass@{SAMPLES} {measured.passed:.1%}")
