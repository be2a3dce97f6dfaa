from __future__ import annotations

from pathlib import Path

import pytest

from services.files import resolve, without_keys


def test_a_path_and_its_url_are_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("here")
    for where in (str(tmp_path / "a"), f"file://{tmp_path}/a", f"local://{tmp_path}/a"):
        files, path = resolve(where)
        assert files.open_input_file(path).read() == b"here"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("s3://key:secret@bucket/data/?endpoint_override=h:1", "s3://bucket/data"),
        ("data/train.jsonl", "data/train.jsonl"),
    ],
)
def test_what_people_read_holds_no_key(where: str, said: str) -> None:
    assert without_keys(where) == said
