"""Every benchmark is read in the columns that it is published in, and judged as it should be."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.benchmarks import BENCHMARKS, convert
from rollout.config import DataConfig
from rollout.prompts import load_rows
from rollout.sources import DataError
from tests.builders import tiny_tokenizer

CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES)))).decode()

OLYMPIAD = {
    "id": 1, "question": "p", "solution": ["s"], "final_answer": ["2", "$-3$"], "context": None,
    "image_1": None, "modality": "Text-only", "is_multiple_answer": True, "unit": None,
    "answer_type": "Numerical",
}  # fmt: skip
# One row of each publication, with the columns that it has there, and the reference expected.
PUBLISHED: list[tuple[str, dict[str, Any], str]] = [
    ("aime24", {"id": 60, "problem": "p", "solution": "s", "answer": "204", "year": "2024"}, "204"),
    ("aime24", {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 33}, "33"),
    ("aime24", {"id": 60, "problem": "p", "answer": "033"}, "33"),
    ("aime25", {"question": "p", "answer": "70"}, "70"),
    ("aime25", {"problem": "p", "answer": 70, "solution": "s", "url": "u", "year": "2025"}, "70"),
    ("amc23", {"id": 0, "problem": "p", "answer": 27.0, "url": "u"}, "27"),
    ("amc23", {"id": 0, "question": "p", "answer": "27", "url": "u"}, "27"),
    ("math500", {"problem": "p", "solution": "s", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
    ("minerva", {"problem": "p", "solution": r"so $\boxed{x^{2}+1}$.", "idx": 0}, "x^{2}+1"),
    ("minerva", {"question": "p", "answer": "1.6e-3"}, "1.6e-3"),
    ("olympiadbench", OLYMPIAD, "2, $-3$"),
]  # fmt: skip


def saved(path: Path, row: dict[str, Any], suffix: str) -> Path:
    file = path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    else:
        file.write_text(json.dumps(row) + "\n")
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("name", "row", "reference"), PUBLISHED)
def test_mathematics(
    name: str, row: dict[str, Any], reference: str, suffix: str, tmp_path: Path
) -> None:
    (made,) = convert(name, saved(tmp_path, row, suffix))
    assert made["reward_model"]["ground_truth"] == reference
    assert made["data_source"] == name
    assert made["prompt"][0]["content"].startswith("p")
    assert BENCHMARKS[name].kind == "math"


def test_humaneval(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/0", "prompt": "def f(a):\n", "canonical_solution": "    return a\n",
        "test": "def check(c):\n    assert c(1) == 1\n", "entry_point": "f",
    }  # fmt: skip
    (made,) = convert("humaneval", saved(tmp_path, row, ".parquet"))
    reference = json.loads(made["reward_model"]["ground_truth"])
    assert reference == {name: row[name] for name in ("test", "entry_point", "prompt")}


def livecodebench_row(private: str, **changes: Any) -> dict[str, Any]:
    return {
        "question_title": "Sum", "question_content": "Add.", "platform": "atcoder",
        "question_id": "abc", "contest_id": "c", "contest_date": "2024-01-01T00:00:00",
        "starter_code": "", "difficulty": "easy", "public_test_cases": json.dumps(CASES),
        "private_test_cases": private, "metadata": "{}",
    } | changes  # fmt: skip


@pytest.mark.parametrize("private", [PACKED, json.dumps(CASES)])
def test_livecodebench_on_standard_input(private: str, tmp_path: Path) -> None:
    (made,) = convert("livecodebench", saved(tmp_path, livecodebench_row(private), ".jsonl"))
    assert json.loads(made["reward_model"]["ground_truth"]) == {"cases": CASES * 2}
    assert "standard input" in made["prompt"][0]["content"]


def test_livecodebench_with_a_function(tmp_path: Path) -> None:
    row = livecodebench_row(
        PACKED, starter_code="class Solution: ...", metadata=json.dumps({"func_name": "add"})
    )
    (made,) = convert("livecodebench", saved(tmp_path, row, ".jsonl"))
    assert json.loads(made["reward_model"]["ground_truth"])["fn_name"] == "add"
    assert "class Solution" in made["prompt"][0]["content"]


class _Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


def test_a_hostile_pickle_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = base64.b64encode(zlib.compress(pickle.dumps(_Attack()))).decode()
    with pytest.raises(DataError, match=r"asks for posix\.mkdir"):
        convert("livecodebench", saved(tmp_path, livecodebench_row(hostile), ".jsonl"))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime26", {"problem": "p"}, "there is no benchmark 'aime26'"),
        ("aime24", {"problem": "p"}, "none of the columns answer, Answer"),
        ("aime24", {"problem": "p", "answer": "1.5"}, "not a whole number"),
        ("minerva", {"problem": "p", "solution": "no box"}, "row 0 is not a row of minerva"),
        ("olympiadbench", {"question": "p", "final_answer": ["1"], "image_1": "x"}, "an image"),
    ],
)
def test_another_shape_is_one_sentence(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        convert(name, saved(tmp_path, row, ".jsonl"))


def test_converted_rows_are_a_dataset_of_this_project(tmp_path: Path) -> None:
    rows = convert("amc23", saved(tmp_path, {"problem": "12+3", "answer": 15.0}, ".parquet"))
    file = tmp_path / "converted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made,) = load_rows(DataConfig(path=file, max_prompt_tokens=1000), tiny_tokenizer())
    assert (made.data_source, made.reference) == ("amc23", "15")
