r"""Public benchmarks in the columns they are published in, as rows in verl's columns.

    aime24, aime25, amc23, math500, minerva, olympiadbench    a question, and its answer in \boxed{}
    humaneval, livecodebench                                  a program, and tests for it

Each is read from a local parquet or JSONL file. Where several publications of a benchmark name
their columns differently, all the names are known.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow
import pyarrow.parquet

from rollout.sources import DataError

Row: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[str, str]

_BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_PROGRAM = "\n\nAnswer with one complete Python program in a ```python block."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark's rows are read, and what judges its answers."""

    pair: Callable[[Row], Pair]
    """Question and reference of a row; KeyError, TypeError or ValueError for another shape."""
    kind: Literal["math", "code"]


def convert(name: str, file: Path) -> list[dict[str, Any]]:
    """A benchmark's rows in verl's columns, its name as their data source.

    Raises:
        DataError: there is no such benchmark, or the file is not in its shape.
    """
    if name not in BENCHMARKS:
        raise DataError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    rows = []
    for number, raw in enumerate(_read(file)):
        try:
            question, reference = BENCHMARKS[name].pair(raw)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{file}, row {number} is not a row of {name}: {error}") from error
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "data_source": name,
                "reward_model": {"style": "rule", "ground_truth": reference},
                "extra_info": {"index": number, "split": "test"},
            }
        )
    if not rows:
        raise DataError(f"{file} is empty")
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
            return rows
        if file.suffix == ".jsonl":
            # Not splitlines(): JSON may hold other marks that end a line.
            return [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    raise DataError(f"{file} is neither .parquet nor .jsonl")


# ------------------------------------------------------------------------------ mathematics


def _question(row: Row) -> str:
    return str(_first(row, "problem", "question", "Problem", "Question")) + _BOXED


def _number(row: Row) -> Pair:
    """AIME and AMC: whole numbers, published as `33`, `"033"` or `33.0`."""
    value = float(_first(row, "answer", "Answer"))
    if value != int(value):
        raise ValueError(f"the answer {value} is not a whole number")
    return _question(row), str(int(value))


def _expression(row: Row) -> Pair:
    """MATH500 and Minerva: LaTeX, in a column of its own or boxed at the end of the solution."""
    if "answer" in row and row["answer"] is not None:
        return _question(row), str(row["answer"])
    return _question(row), _boxed(str(row["solution"]))


def _olympiad(row: Row) -> Pair:
    if any(value is not None for name, value in row.items() if name.startswith("image_")):
        raise ValueError("the question has an image")
    context = f"{row['context']}\n\n" if row.get("context") else ""
    answers = row["final_answer"]
    return context + _question(row), ", ".join(answers if isinstance(answers, list) else [answers])


def _boxed(text: str) -> str:
    r"""What stands in the last \boxed{}."""
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index]
    raise ValueError("an open \\boxed{")


def _first(row: Row, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"none of the columns {', '.join(names)}")


# --------------------------------------------------------------------------------- programs


def _humaneval(row: Row) -> Pair:
    reference = {name: row[name] for name in ("test", "entry_point", "prompt")}
    return f"Complete this:\n\n```python\n{row['prompt']}```{_PROGRAM}", json.dumps(reference)


def _livecodebench(row: Row) -> Pair:
    cases = [*json.loads(row["public_test_cases"]), *_private(row["private_test_cases"])]
    function = json.loads(row.get("metadata") or "{}").get("func_name")
    reference = {"cases": cases} | ({"fn_name": function} if function else {})
    start = row.get("starter_code")
    how = (
        f"\n\nBegin with:\n\n```python\n{start}\n```"
        if start
        else "\n\nRead from standard input and write to standard output."
    )
    return row["question_content"] + how + _PROGRAM, json.dumps(reference)


def _private(packed: str) -> list[dict[str, Any]]:
    """LiveCodeBench packs its private cases: base64 of zlib of a pickled JSON text."""
    try:
        rows: list[dict[str, Any]] = json.loads(packed)
        return rows
    except ValueError:
        pass
    try:
        text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases cannot be unpacked: {error}") from error
    rows = json.loads(text)
    return rows


class _TextOnly(pickle.Unpickler):
    """Unpickles text and plain containers; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(_number, "math"),
    "aime25": Benchmark(_number, "math"),
    "amc23": Benchmark(_number, "math"),
    "math500": Benchmark(_expression, "math"),
    "minerva": Benchmark(_expression, "math"),
    "olympiadbench": Benchmark(_olympiad, "math"),
    "humaneval": Benchmark(_humaneval, "code"),
    "livecodebench": Benchmark(_livecodebench, "code"),
}
