"""Trains the demo's models from nothing and saves them as Hugging Face folders.

    python -m examples.arithmetic.make_models [student] [teacher] [reader]

Both learn from worked solutions of random problems, none of them held out. The teacher's book has
no mistakes. The student learns the same arithmetic and then reads a short careless book, in which
half of the steps are off by one or by ten: it knows how to add and has a bad habit. A habit is what
some dozens of steps of distillation can mend; docs/demo-task.md says why lacking knowledge is not.
The reader is that student, who then learned to write down a solution that it is shown, and kept its
habit where it is shown none: it can be its own teacher (docs/teacher.md).

Weights are stored in bfloat16 to keep the repository small; the accuracies in the README are those
of the stored weights, loaded as float32.
"""

import itertools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.arithmetic.measure import MAX_NEW_TOKENS, measure
from examples.arithmetic.task import (
    EOS,
    HERE,
    Problem,
    build_tokenizer,
    held_out_problems,
    random_problems,
)
from services.models import load_model

SLIPS = (-10, -1, 1, 10)
IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Lesson:
    """Some batches from one schoolbook, with a warm-up and then half a cosine to zero. A share of
    `shown` of the problems stands after its right solution."""

    batches: int
    peak_lr: float
    slip_rate: float = 0.0
    shown: float = 0.0
    batch_size: int = 48
    warmup: int = 50


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model's size and its lessons. One with an `origin` goes on from that model."""

    hidden: int
    layers: int
    seed: int
    lessons: tuple[Lesson, ...]
    origin: str = ""


RECIPES = {
    "student": Recipe(
        hidden=96,
        layers=3,
        seed=11,
        lessons=(Lesson(2400, peak_lr=3e-3), Lesson(150, peak_lr=1e-3, slip_rate=0.5)),
    ),
    "teacher": Recipe(
        hidden=128,
        layers=4,
        seed=12,
        lessons=(Lesson(1200, peak_lr=2e-3, batch_size=128),),
    ),
    "reader": Recipe(
        hidden=96,
        layers=3,
        seed=13,
        lessons=(Lesson(600, peak_lr=1e-3, slip_rate=0.5, shown=0.5),),
        origin="student",
    ),
}


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=4 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]


def schoolbook(seed: int, slip_rate: float) -> Iterator[tuple[Problem, str]]:
    """An endless book of problems and worked solutions, none of the problems held out.

    At `slip_rate` a step's result is off by one or by ten, and the rest goes on from the wrong
    value, as a person who forgot a carry would.
    """
    rng = random.Random(seed)
    for problem in random_problems(seed, frozenset(held_out_problems())):
        slips = [rng.choice(SLIPS) if rng.random() < slip_rate else 0 for _ in problem.steps]
        solution = problem.solution_with((slips[0], slips[1]))
        yield problem, solution or problem.solution


def shown(problem: Problem) -> str:
    """The prompt after the right solution."""
    return f"{problem.solution},{problem.prompt}"


def worked(seed: int, lesson: Lesson) -> Iterator[tuple[str, str]]:
    """What is read, and the completion that follows it."""
    rng = random.Random(seed)
    for problem, solution in schoolbook(seed, lesson.slip_rate):
        if rng.random() < lesson.shown:
            yield shown(problem), problem.solution
        else:
            yield problem.prompt, solution


def worked_batch(
    book: Iterator[tuple[str, str]], size: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded on the right; only the completion has labels."""
    some = list(itertools.islice(book, size))
    texts = [read + completion + EOS for read, completion in some]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    for row, (read, _) in enumerate(some):
        labels[row, : len(read)] = IGNORED
    labels[ids == tokenizer.pad_token_id] = IGNORED
    return ids, labels


def learning_rate(lesson: Lesson, step: int) -> float:
    warm = min(1.0, (step + 1) / lesson.warmup)
    return lesson.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * step / lesson.batches))


def teach(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lesson: Lesson, seed: int
) -> None:
    """Plain supervised learning: cross entropy on the completions of one schoolbook."""
    book = worked(seed, lesson)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(lesson.batches):
        ids, labels = worked_batch(book, lesson.batch_size, tokenizer)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lesson, step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  batch {step + 1}: loss {loss.item():.4f}", flush=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    generation = model.generation_config
    generation.do_sample = True
    generation.max_new_tokens = MAX_NEW_TOKENS
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)


def make(name: str) -> None:
    recipe = RECIPES[name]
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = load_model(str(HERE / recipe.origin)) if recipe.origin else new_model(recipe, tokenizer)
    for number, lesson in enumerate(recipe.lessons):
        print(f"{name}: lesson {number + 1} of {len(recipe.lessons)}")
        teach(model, tokenizer, lesson, seed=recipe.seed + 100 * number)
    save(model, tokenizer, name)
    measured = measure(HERE / name)
    print(f"{name}: held out Avg@8 {measured.average:.1%}, Pass@8 {measured.passed:.1%}")


def main() -> None:
    for name in sys.argv[1:] or RECIPES:
        make(name)


if __name__ == "__main__":
    main()
