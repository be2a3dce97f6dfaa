"""What the machine of a benchmark computes on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's model as Linux names it, or its architecture where that says nothing."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
