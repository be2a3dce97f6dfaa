"""Rules for our own source that no linter holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "services", "rollout", "teacher", "trainer", "deploy", "examples", "benchmarks",
)  # fmt: skip
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf_8_whatever_the_locale(file: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, ast.Call)]
    assert not [f"{file}:{call.lineno}" for call in calls if any(_leaves_it_open(call))]


def _leaves_it_open(call: ast.Call) -> Iterator[bool]:
    """Whether a call leaves the encoding of text to the locale."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    yield name in ("read_text", "write_text")
    yield name in ("run", "Popen", "check_output") and ("text" in given)
    if name == "open" and ast.unparse(call.func) != "os.open":
        mode = [given.get("mode"), *call.args[:2]]
        # A method's mode comes first, the function's second; a binary one has no encoding.
        modes = [m.value for m in mode if isinstance(m, ast.Constant) and isinstance(m.value, str)]
        yield not any("b" in m and set(m) <= set("rwxab+") for m in modes)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("teacher.config", {"torch", "ray", "transformers", "numpy", "fastapi"}),
        ("teacher.worker", {"torch", "ray", "transformers", "fastapi"}),
        ("teacher.app", {"torch", "ray", "transformers"}),
        ("verifier.worker", {"torch", "ray", "transformers", "fastapi"}),
        ("services.weight_store", {"torch", "transformers", "fastapi"}),
    ],
)
def test_importing_a_module_loads_only_what_it_needs(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; found = {heavy} & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_S, cwd=ROOT)
