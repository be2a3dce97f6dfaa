"""Stories with one calculation, in English, for a real language model.

    user       Ada has 17 kites and buys 5 more. How many kites does Ada have now?
    assistant  17 + 5 = 22
               #### 22                                   and then the end token

The system's line and three solved stories stand before each story, as earlier turns of the chat, so
that even the untrained model knows the form of an answer. What it mostly does not know is which
calculation a story asks for, and what comes out.

A held-out story shares nothing with those that are trained on but the kind of calculation: other
sentences, names, things and pairs of numbers.

    python -m examples.smollm.task        writes train.parquet and heldout.parquet into build/
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BUILD = Path(__file__).parent / "build"
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 2048, 48
TRAIN_SEED, HELD_OUT_SEED = 1, 2
LARGEST_TERM, LARGEST_FACTOR = 20, 9

SYSTEM = "Answer with one calculation."
HINT = "Solution: "


@dataclass(frozen=True, slots=True)
class World:
    """What stories are made of. `sentences` are by operation: {n} is a name, {t} are things, {a}
    and {b} the numbers. Names and things are words between blanks."""

    sentences: dict[str, Sequence[str]]
    names: str
    things: str
    held_out: bool

    def has(self, first: int, second: int) -> bool:
        """Whether a pair of numbers belongs to this world: one in five is held out."""
        return ((7 * first + second) % 5 == 0) == self.held_out


TRAIN = World(
    {
        "+": (
            "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
            "{n} found {a} {t} on Monday and {b} on Tuesday. How many {t} is that together?",
            "There are {a} {t} on a table. {n} puts {b} more on it. How many {t} are on the table?",
            "{n} has {a} red {t} and {b} blue {t}. How many {t} does {n} have?",
        ),
        "-": (
            "{n} has {a} {t} and gives away {b}. How many {t} are left?",
            "There are {a} {t} in a box. {n} takes {b} of them. How many {t} are still in the box?",
            "{n} had {a} {t} and lost {b} of them. How many {t} does {n} still have?",
            "{n} wants {a} {t} and has {b} so far. How many more {t} does {n} need?",
        ),
        "*": (
            "{n} buys {a} bags with {b} {t} in each. How many {t} does {n} have?",
            "There are {a} boxes. Each box holds {b} {t}. How many {t} are there?",
            "{n} gets {b} {t} a day. How many {t} does {n} get in {a} days?",
            "{a} children bring {b} {t} each to {n}. How many {t} do they bring?",
        ),
    },
    names="Ann Ben Cara Dan Eva Finn Gina Hugo Iris Jack Kate Liam Mona Nick Olga Paul",
    things="apples books coins marbles pencils stickers shells cards stamps buttons cookies",
    held_out=False,
)
HELD_OUT = World(
    {
        "+": (
            "{n} picked {a} {t} in the morning and {b} in the evening. How many {t} did {n} pick?",
            "{n} owns {a} {t} and gets {b} more from a friend. How many {t} does {n} own now?",
        ),
        "-": (
            "{n} baked {a} {t} and sold {b} of them. How many {t} remain?",
            "A shop has {a} {t}. {n} buys {b} of them. How many {t} does the shop have left?",
        ),
        "*": (
            "{n} fills {a} baskets with {b} {t} each. How many {t} does {n} need?",
            "{n} draws {b} {t} on every page. How many {t} are on {a} pages?",
        ),
    },
    names="Rosa Sam Tina Umar Vera Will Yara Zoe",
    things="kites cakes flowers stars candles pears beads hats",
    held_out=True,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A story, and the one calculation that solves it."""

    story: str
    calculation: str
    answer: str

    @property
    def solution(self) -> str:
        return f"{self.calculation}\n#### {self.answer}"


SOLVED = (
    Problem("Tom has 5 pens and buys 8 more. How many pens does Tom have now?", "5 + 8 = 13", "13"),
    Problem("Lea has 12 cups and gives away 3. How many cups are left?", "12 - 3 = 9", "9"),
    Problem(
        "Max buys 4 bags with 6 nuts in each. How many nuts does Max have?", "4 * 6 = 24", "24"
    ),
)


def problems(world: World, seed: int) -> Iterator[Problem]:
    """An endless stream, the same for the same seed; every operation as often as the others."""
    rng = random.Random(seed)
    while True:
        sign = rng.choice("+-*")
        largest = LARGEST_FACTOR if sign == "*" else LARGEST_TERM
        first, second = rng.randint(2, largest), rng.randint(2, largest)
        if not world.has(first, second):
            continue
        if sign == "-":  # both numbers and the difference are positive
            first += second
        value = {"+": first + second, "-": first - second, "*": first * second}[sign]
        story = rng.choice(world.sentences[sign]).format(
            n=rng.choice(world.names.split()), t=rng.choice(world.things.split()), a=first, b=second
        )
        yield Problem(story, f"{first} {sign} {second} = {value}", str(value))


def distinct(world: World, seed: int, count: int) -> list[Problem]:
    """The first `count` of a stream, each counted once."""
    found: dict[Problem, None] = {}
    for problem in problems(world, seed):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def chat(problem: Problem, *, hints: bool = False) -> list[dict[str, str]]:
    """What stands before the answer. With `hints` each story is followed by its calculation: what
    the teacher reads, who only has to repeat it."""
    messages = [{"role": "system", "content": SYSTEM}]
    for one in (*SOLVED, problem):
        hint = f"\n{HINT}{one.calculation}" if hints else ""
        messages += [
            {"role": "user", "content": one.story + hint},
            {"role": "assistant", "content": one.solution},
        ]
    return messages[:-1]


def as_table(problems: Sequence[Problem], split: str) -> pa.Table:
    """The problems in the columns that verl's data sets have."""
    return pa.Table.from_pylist(
        [
            {
                "prompt": chat(problem),
                "data_source": "stories",
                "reward_model": {"style": "rule", "ground_truth": problem.answer},
                "extra_info": {
                    "index": index,
                    "split": split,
                    "teacher_prompt": chat(problem, hints=True),
                },
            }
            for index, problem in enumerate(problems)
        ]
    )


def write_data(folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    train = distinct(TRAIN, TRAIN_SEED, TRAIN_PROMPTS)
    held_out = distinct(HELD_OUT, HELD_OUT_SEED, HELD_OUT_PROMPTS)
    pq.write_table(as_table(train, "train"), folder / "train.parquet")
    pq.write_table(as_table(held_out, "heldout"), folder / "heldout.parquet")


if __name__ == "__main__":
    write_data(BUILD)
