"""The one door to a sandbox: whoever runs untrusted programs prepares one here, by its level."""

from __future__ import annotations

from pathlib import Path

from services.sandbox.bubblewrap import Bubblewrap
from services.sandbox.confined import Level, Sandbox
from services.sandbox.landlock import Landlock


async def prepare(level: Level, python: Path | None = None) -> Sandbox:
    """A sandbox of this level, after a probe tried to get out of it and could not.

    Args:
        level: what confines the programs. It is never exchanged for another one.
        python: the interpreter for the programs; None takes this one's, without its packages.

    Raises:
        SandboxRefused: something is missing here, which the message names, or the probe got out.
    """
    match level:
        case "bubblewrap":
            return await Bubblewrap.prepare(python)
        case "landlock":
            return await Landlock.prepare(python)
