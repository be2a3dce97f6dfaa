"""The output layer's Triton kernels. With TRITON_INTERPRET=1 they run on the CPU: the largest
difference of their log-probs, entropies and gradients from torch's in float64. Without it, they are
compiled for GPUs that need not be there. Prints JSON.
"""

from __future__ import annotations

import json
import os

import torch

from services import head_kernels
from tests.gpu_emulation.compiling import CAPABILITIES, binaries


def differences(rows: int, vocabulary: int, targets: int, dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(vocabulary)
    logits = (torch.randn(rows, vocabulary) * 8).to(dtype)
    logits[0] += 200  # which exp() alone would turn into infinity
    logits[-1, 1:-1] = -torch.inf
    ids = torch.randint(vocabulary, (rows, targets))
    ids[-1] = 0
    pulls = torch.randn(2, rows, targets)
    slope = torch.empty(rows, vocabulary)
    exact, worst = logits.double().requires_grad_(), 0.0
    loss = torch.zeros((), dtype=torch.float64)
    for index, (temperature, pull) in enumerate(zip((1.0, 0.6), pulls, strict=True)):
        normaliser, entropy = head_kernels.summary(logits, temperature)
        head_kernels.add_slope(logits, normaliser, ids, pull, slope, temperature, not index)
        table = torch.log_softmax(exact / temperature, 1)
        spread = torch.special.entr(table.exp()).sum(1)
        loss = loss + (table.gather(1, ids) * pull).sum()
        scores = logits.gather(1, ids).double() / temperature - normaliser[:, None]
        worst = max(worst, float((scores - table.gather(1, ids)).detach().abs().max()))
        worst = max(worst, float((entropy - spread).detach().abs().max()))
    loss.backward()
    assert exact.grad is not None
    return {"values": worst, "gradient": float((slope - exact.grad).abs().max())}


def compiled(capability: int) -> list[str]:
    """The kernels as binaries for NVIDIA GPUs of this compute capability."""
    pointers = {"logits": "*bf16", "normaliser": "*fp32", "entropy": "*fp32"}
    numbers = {"vocabulary": "i32", "stride": "i32", "sharpness": "fp32"}
    more = {"targets": "*i64", "gradients": "*fp32", "slope": "*bf16"}
    sizes = {"TARGETS": 9, "ADD": 1, "BLOCK": head_kernels._BLOCK}
    kernels = [head_kernels.summarise, head_kernels.differentiate]
    return binaries(kernels, {**pointers, **numbers, **more}, sizes, capability)


def main() -> None:
    """Prints what was found."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        cases = [(3, 17, 1), (2, 4_096, 3), (4, 9_001, 2)]
        made = [
            differences(*case, dtype) for case in cases for dtype in (torch.float32, torch.bfloat16)
        ]
        print(json.dumps({name: max(part[name] for part in made) for name in made[0]}))
    else:
        print(json.dumps({capability: compiled(capability) for capability in CAPABILITIES}))


if __name__ == "__main__":
    main()
