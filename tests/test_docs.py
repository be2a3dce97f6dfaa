"""`make docs` builds the API reference of every module."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import ROOMS, ROOT


@pytest.mark.slow
def test_every_module_has_a_page(tmp_path: Path) -> None:
    command = re.search(r"^docs:.*\n\t\$\(BIN\)/(pdoc .*)", (ROOT / "Makefile").read_text(), re.M)
    assert command
    pdoc, *arguments = shlex.split(command[1].replace("build/docs", str(tmp_path)))
    done = subprocess.run(
        [Path(sys.executable).parent / pdoc, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    modules = {
        str(file.relative_to(ROOT).with_suffix(".html"))
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules <= pages, done.stderr
    assert "which trajectories are on this path" in (tmp_path / "trainer/scope.html").read_text()
