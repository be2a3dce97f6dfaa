"""Scoring with transformers: one prefill over packed sequences, nothing generated or cached.

request ─▶ its completions of one prompt ─▶ batcher ─▶ forward: that prompt once, in front of them
"""

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
    """Sequences that share what stands before `start`, and go through one forward."""

    sequences: Sequence[Sequence[int]]
    start: int
    top: int

    @property
    def tokens(self) -> int:
        return self.start + sum(len(ids) - self.start for ids in self.sequences)


class PackedScorer:
    """Scores any number of sequences, of many callers at once, in forwards of at most
    `batch_tokens` tokens. The `[tokens, vocab]` matrix never exists as a whole. On a CPU, a prompt
    that several sequences of one call share is computed once for all of them in one forward.

    Args:
        model: a causal language model in evaluation mode. It is switched to packed attention.
        batch_tokens: tokens in one forward; a longer sequence goes alone.

    Raises:
        ValueError: packed attention cannot reproduce this model.
    """

    def __init__(self, model: PreTrainedModel, *, batch_tokens: int) -> None:
        self._model = packed.prepare(model)
        self._batch_tokens = batch_tokens
        self._batcher = Batcher(self._forward, cost=lambda work: work.tokens, budget=batch_tokens)

    async def score(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], top: int = 0
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`.

        Raises:
            ValueError: a start is 0 or past the end of its sequence.
            ScoringError: a log-prob is not finite or is positive.
        """
        check_starts(sequences, starts)  # before they join a batch, and its error is others' too
        parts = self._parts(sequences, starts)
        answers = await asyncio.gather(
            *(
                self._batcher.submit(_Work([sequences[i] for i in part], starts[part[0]], top))
                for part in parts
            )
        )
        scores = [TokenScores.empty(top) for _ in sequences]
        places = [place for part in parts for place in part]
        flat = [answer for part in answers for answer in part]
        for place, (logprobs, ids, values) in zip(places, flat, strict=True):
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

    def _parts(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Places of what goes through the model together: one sequence, or several after one
        prompt, as far as the budget goes.

        Neighbours in a forward should be of like length, because attention on a CPU pads to the
        longest. Longest first, so that what does not fit is found out at once.
        """
        wanted = sorted(
            (place for place, start in enumerate(starts) if start < len(sequences[place])),
            key=lambda place: -len(sequences[place]),
        )
        if not packed.can_share(self._model, self._model.device):
            return [[place] for place in wanted]
        parts: list[list[int]] = []
        for family in packed.same_beginnings(
            [sequences[place] for place in wanted], [starts[place] for place in wanted]
        ):
            parts.append([])
            left = self._batch_tokens - starts[wanted[family[0]]]
            for place in (wanted[member] for member in family):
                left -= len(sequences[place]) - starts[place]
                if parts[-1] and left < 0:
                    parts.append([])
                    left = self._batch_tokens - len(sequences[place])
                parts[-1].append(place)
        return parts

    def _forward(self, batch: Sequence[_Work]) -> list[list[_Answer]]:
        answers = iter(
            packed.score_top(
                self._model,
                [ids for work in batch for ids in work.sequences],
                [work.start for work in batch for _ in work.sequences],
                max(work.top for work in batch),
            )
        )
        return [[next(answers) for _ in work.sequences] for work in batch]
