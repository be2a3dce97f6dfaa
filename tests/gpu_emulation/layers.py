"""The Triton kernels between a layer's matrices. With TRITON_INTERPRET=1 they run on the CPU: the
largest difference, relative to the largest value, of what they give and of all gradients from
torch's in float64. Without it, they are compiled for GPUs that need not be there. Prints JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services import layer_kernels
from tests.gpu_emulation.compiling import CAPABILITIES, binaries


def difference(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> float:
    """Of the outputs and of the gradients by all inputs that have one."""
    mine = [x.clone().requires_grad_(x.requires_grad) for x in (i.detach() for i in inputs)]
    mine = [m.requires_grad_(i.requires_grad) for m, i in zip(mine, inputs, strict=True)]
    exact = [i.detach().double().requires_grad_(i.requires_grad) for i in inputs]
    got, expected = fused(*mine), plain(*exact)
    pull = torch.randn(expected.shape, dtype=torch.float64)
    got.backward(pull.to(got.dtype))
    expected.backward(pull.to(got.dtype).double())
    pairs = [(got, expected)] + [(m.grad, e.grad) for m, e in zip(mine, exact, strict=True)]
    return max(
        float((a.double() - b).detach().abs().max() / b.detach().abs().max())
        for a, b in pairs
        if a is not None and b is not None
    )


def norm(dtype: torch.dtype, weight: torch.dtype, *shape: int) -> float:
    x = (torch.randn(*shape) * 3).to(dtype).requires_grad_()
    w = torch.randn(shape[-1]).to(weight).requires_grad_()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    return difference(lambda x, w: layer_kernels.rms_norm(x, w, 1e-6), plain, [x, w])


def product(dtype: torch.dtype, *shape: int) -> float:
    a, b = ((torch.randn(*shape) * 4).to(dtype).requires_grad_() for _ in range(2))
    a.data.view(-1)[:2] = torch.tensor([60.0, -60.0])
    return difference(
        layer_kernels.silu_product, lambda a, b: torch.nn.functional.silu(a) * b, [a, b]
    )


def rotation(dtype: torch.dtype, angles: torch.dtype, heads: int, tokens: int, width: int) -> float:
    # As projections lay them out, [1, T, H, D], and seen as [1, H, T, D].
    x = torch.randn(1, tokens, heads, width).to(dtype).transpose(1, 2).requires_grad_()
    # Not the same in both halves, as some models have it.
    cos, sin = (torch.randn(1, tokens, width).to(angles) for _ in range(2))

    def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return difference(layer_kernels.rotate, plain, [x, cos, sin])


def interpreted() -> dict[str, dict[str, float]]:
    """By kernel, in float32 and where anything is in bfloat16."""
    torch.manual_seed(0)
    exact, half = torch.float32, torch.bfloat16
    return {
        "norm": {
            "float32": max(norm(exact, exact, 3, 5, 17), norm(exact, exact, 2, 1536)),
            "bfloat16": max(norm(half, half, 1, 9, 128), norm(half, exact, 4, 5000)),
            # More rows than programs take at once.
            "many": norm(exact, exact, layer_kernels._PROGRAMS * 64 + 3, 64),
        },
        "product": {"float32": product(exact, 3, 4099), "bfloat16": product(half, 2, 3, 40)},
        "rotation": {
            "float32": max(rotation(exact, exact, 3, 7, 12), rotation(exact, exact, 2, 40, 128)),
            "bfloat16": max(rotation(half, exact, 2, 9, 64), rotation(half, half, 1, 3, 6)),
        },
    }


POINTERS = {
    "x": "*fp32", "weight": "*fp32", "out": "*bf16", "scales": "*fp32", "pull": "*bf16",
    "slope": "*fp32", "parts": "*fp32", "a": "*bf16", "b": "*bf16", "for_a": "*bf16",
    "for_b": "*bf16", "cos": "*fp32", "sin": "*fp32", "eps": "fp32", "sign": "fp32",
}  # fmt: skip
SIZES = {"ROWS": 2, "WIDTH": 2048, "HALF": 64, "BLOCK": layer_kernels._BLOCK}


def compiled(capability: int) -> list[str]:
    """The kernels as binaries for NVIDIA GPUs of this compute capability."""
    names = ("normalise", "normalise_back", "gate", "gate_back", "turn")
    return binaries([getattr(layer_kernels, name) for name in names], POINTERS, SIZES, capability)


def main() -> None:
    """Prints what was found."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(json.dumps(interpreted()))
    else:
        print(json.dumps({capability: compiled(capability) for capability in CAPABILITIES}))


if __name__ == "__main__":
    main()
