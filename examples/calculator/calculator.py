"""An environment of one's own: what ends in `?` is computed, and anything else is the answer."""

import re
from collections.abc import Sequence

from rollout.environment import Environment, Over, Reply
from services.trajectory import Message, Prompt

_CALL = re.compile(r"(\d{1,9})\*(\d{1,9})([+-]\d{1,9})\?")


class Calculator:
    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        if not text.endswith("?"):
            return Over()
        call = _CALL.fullmatch(text)
        if call is None:
            return Reply([{"role": "tool", "content": "-"}], failed=True)
        first, second, third = map(int, call.groups())
        return Reply([{"role": "tool", "content": str(first * second + third)}])


def calculator(prompt: Prompt) -> Environment:
    return Calculator()
