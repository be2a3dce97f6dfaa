"""The trajectories of one batch while they grow, and how each next token is drawn.

Axes: as in `rollout.transformers_engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout.engine import Completion, SamplingError
from services.trajectory import Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """One group to be sampled."""

    prompt_ids: Sequence[int]
    sampling: Sampling


class Rows:
    """The trajectories of one batch while they grow. A row keeps its number when others are
    dropped from the batch; `_active_A` says which rows the batch still consists of."""

    def __init__(
        self, requests: Sequence[Request], end_tokens: Sequence[int], device: torch.device
    ) -> None:
        counts = [r.sampling.n for r in requests]
        lengths_B = torch.tensor([len(r.prompt_ids) for r in requests])
        limits_B = torch.tensor([r.sampling.max_tokens for r in requests])
        temperatures_B = torch.tensor([r.sampling.temperature for r in requests])
        self.longest = int(limits_B.max())
        self.prompt_ids_BP, self.prompt_mask_BP = _padded(requests, device)
        prompt_R = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(counts))
        self.prompt_R = prompt_R.to(device)
        self._counts = counts
        self._end_tokens = torch.tensor(list(end_tokens), device=device)
        self._prompt_length_R = lengths_B[prompt_R].to(device)
        self._limit_R = limits_B[prompt_R].to(device)
        self._temperature_R = temperatures_B[prompt_R].to(device)
        self._uniform_RT = _uniforms(requests, self.longest).to(device)
        self._tokens_RT = torch.zeros(self._uniform_RT.shape, dtype=torch.int64, device=device)
        self._logprobs_RT = torch.zeros(self._uniform_RT.shape, device=device)
        most = max(r.sampling.top for r in requests)
        self._tops = [r.sampling.top for r in requests for _ in range(r.sampling.n)]
        self._top_RTK = torch.zeros(
            (*self._uniform_RT.shape, most), dtype=torch.int32, device=device
        )
        self._length_R = torch.zeros(len(prompt_R), dtype=torch.int64, device=device)
        self._stopped_R = torch.zeros(len(prompt_R), dtype=torch.bool, device=device)
        self._mask_RS = torch.cat(  # S = P + T
            [self.prompt_mask_BP[self.prompt_R], torch.ones_like(self._tokens_RT)], dim=1
        )
        self._active_A = torch.arange(len(prompt_R), device=device)

    @property
    def count(self) -> int:
        """A: how many rows the batch has now."""
        return len(self._active_A)

    def choose(self, step: int, logits_AV: Tensor) -> None:
        """Draws the next token of every row; finished rows that are still in the batch get one
        as well, past their end."""
        active = self._active_A
        tokens_A, logprobs_A = draw(
            logits_AV, self._temperature_R[active], self._uniform_RT[active, step]
        )
        self._tokens_RT[active, step] = tokens_A
        self._logprobs_RT[active, step] = logprobs_A
        if most := self._top_RTK.shape[2]:
            self._top_RTK[active, step] = logits_AV.topk(most, dim=-1).indices.int()
        growing_A = self._length_R[active] == 0
        stops_A = growing_A & torch.isin(tokens_A, self._end_tokens)
        ends_A = stops_A | (growing_A & (self._limit_R[active] == step + 1))
        self._stopped_R[active] |= stops_A
        self._length_R[active[ends_A]] = step + 1

    def drop_finished(self) -> Tensor | None:
        """Drops finished rows from the batch. Returns, if there were any, which row of the batch
        each place of it now holds: those that stay keep their places, but for the last ones,
        which fill the gaps."""
        growing_A = self._length_R[self._active_A] == 0
        count = int(growing_A.sum())
        if count == self.count:
            return None
        kept = torch.arange(count, device=growing_A.device)
        kept[~growing_A[:count]] = count + growing_A[count:].nonzero().squeeze(1)
        self._active_A = self._active_A[kept]
        return kept

    def last_tokens(self, step: int) -> Tensor:
        """[A, 1]"""
        return self._tokens_RT[self._active_A, step, None]

    def whole(self, step: int) -> Tensor:
        """[A, P + step + 1]: the prompts, and what was drawn after them."""
        active = self._active_A
        prompts = self.prompt_ids_BP[self.prompt_R[active]]
        return torch.cat([prompts, self._tokens_RT[active, : step + 1]], dim=1)

    def positions(self, step: int) -> Tensor:
        """[A, 1]: the place of the last token in its sequence, padding not counted."""
        return (self._prompt_length_R[self._active_A] + step)[:, None]

    def mask(self, step: int) -> Tensor:
        """[A, P + step + 1]: 0 on padding."""
        return self._mask_RS[self._active_A, : self.prompt_ids_BP.shape[1] + step + 1]

    def completions(self) -> list[list[Completion]]:
        """Those of each request, in its order."""
        tokens = self._tokens_RT.to(torch.int32).cpu().numpy()
        logprobs = self._logprobs_RT.cpu().numpy()
        tops = self._top_RTK.cpu().numpy()
        made: list[Completion] = []
        for row, (length, stopped) in enumerate(
            zip(self._length_R.tolist(), self._stopped_R.tolist(), strict=True)
        ):
            # Copies: views would keep the arrays of the whole batch alive.
            ids, lps = tokens[row, :length].copy(), logprobs[row, :length].copy()
            top = tops[row, :length, :k].copy() if (k := self._tops[row]) else None
            made.append(Completion(ids, lps, "stop" if stopped else "length", top=top))
        ends = np.cumsum(self._counts)
        return [made[end - n : end] for end, n in zip(ends, self._counts, strict=True)]


def draw(logits_AV: Tensor, temperature_A: Tensor, uniform_A: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the [A] tokens at which the cumulated probability passes
    `uniform_A` (float64, in [0, 1)), and their log-probs (float32).

    A token of probability zero is never drawn: the CDF does not rise there.

    Raises:
        SamplingError: the logits are no numbers.
    """
    logprobs_AV = torch.log_softmax(logits_AV.float() / temperature_A[:, None], -1)
    # In float32 the CDF of a large vocabulary would lose its least likely tokens.
    cdf_AV = logprobs_AV.exp().cumsum(-1, dtype=torch.float64)
    total_A1 = cdf_AV[:, -1:]
    if not bool(torch.isfinite(total_A1).all()):
        raise SamplingError("the model computed logits that are not finite")
    tokens_A1 = torch.searchsorted(cdf_AV, uniform_A[:, None] * total_A1, right=True)
    return tokens_A1.squeeze(1), logprobs_AV.gather(1, tokens_A1).squeeze(1)


def _uniforms(requests: Sequence[Request], longest: int) -> Tensor:
    """[R, T] float64 in [0, 1): one stream a row, keyed by group seed and place in the group."""
    values = np.zeros((sum(r.sampling.n for r in requests), longest))
    row = 0
    for sampling in (r.sampling for r in requests):
        for index in range(sampling.n):
            stream = np.random.Philox(np.random.SeedSequence(sampling.seed, spawn_key=(index,)))
            count = sampling.max_tokens
            values[row, :count] = np.random.Generator(stream).random(count)
            row += 1
    return torch.from_numpy(values)


def _padded(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, P] prompts padded on the left, where the cache can go on growing, and their mask."""
    longest = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, request in enumerate(requests):
        start = longest - len(request.prompt_ids)
        ids[index, start:] = torch.tensor(list(request.prompt_ids))
        mask[index, start:] = 1
    return ids.to(device), mask.to(device)
