from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import yaml_file
from deploy.yaml_file import UnreadableYaml
from tests.deploy.conftest import ROOT

OURS = sorted(
    file
    for folder in ("deploy", "docs", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.y*ml")
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice in one table, in lines 1 and 3"),
        ("s:\n  x: 1\n  'x': 2\n", "the key 'x' stands twice in one table, in lines 2 and 3"),
        ("s: {x: 1, x: 2}", "the key 'x' stands twice in one table, in lines 1 and 1"),
        ("- a: 1\n  a: 1\n", "in lines 1 and 2"),
        ('{"a": 1, "a": 2}', "in lines 1 and 1"),
        ("a:\n\tb: 1\n", "line 2 is indented with a tab, where YAML takes spaces only"),
        ("a: [", "this is not YAML: line 1: expected the node content"),
        ("a: 1\nb: \x00", "this is not YAML: line 2 holds the character '\\x00'"),
        ("a: 2026-13-01", "this is not YAML: month must be in 1..12"),
        ("[" * 5000, "this is not YAML: maximum recursion depth exceeded"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UnreadableYaml) as caught:
        yaml_file.read(file)
    assert str(caught.value).startswith(f"{file}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("a: 1\n# für\n".encode("latin-1"))
    with pytest.raises(UnreadableYaml, match=r"x\.yaml is not UTF-8: line 2 holds the byte 0xfc$"):
        yaml_file.read(file)
    file.write_text("a: für", encoding="utf-8-sig")  # as Windows' editors write it
    assert yaml_file.read(file) == {"a": "für"}
    with pytest.raises(UnreadableYaml, match=r"cannot read .*: Is a directory"):
        yaml_file.read(tmp_path)


def test_a_merged_table_may_be_written_over() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n"
    assert yaml_file.parse(text) == yaml.safe_load(text)


keys = st.text("abx1", min_size=1, max_size=2)
values = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
)


@settings(deadline=None)
@given(values)
def test_everything_else_is_read_as_pyyaml_reads_it(value: object) -> None:
    for flow in (True, False):
        assert yaml_file.parse(yaml.safe_dump(value, default_flow_style=flow)) == value


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_no_file_of_ours_has_a_key_twice(file: Path) -> None:
    assert list(yaml.load_all(file.read_text(encoding="utf-8"), yaml_file.Loader))
