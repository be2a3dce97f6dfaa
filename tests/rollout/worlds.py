"""Environments for tests, and a student's folder whose chat template knows turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rollout.environment import Environment, Over, Reply
from services.errors import BadItem
from services.trajectory import Message, Prompt, Verdict
from tests.builders import save_tiny, tiny_tokenizer

TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}c{{ m.content }}<eos>"
    "{% elif m.role == 'tool' %}b{{ m.content }}e{% else %}a{{ m.content }}e{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = TURNS
    return made


def save_student(path: Path, seed: int = 0) -> Path:
    save_tiny(path, seed)
    tokenizer().save_pretrained(path)
    return path


class Counting:
    """Says how many characters it heard, for so many turns; then the verdict is its own."""

    def __init__(self, replies: int = 2) -> None:
        self._left = replies

    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        assert said[0] == {"role": "user", "content": "12"}
        if not self._left:
            return Over(note=f"{len(said)} said", verdict=Verdict("correct", "it counted"))
        self._left -= 1
        return Reply([{"role": "tool", "content": f"{len(text)}"}], failed="+" in text)


def counting(prompt: Prompt) -> Environment:
    return Counting()


class Broken:
    """Does what its prompt's reference says."""

    def __init__(self, what: str) -> None:
        self._what = what

    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        match self._what:
            case "hang":
                await asyncio.Event().wait()
            case "bad":
                raise BadItem("this riddle has no answer")
            case "raise":
                raise RuntimeError("out of order")
            case "nothing":
                return Reply([])
            case "no text":
                return Reply([{"role": "tool", "content": 5}])  # type: ignore[dict-item]
        return Over()


def broken(prompt: Prompt) -> Environment:
    return Broken(prompt.reference)


closed: list[str] = []


@asynccontextmanager
async def closing(prompt: Prompt) -> AsyncIterator[Environment]:
    """Notes when an episode is over."""
    yield Counting(1)
    closed.append(prompt.id)


held = asyncio.Event()
waiting: list[str] = []


class Held:
    """Answers once it is let go."""

    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        waiting.append(text)
        await held.wait()
        return Over() if len(said) > 1 else Reply([{"role": "tool", "content": "7"}])


def holding(prompt: Prompt) -> Environment:
    return Held()
