"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import AdamW

from trainer.config import OptimizerConfig


def adamw(trained: Iterable[Tensor], config: OptimizerConfig) -> AdamW:
    """AdamW that decays matrices only: decaying norms and biases has no meaning."""
    parameters = list(trained)
    on_gpu = all(p.is_cuda for p in parameters)  # offloaded ones compute on the CPU
    return AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=on_gpu,  # the other way takes a second copy of all gradients for its temporaries
    )


def lr_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """The share of the learning rate that each step takes, from 0 on."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant" or total_steps == math.inf:
            return 1.0
        span = max(1.0, total_steps - config.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))

    return factor
