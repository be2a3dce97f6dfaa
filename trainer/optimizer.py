"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from trainer.config import OptimizerConfig


class OffloadedAdamW(AdamW):
    """AdamW whose moments lie in page-locked memory of the host. A step takes those of one
    parameter at a time to its device, and back."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as AdamW's; it takes no closure."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "params": [parameter]}]
                        self._step_of(parameter)
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies back have left their buffers

    def _step_of(self, parameter: Tensor) -> None:
        held = moments(self, parameter)
        there = {k: v.to(parameter.device, non_blocking=True) for k, v in held.items()}
        self.state[parameter] = there
        super().step()
        for name, value in held.items():
            value.copy_(there[name], non_blocking=True)
        self.state[parameter] = held


def moments(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter, which it makes itself only in its first step."""
    made: dict[str, Tensor] = optimizer.state[parameter]
    if not made:
        offloaded = isinstance(optimizer, OffloadedAdamW)
        # The fused step reads the count of steps where it computes, the plain one on the host.
        fused = optimizer.defaults["fused"] and not offloaded
        made["step"] = torch.tensor(0.0, device=parameter.device if fused else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            on_host: Any = {"device": "cpu", "pin_memory": parameter.is_cuda} if offloaded else {}
            made[name] = torch.zeros_like(parameter, **on_host)
    return made


def adamw(trained: Iterable[Tensor], config: OptimizerConfig) -> AdamW:
    """AdamW that decays matrices only: decaying norms and biases has no meaning."""
    parameters = list(trained)
    on_gpu = all(p.is_cuda for p in parameters)  # offloaded ones compute on the CPU
    made = OffloadedAdamW if config.offload else AdamW
    return made(
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
