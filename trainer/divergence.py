"""Divergences of the student from the teacher at each token, over the teacher's `k` most likely.

What lies outside of them is one more outcome, the tail, so both sides stay distributions and a
divergence of 0 says that they agree on the `k` tokens. With `k` the whole vocabulary the values
are the exact ones. The sampled estimate sees one token in the place of these.

Axes: `C` completion tokens, `k` most likely tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.objectives.config import Divergence

# What float32 cannot tell from 0 in a sum of 1 is taken for this much. Less would make the tail's
# gradient, which is divided by it, one of rounding errors.
_SMALLEST_TAIL = 1e-6
_NOWHERE = -100.0  # nats of a token that is on neither side: adds exactly nothing


def divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """[C] nats, differentiable in the student's log-probs.

    Args:
        student: [C, k] log-probs of the teacher's tokens, nats.
        teacher: [C, k] its own; −inf where the student has no such token (and its value is of any
            other), so that the token is part of the tail.
        kind: KL(teacher ‖ student), KL(student ‖ teacher), or the mean of both sides' KL to
            their even mixture (Jensen-Shannon, at most log 2).
    """
    outside = teacher == -math.inf
    log_s = _with_tail(student.masked_fill(outside, _NOWHERE))
    log_t = _with_tail(teacher.masked_fill(outside, _NOWHERE))
    if kind == "forward_kl":
        return _kl(log_t, log_s)
    if kind == "reverse_kl":
        return _kl(log_s, log_t)
    mixture = torch.logaddexp(log_s, log_t) - math.log(2.0)
    return 0.5 * (_kl(log_s, mixture) + _kl(log_t, mixture))


def entropy(teacher: Tensor) -> Tensor:
    """[C] nats, of the distribution over the teacher's tokens and the tail. It is at most that over
    the vocabulary: the tail counts as one outcome.

    Args:
        teacher: as `divergence` takes it.
    """
    log_t = _with_tail(teacher.masked_fill(teacher == -math.inf, _NOWHERE))
    return -(log_t.exp() * log_t).sum(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """[C, k + 1]. A tail that is too small to be seen keeps its gradient: a student that is sure
    of the `k` tokens must still be able to learn that the teacher is not."""
    rest = 1.0 - logprobs.exp().sum(1, keepdim=True)
    seen = rest + (rest.clamp_min(_SMALLEST_TAIL) - rest).detach()
    return torch.cat([logprobs, seen.log()], 1)
