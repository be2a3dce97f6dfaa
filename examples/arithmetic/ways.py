"""The study's task: the demo's sums, where each prompt is open to some ways and closed to others.

    prompt       37+58-21=
    as it stands    37+58=95,95-21=74;74
    other order     37-21=16,16+58=74;74
    later first     58-21=37,37+37=74;74

    prompt       60+70-50=          60+70 has three digits, and nobody here can write those
    other order     60-50=10,10+70=80;80
    later first     70-50=20,20+60=80;80
    a second look   60+70=30,60-50=10,10+70=80;80      the wrong line is left behind

Prompts, tokens and the rule of the verifier are the demo's. All results have at most two digits and
no sign, so half of the prompts cannot be worked out as they stand: whoever knows one way only never
solves them, however often it tries. That makes Pass@k able to fall.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from examples.arithmetic.task import Problem

MAX_TOKENS = 60  # the longest page that anybody writes has fewer
LARGEST = 99  # of operands and results
CLOSED = 0.5  # share of prompts that cannot be worked out as they stand
HELD_OUT_PROMPTS, TRAIN_PROMPTS = 128, 4096
HELD_OUT_SEED, TRAIN_SEED = 4, 3
DIGIT_SLIPS = (-10, -1, 1, 10)


@dataclass(frozen=True, slots=True)
class Hand:
    """How somebody writes.

    Args:
        slip_rate: how often a line goes wrong.
        look_rate: how often a wrong page is noticed and worked out again.
        habit: how often the problem is worked out as it stands, be that way open or closed.
        lost: whether after a misread operand only random results follow (bad advice).
    """

    slip_rate: float
    look_rate: float
    habit: float = 0.0
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a solution, such as `37+58=95`, and whether it is a slip."""

    text: str
    result: int
    slipped: bool = False
    misread: bool = False


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
        spans, start = [], 0
        for line in self.lines:
            if line.slipped:
                spans.append((start, start + len(line.text)))
            start += len(line.text) + 1
        return spans


def ways(problem: Problem) -> list[Problem]:
    """The ways that are open: problems of the same value all of whose results can be written."""
    first, (second, third) = problem.first, problem.steps
    orders = [problem, Problem(first, (third, second))]
    if second > 0:
        orders.append(Problem(second, (third, first)))
    return [way for way in orders if _writable(way.first + way.steps[0], int(way.answer))]


def _writable(*results: int) -> bool:
    return all(0 <= result <= LARGEST for result in results)


def slip(value: int, step: int, rng: random.Random) -> Line:
    """A line that goes wrong: a digit, the sign or the operand."""
    if not _writable(value + step):
        return line(value, step)
    misread = int(str(abs(step))[::-1]) * (1 if step > 0 else -1)
    tries = [
        (step, value + step + rng.choice(DIGIT_SLIPS)),
        (step, value - step),
        (misread, value + misread),
    ]
    rng.shuffle(tries)
    for shown, result in tries:
        if _writable(result) and result != value + step:
            return Line(f"{value}{shown:+d}={result}", result, True, misread=shown != step)
    result = value + step + (1 if value + step < LARGEST else -1)
    return Line(f"{value}{step:+d}={result}", result, slipped=True)


def line(value: int, step: int) -> Line:
    """The line without a slip; on a closed way the sign or the hundred is dropped."""
    result = value + step
    shown = result if _writable(result) else abs(result) % (LARGEST + 1)
    return Line(f"{value}{step:+d}={shown}", shown, slipped=shown != result)


def chain(way: Problem) -> list[Line]:
    """The lines of a way without a slip."""
    lines = [line(way.first, way.steps[0])]
    return [*lines, line(lines[0].result, way.steps[1])]


def write(problem: Problem, hand: Hand, rng: random.Random) -> Page:
    """One page. A wrong one may be noticed, and then an open way is written after it."""
    way = problem if rng.random() < hand.habit else rng.choice(ways(problem))
    lines: list[Line] = []
    value = way.first
    for step in way.steps:
        if hand.lost and any(one.misread for one in lines):
            value_of_chance = rng.randint(0, LARGEST)  # copied, so that it is learned: no slip
            lines.append(Line(f"{value}{step:+d}={value_of_chance}", value_of_chance))
        else:
            lines.append((slip if rng.random() < hand.slip_rate else _right)(value, step, rng))
        value = lines[-1].result
    lost = hand.lost and any(one.misread for one in lines)
    if value != int(problem.answer) and not lost and rng.random() < hand.look_rate:
        lines += chain(rng.choice(ways(problem)))
    return Page(problem, tuple(lines))


def _right(value: int, step: int, _: random.Random) -> Line:
    return line(value, step)


def is_misread(prompt: str, solution: str) -> bool:
    """Whether some line of the solution adds or takes away what does not stand in the prompt:
    after such a line the study's teacher gives bad advice."""
    operands = re.findall(r"\d+", prompt)
    return any(shown not in operands for shown in re.findall(r"\d[+-](\d+)=", solution))


def problems(seed: int, excluded: frozenset[Problem] = frozenset()) -> Iterator[Problem]:
    """An endless stream, the same for the same seed; a share of `CLOSED` is closed as it stands."""
    rng = random.Random(seed)
    while True:
        closed = rng.random() < CLOSED
        while True:
            first, second, third = (rng.randint(1, LARGEST) for _ in range(3))
            problem = Problem(first, (rng.choice((1, -1)) * second, rng.choice((1, -1)) * third))
            open_ways = ways(problem)
            if open_ways and closed == (problem not in open_ways):
                break
        if problem not in excluded:
            yield problem


def distinct(count: int, seed: int, excluded: frozenset[Problem] = frozenset()) -> list[Problem]:
    """The first `count` problems of a stream, each counted once."""
    chosen: dict[Problem, None] = {}
    for problem in problems(seed, excluded):
        chosen[problem] = None
        if len(chosen) == count:
            break
    return list(chosen)


def held_out() -> list[Problem]:
    return distinct(HELD_OUT_PROMPTS, HELD_OUT_SEED)


def training() -> list[Problem]:
    return distinct(TRAIN_PROMPTS, TRAIN_SEED, frozenset(held_out()))


def book(seed: int, hand: Hand) -> Iterator[Page]:
    """An endless book in one hand, without the held-out problems."""
    rng = random.Random(seed)
    for problem in problems(seed, frozenset(held_out())):
        yield write(problem, hand, rng)
