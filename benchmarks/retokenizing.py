"""What it costs to make a teacher's tokens of a student's, and how long chunks are.

    python -m benchmarks.retokenizing

This project's pages are the answers. The tokenizers are trained on its source: byte-level BPE as
of Qwen or Llama 3, and Unigram as of SentencePiece.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer

from services.trajectory import Trajectory
from teacher.retokenizer import Retokenizer
from teacher.scores import TokenScores

ROOT = Path(__file__).parents[1]
VOCABULARY = 16_000
END = "<end>"


def byte_level(corpus: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[END],
                   show_progress=False),
    )  # fmt: skip
    return made


def unigram(corpus: list[str]) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        corpus,
        UnigramTrainer(vocab_size=VOCABULARY // 2, special_tokens=[END, "<unk>"],
                       unk_token="<unk>", show_progress=False),
    )  # fmt: skip
    return made


def measure(student: Tokenizer, teacher: Tokenizer, answers: list[str]) -> str:
    """CPU time for each of the student's tokens, the scores' way back included."""
    one = Retokenizer(student.to_str(), teacher.to_str(), [0], 0)
    encoded = [np.array([*student.encode(text).ids, 0], np.int32) for text in answers]
    empty = np.zeros(0, np.float32)
    mine = theirs = chunks = 0
    started = time.process_time()
    for ids in encoded:
        question = one.asked(Trajectory(ids, empty, "stop", ""), 0)
        said = np.full(len(question.ids), -1, np.float32)
        answered = question.answered(TokenScores(said, question.ids[:, None], said[:, None]))
        assert answered.chunks is not None
        mine, theirs = mine + len(ids), theirs + len(question.ids)
        chunks += int(answered.chunks[-1]) + 1
    spent = time.process_time() - started
    return (
        f"{1e6 * spent / mine:.2f} µs a token of the student's; {mine} of its tokens, {theirs} of "
        f"the teacher's, {chunks} chunks"
    )


def main() -> None:
    pages = [*sorted(ROOT.glob("docs/*.md"))]
    answers = [page.read_text(encoding="utf-8") for page in pages]
    files = [*pages, *sorted(ROOT.glob("*/*.py"))]
    corpus = [file.read_text(encoding="utf-8") for file in files]
    made = {"byte-level BPE": byte_level(corpus), "Unigram": unigram(corpus)}
    for mine, student in made.items():
        for theirs, teacher in made.items():
            print(f"{mine} to {theirs}: {measure(student, teacher, answers)}")


if __name__ == "__main__":
    main()
