"""Scoring with transformers: one prefill over packed sequences, nothing generated or cached."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from services import packed
from services.batching import Batcher
from teacher.api import InvalidLogProbs, valid_logprobs
from teacher.scorer import ScoringError


@dataclass(frozen=True, slots=True)
class _Work:
    token_ids: Sequence[int]
    start: int


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
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[list[float]]:
        """See `teacher.scorer.Scorer`.

        Raises:
            ValueError: a start is 0 or past the end of its sequence.
            ScoringError: a log-prob is not finite or is positive.
        """
        for ids, start in zip(sequences, starts, strict=True):
            # Before it joins a batch: its error must not become that of other callers.
            if not 1 <= start <= len(ids):
                raise ValueError(f"cannot score from token {start} of a sequence of {len(ids)}")
        # Neighbours in a forward should be of like length, because attention on a CPU pads to
        # the longest. Longest first, so that what does not fit is found out at once.
        places = sorted(
            (place for place, start in enumerate(starts) if start < len(sequences[place])),
            key=lambda place: -len(sequences[place]),
        )
        answers = await asyncio.gather(
            *(self._batcher.submit(_Work(sequences[i], starts[i])) for i in places)
        )
        scores: list[list[float]] = [[] for _ in sequences]
        for place, logprobs in zip(places, answers, strict=True):
            scores[place] = _checked(logprobs, len(sequences[place]) - starts[place])
        return scores

    def _forward(self, batch: Sequence[_Work]) -> list[list[float]]:
        return packed.score(
            self._model, [work.token_ids for work in batch], [work.start for work in batch]
        )


def _checked(logprobs: list[float], count: int) -> list[float]:
    try:
        return [float(value) for value in valid_logprobs(logprobs, count)]
    except InvalidLogProbs as error:
        raise ScoringError(f"the teacher's model computed no log-probs: {error}") from error
