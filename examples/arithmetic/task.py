"""The demo task: sums of three numbers, worked out one step at a time.

    prompt      37+58-21=
    completion  37+58=95,95-21=74;74        and then the end token

The task is small enough for a model of half a million weights, yet it has what distillation needs:
a completion of some twenty tokens, a first error that spoils the rest, and an answer that a program
can check (what follows the last `;`).

    python -m examples.arithmetic.task        writes train.parquet and heldout.parquet
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
LARGEST_OPERAND = 99
TRAIN_PROMPTS = 4096
HELD_OUT_PROMPTS = 256
TRAIN_SEED = 1
HELD_OUT_SEED = 2

PAD, EOS = "<pad>", "<eos>"
ALPHABET = "0123456789+-=,;"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Problem:
    """`first` and then two signed steps, such as 37, +58, -21. No partial result is negative."""

    first: int
    steps: tuple[int, int]

    @property
    def prompt(self) -> str:
        return f"{self.first}" + "".join(f"{step:+d}" for step in self.steps) + "="

    @property
    def answer(self) -> str:
        return str(self.first + sum(self.steps))

    @property
    def solution(self) -> str:
        """The completion that a perfect model writes, without the end token."""
        return self.solution_with((0, 0)) or ""

    def solution_with(self, slips: tuple[int, int]) -> str | None:
        """A completion whose results are off by `slips`; None if a value would become negative."""
        lines = []
        value = self.first
        for step, slip in zip(self.steps, slips, strict=True):
            result = value + step + slip
            if result < 0:
                return None
            lines.append(f"{value}{step:+d}={result}")
            value = result
        return ",".join(lines) + f";{value}"


def random_problems(
    seed: int, excluded: frozenset[Problem] = frozenset(), largest: int = LARGEST_OPERAND
) -> Iterator[Problem]:
    """An endless stream of problems, the same for the same seed, without the excluded ones."""
    rng = random.Random(seed)
    while True:
        first, second, third = (rng.randint(1, largest) for _ in range(3))
        problem = Problem(first, (rng.choice((1, -1)) * second, rng.choice((1, -1)) * third))
        # A leading minus would give one character two meanings, which the task has no need of.
        if first + problem.steps[0] < 0 or first + sum(problem.steps) < 0:
            continue
        if problem not in excluded:
            yield problem


def distinct_problems(
    count: int,
    seed: int,
    excluded: frozenset[Problem] = frozenset(),
    largest: int = LARGEST_OPERAND,
) -> list[Problem]:
    """The first `count` problems of a stream, each counted once."""
    chosen: dict[Problem, None] = {}
    for problem in random_problems(seed, excluded, largest):
        chosen[problem] = None
        if len(chosen) == count:
            break
    return list(chosen)


def held_out_problems() -> list[Problem]:
    return distinct_problems(HELD_OUT_PROMPTS, HELD_OUT_SEED)


def train_problems() -> list[Problem]:
    return distinct_problems(TRAIN_PROMPTS, TRAIN_SEED, frozenset(held_out_problems()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. A character outside the alphabet is an error, not an unknown token."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def as_table(problems: list[Problem], split: str) -> pa.Table:
    """The problems in the columns that verl's data sets have."""
    return pa.Table.from_pylist(
        [
            {
                "prompt": [{"role": "user", "content": problem.prompt}],
                "data_source": "arithmetic",
                "reward_model": {"style": "rule", "ground_truth": problem.answer},
                "extra_info": {"index": index, "split": split, "solution": problem.solution},
            }
            for index, problem in enumerate(problems)
        ]
    )


def write_data(folder: Path) -> None:
    pq.write_table(as_table(train_problems(), "train"), folder / "train.parquet")
    pq.write_table(as_table(held_out_problems(), "heldout"), folder / "heldout.parquet")


if __name__ == "__main__":
    write_data(HERE)
