"""`scope verify`, as the shell runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deploy.cli import main
from tests.deploy.conftest import ROOT


def scope_verify(file: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["verify", str(file), *options])
    return int(str(end.value.code or 0))


def test_judges_a_file_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(r"\boxed{\frac{2}{4}}", "0.5"), (r"\boxed{5 m}", "5 cm"), (r"\boxed{5}", r"\beth_1")]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"completion": c, "reference": r, "data_source": "x"}) for c, r in rows]
    file.write_text("\n".join([*lines, "", ""]))
    assert scope_verify(file) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["verdict"] for line in found] == ["correct", "incorrect", "unknown"]
    assert all(line["seconds"] >= 0 and line["reason"] for line in found)
    assert "3 rows: 1 correct (33.3%), 1 incorrect (33.3%), 1 unknown (33.3%)" in printed.err


def test_a_run_s_config_says_who_judges_which_data_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    kinds = {"rules": "verifier.constraints:judge"}
    verifier = {"kind": "exact", "answer_marker": "=>", "kinds": kinds}
    demo = yaml.safe_load((ROOT / "deploy/runs/demo.yaml").read_text())
    run.write_text(yaml.safe_dump({**demo, "verifier": verifier}))
    rule = '{"max_words": 2}'
    rows = [("in Paris", rule, "rules"), ("so => b", "b", "words"), ("in Paris", rule, "words")]
    file = tmp_path / "rows.jsonl"
    lines = [{"completion": c, "reference": r, "data_source": s} for c, r, s in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scope_verify(file, "--config", str(run)) == 0
    found = [json.loads(line)["verdict"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["correct", "correct", "incorrect"]


def test_programs_that_cannot_be_confined_are_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"completion": "print(1)", "reference": "{}"}')
    monkeypatch.setenv("PATH", "")
    assert scope_verify(file, "--kind", "code") == 1
    printed = capsys.readouterr()
    assert "install the package `bubblewrap`" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ('{"completion": "1"}', [], "line 1 is not a row to judge: KeyError: 'reference'"),
        ("[1]", [], "line 1 is not a row to judge: TypeError"),
        ('{"completion": 1, "reference": "1"}', [], "reference and data_source must be text"),
        ("", ["--kind", "maths"], "`maths` is no kind"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    sentence: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert scope_verify(file, *options) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
