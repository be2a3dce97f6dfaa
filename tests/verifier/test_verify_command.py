"""`scope verify`, as the shell runs it."""

from __future__ import annotations

import json
import subprocess
import sys
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
    found = sorted(map(json.loads, printed.out.splitlines()), key=lambda line: line["line"])
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
    lines_out = sorted(
        map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["line"]
    )
    found = [line["verdict"] for line in lines_out]
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


def test_one_bad_row_ends_no_file_and_rows_keep_their_other_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        '{"id": 1, "completion": "#### 7", "reference": 7}',
        '{"id": 2, "completion": "1"}',
        "[1]",
        "{",
        '{"id": 5, "completion": 1, "reference": "1"}',
        '{"id": 6, "completion": "#### 8", "reference": 7.5}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows), encoding="utf-8")
    assert scope_verify(file, "--answer-from", "hashes") == 0
    found = sorted(
        map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["line"]
    )
    assert [line.get("id") for line in found] == [1, 2, None, None, 5, 6]
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["verdict"] for line in found] == ["correct", *["unknown"] * 4, "incorrect"]
    assert ["error" in line for line in found] == [False, *[True] * 4, False]
    assert "it has no `reference`" in found[1]["error"]


def test_verdicts_come_as_they_are_made_and_a_slow_row_delays_nobody(tmp_path: Path) -> None:
    """From a pipe that stays open: what was written is judged before more comes."""
    run = [sys.executable, "-c", "from deploy.cli import main; main()", "verify", "-"]
    rows = [("bomb", "1"), ("1", "1"), ("2", "2")]
    with subprocess.Popen(
        [*run, "--kind", "tests.verifier.endless:judge"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for completion, reference in rows:
            row = {"completion": completion, "reference": reference}
            process.stdin.write(json.dumps(row).encode() + b"\n")
        process.stdin.flush()
        first = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.stdin.close()
        last = json.loads(process.stdout.readline())
        assert process.wait() == 0
    assert sorted(line["line"] for line in first) == [2, 3]
    assert (last["line"], last["verdict"]) == (1, "unknown")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kind", "maths"], "`maths` is not a kind"),
        (["--answer-from", "anywhere"], "`anywhere` is no place of an answer"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("", encoding="utf-8")
    assert scope_verify(file, *options) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
