"""Trains the study's student and teacher and saves them as Hugging Face folders.

    python -m examples.arithmetic.make_study_models        about 10 minutes of one core

Both begin as one network that reads a book in a fair hand: all three ways, some slips, half of them
mended. Slips are read, never copied (their tokens have no label). Then the teacher reads on in a
book where most slips are mended. The student reads a short careless one and copies the slips too.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.arithmetic.make_models import IGNORED, Lesson, Recipe, learning_rate, new_model, save
from examples.arithmetic.task import EOS, build_tokenizer
from examples.arithmetic.ways import Hand, Page, book


@dataclass(frozen=True, slots=True)
class Reading:
    """A lesson from a book in one hand."""

    lesson: Lesson
    hand: Hand
    seed: int
    copies_slips: bool = False


BOTH = Reading(Lesson(1000, peak_lr=3e-3), Hand(slip_rate=0.1, look_rate=0.5), seed=2200)
READINGS = {
    "study-teacher": Reading(
        Lesson(250, peak_lr=1.5e-3, batch_size=96), Hand(slip_rate=0.25, look_rate=0.8), seed=2500
    ),
    "study-student": Reading(
        Lesson(50, peak_lr=1e-3), Hand(slip_rate=0.6, look_rate=0.1), seed=2300, copies_slips=True
    ),
}


def page_batch(
    pages: Iterator[Page], reading: Reading, tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded on the right; prompts, and slips that are not to be copied,
    have no labels."""
    some = list(itertools.islice(pages, reading.lesson.batch_size))
    texts = [page.problem.prompt + page.solution + EOS for page in some]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    for row, page in enumerate(some):
        start = len(page.problem.prompt)
        labels[row, :start] = IGNORED
        for first, last in [] if reading.copies_slips else page.slips:
            labels[row, start + first : start + last] = IGNORED
    labels[ids == tokenizer.pad_token_id] = IGNORED
    return ids, labels


def read(model: Qwen3ForCausalLM, reading: Reading, tokenizer: PreTrainedTokenizerFast) -> None:
    pages = book(reading.seed, reading.hand)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(reading.lesson.batches):
        ids, labels = page_batch(pages, reading, tokenizer)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(reading.lesson, step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"  batch {step + 1}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(22)
    common = new_model(Recipe(hidden=96, layers=3, seed=22, lessons=()), tokenizer)
    print("both")
    read(common, BOTH, tokenizer)
    for name in sys.argv[1:] or READINGS:
        print(name)
        model = new_model(Recipe(hidden=96, layers=3, seed=22, lessons=()), tokenizer)
        model.load_state_dict(common.state_dict())
        read(model, READINGS[name], tokenizer)
        save(model, tokenizer, name)


if __name__ == "__main__":
    main()
