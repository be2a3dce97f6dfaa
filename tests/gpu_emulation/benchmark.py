"""The parts of `benchmarks.gpu` at full size on a fake GPU, with one layer; what each of them
called, as JSON. Sampling and the small run are missing: they go by values.

python -m tests.gpu_emulation.benchmark
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_parts import MATRIX_RATE, Found, Known, Shapes
from tests.gpu_emulation.fake_cuda import FakeCuda, pretend

SHAPES = Shapes(layers=1)
PARTS: dict[str, Callable[[Shapes, Known], list[Found]]] = {
    "matrix rate": gpu_parts.matrix_rate,
    **{
        regime: partial(gpu_parts.utilisation, regime=regime, budget=SHAPES.small_pack)
        for regime in gpu_parts.REGIMES
    },
    "output layer": partial(gpu_parts.head, name="ours"),
    "weights": gpu_parts.weights_off_the_device,
    "scoring": gpu_parts.scoring,
}


def main() -> None:
    """Prints the operators of each part, each with the precision of what it was given."""
    pretend()
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 0
    called: dict[str, list[str]] = {}
    for name, part in PARTS.items():
        with FakeCuda() as device:
            part(SHAPES, {MATRIX_RATE: 620.0})
        called[name] = sorted(device.calls)
    print(json.dumps(called, indent=2))


if __name__ == "__main__":
    main()
