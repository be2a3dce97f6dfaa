"""AdamW with its moments on the host against torch's own, and its first step after a resume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.config import OptimizerConfig
from trainer.optimizer import OffloadedAdamW, adamw, moments

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def parameters(device: str) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(5, 3), (3,), (4, 3)]
    return [torch.randn(shape).to(device).requires_grad_() for shape in shapes]


def trained(
    made: list[Tensor], steps: int, *, offload: bool, resumed: bool = False
) -> list[Tensor]:
    """After steps in which one parameter has no gradient."""
    optimizer = adamw(made, OptimizerConfig(lr=1e-2, weight_decay=0.1, offload=offload))
    assert isinstance(optimizer, OffloadedAdamW) == offload
    if resumed:  # as a learner makes them, to be filled from a checkpoint
        for parameter in made:
            moments(optimizer, parameter)
    for _ in range(steps):
        for parameter in made[:2]:
            parameter.grad = (parameter.detach() ** 2).clone()
        optimizer.step()
    if offload:
        assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {
            "cpu"
        }
    return [
        *made,
        *(optimizer.state[p][n].cpu() for p in made[:2] for n in ("exp_avg", "exp_avg_sq")),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resumed", [False, True])
def test_moments_on_the_host_change_no_number(device: str, resumed: bool) -> None:
    expected = trained(parameters(device), 3, offload=False)
    found = trained(parameters(device), 3, offload=True, resumed=resumed)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_that_are_made_before_the_first_step_are_those_that_it_makes(device: str) -> None:
    """On a GPU the fused step reads its count of steps there."""
    expected = trained(parameters(device), 2, offload=False)
    for mine, theirs in zip(
        trained(parameters(device), 2, offload=False, resumed=True), expected, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_groups_and_state_are_those_of_adamw_after_a_step() -> None:
    made = parameters("cpu")
    optimizer = adamw(made, OptimizerConfig(offload=True))
    held = moments(optimizer, made[0])
    made[0].grad = torch.ones_like(made[0])
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert optimizer.state[made[0]] is held and float(held["step"]) == 1
