"""Measurements that take minutes each, kept one by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def say(line: str) -> None:
    """How far it is, at once and apart from the table."""
    print(line, file=sys.stderr, flush=True)


class Kept:
    """Finished measurements, one JSON object a line: an interruption loses none of them."""

    def __init__(self, path: Path | None, unit: str) -> None:
        """Args:
        path: where they are kept; None keeps them in memory.
        """
        self._path, self._unit = path, unit
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self._rates = {tuple(key): rate for key, rate in map(json.loads, lines)}

    def has(self, *key: str | int) -> bool:
        return key in self._rates

    def rate(self, *key: str | int, measure: Callable[[], float]) -> float:
        """What is kept under a key, or else what `measure` finds."""
        if not self.has(*key):
            self._rates[key] = measure()
            if self._path:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._rates[key]]) + "\n")
        say(f"{' '.join(map(str, key))}: {self._rates[key]:,.4g} {self._unit}")
        return self._rates[key]

    def forget(self, *start: str | int) -> None:
        """Drops what has such a key, so that it is measured again."""
        for key in [key for key in self._rates if key[: len(start)] == start]:
            del self._rates[key]
