"""Log-probs of the output layer and their gradients, against log_softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services import output_layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reached", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("shape", [(11,), (11, 3)])
@pytest.mark.parametrize("at_once", [4, 11])
def test_log_probs_in_chunks_are_the_plain_ones_and_so_are_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
    bias: bool,
    reached: tuple[int, ...],
    shape: tuple[int, ...],
    at_once: int,
) -> None:
    """Against log_softmax in float64; `reached` are the temperatures that the loss looks at."""
    torch.manual_seed(0)
    temperatures = (1.0, 0.6)
    leaves = [
        torch.randn(11, 6).requires_grad_(),
        torch.randn(30, 6).requires_grad_(),
        torch.randn(30).requires_grad_(bias),
    ]
    targets, pull = torch.randint(0, 30, shape), torch.randn(2, *shape)
    hidden, weight, offset = (x.detach().double().requires_grad_() for x in leaves)
    logits = hidden @ weight.T + (offset if bias else 0.0)
    tables = [(logits / t).log_softmax(1) for t in temperatures]
    plain = torch.stack([t.gather(1, targets.view(11, -1)).view(shape) for t in tables])
    (plain[list(reached)] * pull[list(reached)].double()).sum().backward()

    monkeypatch.setitem(output_layer.CHUNK_BYTES, "cpu", 4 * 30 * at_once)
    got = output_layer.linear_logprobs(
        leaves[0], leaves[1], leaves[2] if bias else None, targets, temperatures
    )
    torch.testing.assert_close(got.logprobs.double(), plain, atol=1e-5, rtol=1e-5)
    entropy = -(tables[1].exp() * tables[1]).sum(1)
    torch.testing.assert_close(got.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    assert not got.entropy.requires_grad
    (got.logprobs[list(reached)] * pull[list(reached)]).sum().backward()
    for mine, theirs in zip(leaves, (hidden, weight, offset), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, at_once = 600, 500, 50
    monkeypatch.setitem(output_layer.CHUNK_BYTES, "cpu", 4 * vocabulary * at_once)
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with Largest() as largest:
        found = output_layer.linear_logprobs(
            hidden, weight, None, torch.zeros(tokens).long(), (1.0, 0.6)
        )
        found.logprobs[1].sum().backward()
    assert largest.elements == vocabulary * at_once
