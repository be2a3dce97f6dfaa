"""Divergences of the student from the teacher at each token, over the teacher's `k` most likely.

What lies outside of them is one more outcome, the tail, so both sides stay distributions and a
divergence of 0 says that they agree on the `k` tokens. With `k` the whole vocabulary the values
are the exact ones. The sampled estimate sees one token in the place of these.

Axes: `C` completion tokens, `k` most likely tokens.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]

_SMALLEST_TAIL = 1e-8  # below what float32 can tell from 0 in a sum of 1


def divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """[C] nats, differentiable in the student's log-probs.

    Args:
        student, teacher: [C, k] log-probs of the same tokens, nats.
        kind: KL(teacher ‖ student), KL(student ‖ teacher), or the mean of both sides' KL to
            their even mixture (Jensen-Shannon, at most log 2).
    """
    log_s, log_t = _with_tail(student), _with_tail(teacher)
    if kind == "forward_kl":
        return _kl(log_t, log_s)
    if kind == "reverse_kl":
        return _kl(log_s, log_t)
    mixture = torch.logaddexp(log_s, log_t) - math.log(2.0)
    return 0.5 * (_kl(log_s, mixture) + _kl(log_t, mixture))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """[C, k + 1]"""
    rest = (1.0 - logprobs.exp().sum(1, keepdim=True)).clamp_min(_SMALLEST_TAIL)
    return torch.cat([logprobs, rest.log()], 1)
