"""Trains the study's student and teacher and saves them as Hugging Face folders.

    python -m examples.arithmetic.make_study_models        about 10 minutes of one core

Both go on from the demo's models, which can add and know one way. A book in a fair hand shows them
all open ways, some slips, and most of the wrong pages worked out again. Slips are read, never
copied: their tokens have no label. In the teacher's book a misread operand is followed by results
of chance, which it copies: there its advice is bad, and it does not know what comes next. The
student then reads a short careless book, in which nearly every problem is worked out as it stands,
be that way open or closed, and it copies the slips too.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.arithmetic.make_models import IGNORED, Lesson, learning_rate, save
from examples.arithmetic.task import EOS, HERE, build_tokenizer
from examples.arithmetic.ways import Hand, Page, book


@dataclass(frozen=True, slots=True)
class Reading:
    """A lesson from a book in one hand."""

    lesson: Lesson
    hand: Hand
    seed: int
    copies_slips: bool = False


FAIR = Hand(slip_rate=0.1, look_rate=0.6)
BOOKS: dict[str, tuple[str, list[Reading]]] = {  # the demo's model, and what it reads
    "study-teacher": (
        "teacher",
        [
            Reading(
                Lesson(1000, peak_lr=2e-3, batch_size=64),
                replace(FAIR, lost=True),
                seed=2500,
            )
        ],
    ),
    "study-student": (
        "student",
        [
            Reading(Lesson(900, peak_lr=3e-3), FAIR, seed=2200),
            Reading(
                Lesson(100, peak_lr=5e-4),
                Hand(slip_rate=0.05, look_rate=0.0, habit=0.97),
                seed=2300,
                copies_slips=True,
            ),
        ],
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
    for name in sys.argv[1:] or BOOKS:
        demo, readings = BOOKS[name]
        model = Qwen3ForCausalLM.from_pretrained(HERE / demo, dtype=torch.float32)
        for number, reading in enumerate(readings):
            print(f"{name}: book {number + 1} of {len(readings)}")
            read(model, reading, tokenizer)
        save(model, tokenizer, name)


if __name__ == "__main__":
    main()
