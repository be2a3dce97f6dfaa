"""Scoring with transformers: one prefill over packed sequences, nothing generated or cached.

request ─▶ its completions of one prompt ─▶ batcher ─▶ forward: that prompt once, in front of them
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from services import packed
from services.batching import Batcher
from services.trajectory import TokenIds
from teacher.scorer import ScoringError, check_starts
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores, valid_scores, with_more


@dataclass(frozen=True, slots=True)
class _Work:
    """Sequences that share what stands before `start`, and go through one forward."""

    sequences: Sequence[Sequence[int]]
    start: int
    top: int
    more: More

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
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
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
                self._batcher.submit(
                    _Work([sequences[i] for i in part], starts[part[0]], top, more.of(part))
                )
                for part in parts
            )
        )
        scores = [TokenScores.empty(top, more) for _ in sequences]
        indices = [index for part in parts for index in part]
        flat = [answer for part in answers for answer in part]
        for index, answer in zip(indices, flat, strict=True):
            count = len(sequences[index]) - starts[index]
            # Others may have wanted more.
            ids, values = answer.top_ids[:, :top], answer.top_logprobs[:, :top]
            candidates = answer.candidates[:, : more.width]
            try:
                made = valid_scores(
                    answer.logprobs.numpy(), count, ids.numpy(), values.numpy(), top
                )
                scores[index] = with_more(made, candidates.numpy(), answer.entropy.numpy(), more)
            except InvalidLogProbs as error:
                raise ScoringError(index, error) from error
        return scores

    @property
    def model(self) -> PreTrainedModel:
        """What computes; to be changed by `change` alone."""
        return self._model

    async def change(self, action: Callable[[], None]) -> None:
        """Runs `action`, which may change the model, while no forward runs."""
        await self._batcher.between_batches(action)

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
            (index for index, start in enumerate(starts) if start < len(sequences[index])),
            key=lambda index: -len(sequences[index]),
        )
        if not packed.can_share(self._model, self._model.device, self._model.dtype):
            return [[index] for index in wanted]
        parts: list[list[int]] = []
        for family in packed.same_beginnings(
            [sequences[index] for index in wanted], [starts[index] for index in wanted]
        ):
            parts.append([])
            left = self._batch_tokens - starts[wanted[family[0]]]
            for index in (wanted[member] for member in family):
                left -= len(sequences[index]) - starts[index]
                if parts[-1] and left < 0:
                    parts.append([])
                    left = self._batch_tokens - len(sequences[index])
                parts[-1].append(index)
        return parts

    def _forward(self, batch: Sequence[_Work]) -> list[list[packed.Scored]]:
        answers = iter(
            packed.score_top(
                self._model,
                [ids for work in batch for ids in work.sequences],
                [work.start for work in batch for _ in work.sequences],
                max(work.top for work in batch),
                _candidates(batch),
                entropy=any(work.more.entropy for work in batch),
            )
        )
        return [[next(answers) for _ in work.sequences] for work in batch]


def _candidates(batch: Sequence[_Work]) -> torch.Tensor | None:
    """[C, m] those of all sequences, filled up with any token where others have more."""
    width = max(work.more.width for work in batch)
    if not width:
        return None
    counts = [len(ids) - work.start for work in batch for ids in work.sequences]
    table = torch.zeros(sum(counts), width, dtype=torch.int64)
    named: list[TokenIds | None] = []
    for work in batch:
        named += work.more.candidates or [None] * len(work.sequences)
    for part, ids in zip(torch.split(table, counts), named, strict=True):
        if ids is not None:
            part[:, : ids.shape[1]] = torch.tensor(ids)
    return table
