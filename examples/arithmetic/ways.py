"""The study's task: the demo's sums, with several ways to the answer and room for second thoughts.

    prompt       37+58-21=
    as they stand   37+58=95,95-21=74;74
    other order     37-21=16,16+58=74;74
    steps first     58-21=37,37+37=74;74
    a second look   37+58=85,37+58=95,95-21=74;74      the wrong line is written again

Prompts, tokens and the rule of the verifier are the demo's. What is new is that a right answer can
be reached in several ways, that a wrong line can be mended, and that there are three ways to go
wrong: a digit, a sign, a misread operand.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from examples.arithmetic.task import Problem, distinct_problems, random_problems

MAX_TOKENS = 60  # the longest page has 56, and the end token
LARGEST_OPERAND = 19  # small: three ways are three times as much to learn
HELD_OUT_PROMPTS, TRAIN_PROMPTS = 128, 4096
HELD_OUT_SEED, TRAIN_SEED = 4, 3
DIGIT_SLIPS = (-10, -1, 1, 10)


@dataclass(frozen=True, slots=True)
class Hand:
    """How somebody writes: how often a line goes wrong, and how often that is noticed."""

    slip_rate: float
    look_rate: float


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a solution, such as `37+58=95`, and whether it is a slip."""

    text: str
    result: int
    slipped: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A problem and what somebody wrote about it."""

    problem: Problem
    lines: tuple[Line, ...]

    @property
    def solution(self) -> str:
        return ",".join(line.text for line in self.lines) + f";{self.lines[-1].result}"

    @property
    def slips(self) -> list[tuple[int, int]]:
        """Where in `solution` the slips are: from, to."""
        places, start = [], 0
        for line in self.lines:
            if line.slipped:
                places.append((start, start + len(line.text)))
            start += len(line.text) + 1
        return places


def ways(problem: Problem) -> list[Problem]:
    """The chains that lead to the answer: problems of the same value, no partial result of which
    is negative."""
    first, (second, third) = problem.first, problem.steps
    found = [problem]
    if first + third >= 0:
        found.append(Problem(first, (third, second)))
    if second > 0 and second + third >= 0:
        found.append(Problem(second, (third, first)))
    return found


def slip(value: int, step: int, rng: random.Random) -> Line:
    """A line that goes wrong: a digit, the sign or the operand."""
    misread = int(str(abs(step))[::-1]) * (1 if step > 0 else -1)
    tries = [
        (step, value + step + rng.choice(DIGIT_SLIPS)),
        (step, value - step),
        (misread, value + misread),
    ]
    rng.shuffle(tries)
    for shown, result in tries:
        if result >= 0 and result != value + step:
            return Line(f"{value}{shown:+d}={result}", result, slipped=True)
    return Line(f"{value}{step:+d}={value + step + 1}", value + step + 1, slipped=True)


def chain(way: Problem) -> list[Line]:
    """The lines of a way without a slip."""
    lines, value = [], way.first
    for step in way.steps:
        lines.append(Line(f"{value}{step:+d}={value + step}", value + step))
        value += step
    return lines


def write(problem: Problem, hand: Hand, rng: random.Random) -> Page:
    """One page: any of the ways; a slip may be noticed at once or, from the end, at last."""
    way = rng.choice(ways(problem))
    lines: list[Line] = []
    value = way.first
    for step in way.steps:
        right = Line(f"{value}{step:+d}={value + step}", value + step)
        if rng.random() < hand.slip_rate:
            lines.append(slip(value, step, rng))
            if rng.random() < hand.look_rate:
                lines.append(right)
        else:
            lines.append(right)
        value = lines[-1].result
    if value != int(problem.answer) and rng.random() < hand.look_rate:
        lines += chain(way)
    return Page(problem, tuple(lines))


def held_out() -> list[Problem]:
    return distinct_problems(HELD_OUT_PROMPTS, HELD_OUT_SEED, largest=LARGEST_OPERAND)


def training() -> list[Problem]:
    return distinct_problems(
        TRAIN_PROMPTS, TRAIN_SEED, frozenset(held_out()), largest=LARGEST_OPERAND
    )


def book(seed: int, hand: Hand) -> Iterator[Page]:
    """An endless book in one hand, without the held-out problems."""
    rng = random.Random(seed)
    for problem in random_problems(seed, frozenset(held_out()), LARGEST_OPERAND):
        yield write(problem, hand, rng)
