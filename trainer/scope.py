"""The paper's two weightings (SCOPE, arXiv 2604.10688), as one function on the device.

PPL(y|x) = exp(mean NLL), so PPL^(1/τ) normalised over a path is a softmax of (mean NLL)/τ over
it, and PPL^(−1/τ) one of −(mean NLL)/τ. The perplexity itself is never formed: it overflows
float32 at a mean NLL of 89 nats, the softmax does not.

Axes: `N` trajectories of the global batch, `G` groups (prompts).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def path_weights(
    mean_nll: Tensor,
    group: Tensor,
    member: Tensor,
    *,
    tau: float = 1.0,
    higher_ppl_higher_weight: bool,
    normalization: Literal["paper", "released"] = "paper",
) -> Tensor:
    """Weights of one path's trajectories, normalised within each group.

    Args:
        mean_nll: [N] mean negative log-likelihood per token, nats; read only where `member`.
        group: [N] int64, which group each trajectory belongs to.
        member: [N] bool, which trajectories are on this path.
        tau: temperature of the softmax.
        higher_ppl_higher_weight: True is the student path's w ∝ PPL^(1/τ), False the teacher
            path's w ∝ PPL^(−1/τ).
        normalization: over the members of a group the weights sum to 1 ("paper") or to the
            number of members ("released", so that their mean is 1).

    Returns:
        [N] weights, zero outside `member`. A group without members gets none.
    """
    sign = 1.0 if higher_ppl_higher_weight else -1.0
    score = torch.where(member, sign * mean_nll / tau, -torch.inf)
    groups = int(group.max()) + 1 if group.numel() else 0
    peak = score.new_full((groups,), -torch.inf).scatter_reduce(0, group, score, "amax")
    power = torch.where(member, torch.exp(score - peak[group]), 0.0)
    total = power.new_zeros(groups).index_add(0, group, power)
    weight = torch.where(member, power / total[group], 0.0)
    if normalization == "released":
        size = power.new_zeros(groups).index_add(0, group, member.to(power.dtype))
        weight = weight * size[group]
    return weight


def relative_weights(weight: Tensor, group: Tensor, member: Tensor) -> Tensor:
    """[members] each member's weight over the mean of its group's: 1 where all weigh the same."""
    groups = int(group.max()) + 1 if group.numel() else 0
    zeros = weight.new_zeros(groups)
    total = zeros.index_add(0, group, torch.where(member, weight, 0.0))
    count = zeros.index_add(0, group, member.to(weight.dtype))
    return (weight * count[group] / total[group])[member]


def effective_sample_size(weight: Tensor, group: Tensor, member: Tensor) -> Tensor:
    """Mean over the groups with members of (Σw)² / Σw²: 1 when one trajectory has it all, the
    number of members when all weigh the same. Zero when no group has members."""
    groups = int(group.max()) + 1 if group.numel() else 0
    zeros = weight.new_zeros(groups)
    total = zeros.index_add(0, group, weight)
    squares = zeros.index_add(0, group, weight.square())
    present = zeros.index_add(0, group, member.to(weight.dtype)) > 0
    ess = torch.where(present, total.square() / squares.clamp_min(1e-30), 0.0)
    return ess.sum() / present.sum().clamp_min(1)
