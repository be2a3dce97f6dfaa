"""Compiles Triton kernels for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 89, 90)  # A100; A10G; L4 and L40S; H100


def binaries(
    kernels: Sequence[Any], types: Mapping[str, str], sizes: Mapping[str, int], capability: int
) -> list[str]:
    """What came out of each kernel for NVIDIA GPUs of this compute capability: "ptx", "cubin".

    Args:
        types: of arguments by name, as Triton writes them; i32 where nothing is said.
        sizes: of those that are constants.
    """
    made = []
    for kernel in kernels:
        constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        signature = {
            name: "constexpr" if name in sizes else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        made += [name for name in ("ptx", "cubin") if binary.asm[name]]
    return made
