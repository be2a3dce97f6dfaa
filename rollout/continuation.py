"""The tokens of the messages that follow a sampled turn, as the student's chat template has them.

    ids so far, the sampled turn's own end token last ─▶ rest of its turn, new messages, next header

What was sampled is never rendered again: a mark stands in its place when the template renders the
conversation, and what the template writes behind the mark is all that is tokenised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from services.errors import BadItem
from services.trajectory import Message

_PLAIN = "It is 4"
_THINKING = "<think>\nTwo and two.\n</think>\n\nIt is 4"


class CannotContinue(BadItem):
    """The chat template has no tokens for what follows; the message says why."""


class Continuation:
    """What follows a turn, under one tokenizer.

    Args:
        tokenizer: the student's, with its chat template.
        end_tokens: the ids that end a turn.
        keeps_rewritten: go on where the template changes what stands before the new messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        *,
        keeps_rewritten: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._keeps_rewritten = keeps_rewritten

    def ids(self, said: Sequence[Message], new: Sequence[Message]) -> list[int]:
        """The tokens between the end token of a sampled turn, which follows `said`, and the
        student's next turn. The end token that was sampled stands for the template's own.

        Raises:
            CannotContinue: the template refuses the messages, changes what stands before them, or
                does not end a turn with an end token.
        """
        mark = "answer"
        while any(mark in message["content"] for message in (*said, *new)):
            mark += "-"
        whole = self._rendered([*said, _answer(mark), *new])
        _, separator, rest = whole.partition(mark)
        kept = self._keeps_rewritten or _goes_on(whole, self._rendered(said), mark)
        if not separator or not kept:
            raise CannotContinue("the chat template changes what stands before new messages")
        ids: list[int] = self._tokenizer.encode(rest, add_special_tokens=False)
        if not ids or ids[0] not in self._end_tokens:
            raise CannotContinue(
                "the chat template does not end a turn with an end token of the model, so that "
                "nothing can follow what was sampled"
            )
        return ids[1:]

    def _rendered(self, messages: Sequence[Message]) -> str:
        """As text, the student's next turn begun."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise CannotContinue(f"the chat template refuses the messages: {error}") from error
        assert isinstance(text, str)
        return text


def problems(continuation: Continuation, role: str) -> Iterator[str]:
    """What is wrong with the template of `continuation` for episodes whose world speaks as
    `role`: one sentence each."""
    question: list[Message] = [{"role": "user", "content": "What is 2+2?"}]
    system: list[Message] = [{"role": "system", "content": "Think."}, *question]
    reply: list[Message] = [{"role": role, "content": "4"}]
    try:
        continuation.ids(question, reply)
    except CannotContinue as error:
        yield str(error)
        return
    if continuation._keeps_rewritten:
        return
    for said, text in ((question, _PLAIN), (question, _THINKING), (system, _PLAIN)):
        try:
            start = continuation._rendered(said)
        except CannotContinue:  # of a system message, which such a model is never given
            continue
        later = [*said, _answer(text), *reply]
        whole = continuation._rendered([*later, _answer(_PLAIN), *reply])
        if not (
            _goes_on(whole, start, text) and _goes_on(whole, continuation._rendered(later), _PLAIN)
        ):
            what = "removes thinking from" if text == _THINKING else "changes"
            yield f"the chat template {what} earlier turns when later ones are rendered"
            return


def _goes_on(whole: str, start: str, text: str) -> bool:
    """Whether `whole` is `start` and then `text`. Some templates leave the space between them to
    the student."""
    start = start.rstrip()
    return whole.startswith(start) and whole[len(start) :].lstrip().startswith(text)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}
