"""What was judged before. Students repeat themselves: most of a group's answers are the same."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict

from services.trajectory import Verdict


class VerdictCache:
    """The verdicts on the last `size` pairs of an answer and a reference; 0 remembers none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, *key: str) -> Verdict | None:
        """The verdict that was put under `key`, if it is still there."""
        digest = _digest(key)
        verdict = self._verdicts.get(digest)
        if verdict is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    def put(self, verdict: Verdict, *key: str) -> None:
        """Remembers `verdict`, and forgets the one that was asked for the longest ago.

        An `unknown` is not remembered: a busy machine's time-out would stick to an answer that the
        next try may well judge.
        """
        if not self._size or verdict.outcome == "unknown":
            return
        self._verdicts[_digest(key)] = verdict
        if len(self._verdicts) > self._size:
            self._verdicts.popitem(last=False)


def _digest(key: tuple[str, ...]) -> bytes:
    """Of fixed size, since an answer may be the whole completion. Unforgeable, since a student
    that found two answers with one digest could sell the wrong one as the right one."""
    return hashlib.sha256(json.dumps(key).encode()).digest()
