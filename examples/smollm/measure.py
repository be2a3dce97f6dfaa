"""What a model answers to the held-out stories, and in what form: Avg@8, Pass@8, and how much of it
is the form alone.

    python -m examples.smollm.measure MODEL [MODEL …] [--hints] [--temperature T] [--prompts N]

Eight answers to each story, judged by the verifier's `math`. `--hints` shows the solution, as the
teacher reads it. At a low temperature the untrained model keeps to the form as well: what a trained
one is better by there is not the form. Prints one row of a table for each model.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deploy.accuracy import Estimate, over_prompts
from examples.smollm.task import (
    HELD_OUT,
    HELD_OUT_PROMPTS,
    HELD_OUT_SEED,
    Problem,
    chat,
    distinct,
)
from rollout.rows import Request
from rollout.transformers_engine import prepare, sample_groups
from services.models import end_tokens, load_model, load_tokenizer
from services.trajectory import Sampling
from verifier import math_answer

SAMPLES, MAX_TOKENS, ANSWERS_AT_ONCE = 8, 24, 64
FORM = re.compile(r"(\d+ [-+*/] \d+) = (\d+)\n#### \2")


@dataclass(frozen=True, slots=True)
class Tally:
    """Of one story's answers, how many …"""

    samples: int
    correct: int  # … are right, by the verifier, and end
    ended: int  # … end
    formed: int  # … have the form of the solved stories, whatever they say
    asked: int  # … compute what the story asks for, whatever comes out

    @staticmethod
    def of(problem: Problem, answers: Sequence[tuple[str, bool]]) -> Tally:
        """Counts answers, each with whether it ended."""
        formed = [FORM.fullmatch(text.strip()) for text, ended in answers if ended]
        wanted = problem.calculation.partition(" = ")[0]
        return Tally(
            samples=len(answers),
            correct=sum(ended and right(text, problem) for text, ended in answers),
            ended=len(formed),
            formed=sum(match is not None for match in formed),
            asked=sum(match is not None and match[1] == wanted for match in formed),
        )


def right(text: str, problem: Problem) -> bool:
    return math_answer.judge(text, problem.answer, "hashes").outcome == "correct"


def share(tallies: Sequence[Tally], what: str) -> Estimate:
    """Of all answers, with the 95% interval over stories."""
    return over_prompts([asdict(t)[what] / t.samples for t in tallies])


def row(name: str, tallies: Sequence[Tally]) -> str:
    """One row of the table."""
    formed = sum(t.formed for t in tallies)
    correct = sum(t.correct for t in tallies)
    passed = over_prompts([float(t.correct > 0) for t in tallies])
    shares = " | ".join(str(share(tallies, what)) for what in ("correct", "formed", "asked"))
    return f"| {name} | {shares} | {correct / max(formed, 1):.1%} | {passed} |"


HEAD = (
    "| model | right: Avg@8 | in the right form | computes what is asked "
    "| right ÷ in form | Pass@8 |\n|---|---|---|---|---|---|"
)


def measure(
    model: str, problems: Sequence[Problem], *, hints: bool = False, temperature: float = 1.0
) -> list[Tally]:
    """Samples a model, and counts."""
    return measure_loaded(
        prepare(load_model(model)), load_tokenizer(model), end_tokens(model), problems,
        hints=hints, temperature=temperature,
    )  # fmt: skip


def measure_loaded(
    sampler: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    problems: Sequence[Problem],
    *,
    hints: bool = False,
    temperature: float = 1.0,
) -> list[Tally]:
    """As `measure`, of a model that `rollout.transformers_engine.prepare` has seen."""
    tallies: list[Tally] = []
    for start, some in _chunks(problems, ANSWERS_AT_ONCE // SAMPLES):
        requests = [
            Request(
                ids(problem, tokenizer, hints),
                Sampling(SAMPLES, MAX_TOKENS, temperature, seed=start + i),
            )
            for i, problem in enumerate(some)
        ]
        for problem, group in zip(some, sample_groups(sampler, requests, ends), strict=True):
            answers = [(_text(c.token_ids, tokenizer), c.finish == "stop") for c in group]
            tallies.append(Tally.of(problem, answers))
        print(f"  {len(tallies)} of {len(problems)} stories", file=sys.stderr, flush=True)
    return tallies


def ids(problem: Problem, tokenizer: PreTrainedTokenizerBase, hints: bool) -> list[int]:
    made = tokenizer.apply_chat_template(
        chat(problem, hints=hints), add_generation_prompt=True, return_dict=True
    )
    return list(made["input_ids"])


def _text(token_ids: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))


def _chunks(problems: Sequence[Problem], size: int) -> Iterator[tuple[int, Sequence[Problem]]]:
    for start in range(0, len(problems), size):
        yield start, problems[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--hints", action="store_true", help="with the solution in the prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=HELD_OUT_PROMPTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems = distinct(HELD_OUT, HELD_OUT_SEED, options.prompts)
    print(HEAD)
    for model in options.models:
        found = measure(model, problems, hints=options.hints, temperature=options.temperature)
        print(row(model, found), flush=True)


if __name__ == "__main__":
    main()
