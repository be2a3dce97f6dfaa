"""Each data source gets its own kind of judge, one's own function included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.errors import Unavailable
from services.trajectory import Verdict
from verifier.config import VerifierConfig
from verifier.constraints import judge
from verifier.judges import Judges

OWN = """
from services.trajectory import Verdict

def judge(completion, reference):
    return Verdict("correct" if completion[::-1] == reference else "incorrect", "read backwards")
"""


async def test_every_data_source_has_its_own_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backwards.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = VerifierConfig(
        kinds={
            "words": "exact",
            "programs": "code",
            "rules": "verifier.constraints:judge",
            "mirror": "backwards:judge",
        }
    )
    program = json.dumps({"inputs": ["2"], "outputs": ["4"]})
    async with Judges(config) as judges:
        found = [
            await judges.judge("deepmath", r"\boxed{\frac{2}{4}}", "0.5"),
            await judges.judge("words", "0.5", "0.5"),
            await judges.judge("programs", "print(int(input()) * 2)", program),
            await judges.judge("rules", "three short words", '{"max_words": 3}'),
            await judges.judge("mirror", "abc", "cba"),
            await judges.judge("mirror", "abc", "abc"),
        ]
        assert judges.queue() == {"waiting": 0, "slow": 0, "replaced": 0}
    assert [verdict.outcome for verdict in found] == [*["correct"] * 5, "incorrect"]


async def test_a_function_that_is_not_there_is_named() -> None:
    config = VerifierConfig(kind="verifier.constraints:jugde")
    with pytest.raises(Unavailable, match="jugde"):
        async with Judges(config):
            pass


@pytest.mark.parametrize(
    ("completion", "rules", "verdict"),
    [
        ("in paris", {"max_words": 2, "lowercase": True}, Verdict("correct", "keeps all rules")),
        ("Paris", {"contains": ["Paris"]}, Verdict("correct", "keeps all rules")),
        ("a\nb", {"lines": 3}, Verdict("incorrect", "breaks the rule lines")),
        ("London", {"avoids": ["London"]}, Verdict("incorrect", "breaks the rule avoids")),
    ],
)  # fmt: skip
def test_rules(completion: str, rules: dict[str, object], verdict: Verdict) -> None:
    assert judge(completion, json.dumps(rules)) == verdict


@pytest.mark.parametrize("reference", ["", "[]", "{}", '{"max_wrods": 3}'])
def test_rules_that_nobody_knows_leave_it_unknown(reference: str) -> None:
    assert judge("anything", reference).outcome == "unknown"
