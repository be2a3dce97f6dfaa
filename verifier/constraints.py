"""Does a text keep the rules? An example of a domain of its own: one function, no model, no maths.

In a run's config: `kinds: {my_source: "verifier.constraints:judge"}`. The reference is JSON with
any of these rules:

    {"max_words": 50, "contains": ["Paris"], "avoids": ["however"], "lines": 3, "lowercase": true}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from services.trajectory import Verdict

_RULES: dict[str, Callable[[str, Any], bool]] = {
    "max_words": lambda text, most: len(text.split()) <= most,
    "contains": lambda text, words: all(word in text for word in words),
    "avoids": lambda text, words: not any(word in text for word in words),
    "lines": lambda text, count: len(text.splitlines()) == count,
    "lowercase": lambda text, wanted: text.islower() == wanted,
}


def judge(completion: str, reference: str) -> Verdict:
    """Correct if every rule of the reference is kept; the reason names the first that is not."""
    try:
        rules = json.loads(reference)
    except ValueError:
        return Verdict("unknown", "the reference is not JSON")
    if not isinstance(rules, dict) or not rules or not rules.keys() <= _RULES.keys():
        return Verdict("unknown", f"the reference is not an object of {', '.join(_RULES)}")
    for name, wanted in rules.items():
        if not _RULES[name](completion.strip(), wanted):
            return Verdict("incorrect", f"breaks the rule {name}")
    return Verdict("correct", "keeps all rules")
