"""The README's list of files stays true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("services", "rollout", "verifier", "teacher", "trainer", "deploy")


def test_every_source_file_has_its_line() -> None:
    listed = set(re.findall(r"^\| `(\w+/\w+\.py)` \| \S", (ROOT / "README.md").read_text(), re.M))
    there = {
        str(file.relative_to(ROOT))
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert listed == there


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
