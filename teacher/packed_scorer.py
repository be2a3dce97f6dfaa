"""Scoring with transformers: one prefill over packed sequences, nothing generated or cached."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from services import packed
from services.batching import Batcher
from teacher.scorer import ScoringError, check_starts
from teacher.scores import InvalidLogProbs, TokenScores, valid_scores

_Answer: TypeAlias = tuple[Tensor, Tensor, Tensor]  # log-probs [T], ids [T, k], log-probs [T, k]


@dataclass(frozen=True, slots=True)
class _Work:
    token_ids: Sequence[int]
    start: int
    top: int


class PackedScorer:
    """Scores any number of sequences, of many callers at once, in forwards of at most
    `batch_tokens` tokens. The `[tokens, vocab]` matrix never exists as a whole.

    Args:
        model: a causal language model in evaluation mode. It is switched to packed attention.
        batch_tokens: tokens in one forward; a longer sequence goes alone.

    Raises:
        ValueError: packed attention cannot reproduce this model.
    """

    def __init__(self, model: PreTrainedModel, *, batch_tokens: int) -> None:
        self._model = packed.prepare(model)
        self._batcher = Batcher(
            self._forward, cost=lambda work: len(work.token_ids), budget=batch_tokens
        )

    async def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], top: int = 0
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`.

        Raises:
            ValueError: a start is 0 or past the end of its sequence.
            ScoringError: a log-prob is not finite or is positive.
        """
        check_starts(sequences, starts)  # before they join a batch, and its error is others' too
        # Neighbours in a forward should be of like length, because attention on a CPU pads to
        # the longest. Longest first, so that what does not fit is found out at once.
        places = sorted(
            (place for place, start in enumerate(starts) if start < len(sequences[place])),
            key=lambda place: -len(sequences[place]),
        )
        answers = await asyncio.gather(
            *(self._batcher.submit(_Work(sequences[i], starts[i], top)) for i in places)
        )
        scores = [TokenScores.empty(top) for _ in sequences]
        for place, (logprobs, ids, values) in zip(places, answers, strict=True):
            count = len(sequences[place]) - starts[place]
            ids, values = ids[:, :top], values[:, :top]  # others may have wanted more
            try:
                scores[place] = valid_scores(
                    logprobs.numpy(), count, ids.numpy(), values.numpy(), top
                )
            except InvalidLogProbs as error:
                raise ScoringError(place, error) from error
        return scores

    async def check(self) -> None:
        """A model in this process cannot die alone."""

    async def close(self) -> None:
        """Lets the thread end."""
        self._batcher.close()

    def _forward(self, batch: Sequence[_Work]) -> list[_Answer]:
        return packed.score_top(
            self._model,
            [work.token_ids for work in batch],
            [work.start for work in batch],
            max(work.top for work in batch),
        )
