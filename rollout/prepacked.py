"""Linear layers of few rows on a CPU.

A decoding step multiplies every weight matrix by a handful of rows, so the time goes into bringing
the matrix into the order that the kernel reads, anew each time. oneDNN can keep a matrix in that
order: up to 3 times as fast at 1 to 64 rows (a matrix of few outputs loses a little with one row),
for a second copy of the weights in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS = 32  # that the order is chosen for; from 1 to 192 rows others were no faster


def prepack(model: PreTrainedModel) -> None:
    """Puts `PrepackedLinear` in the place of a model's linear layers, where oneDNN can run it:
    float32 on an x86 CPU. Parameters stay the same objects under the same names."""
    avx = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not avx or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for name, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        if type(layer) is nn.Linear and _fits(weight):
            model.set_submodule(name, PrepackedLinear(layer), strict=True)


def _fits(weight: Tensor | None) -> bool:
    return weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float32


class PrepackedLinear(nn.Linear):
    """`nn.Linear` without gradients. It shares its parameters with the layer it is made of, and
    packs the matrix again whenever that was written to."""

    def __init__(self, layer: nn.Linear) -> None:
        bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, bias=bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._packed: Tensor | None = None
        self._packed_version = -1

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if torch.is_grad_enabled():
            return super().forward(input)
        version = self.weight._version  # counts the writes to a tensor
        if version != self._packed_version:
            # The two calls are those that torch.compile freezes a CPU model's layers into.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
            self._packed_version = version
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "none", [], ""
        )
        return out
