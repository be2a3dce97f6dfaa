"""What README and pages name is there: files, links, settings, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deploy.config import RunConfig, _keys_at

ROOT = Path(__file__).parents[1]
ROOMS = ("services", "rollout", "verifier", "teacher", "trainer", "deploy")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_every_source_file_has_its_line() -> None:
    page = (ROOT / "docs/files.md").read_text()
    listed = re.findall(r"^\| `(\w+/[\w/]+\.py)` \| \S", page, re.M)
    there = {
        str(file.relative_to(ROOT))
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert sorted(listed) == sorted(there)


def test_the_files_of_a_room_stand_in_its_section() -> None:
    page = (ROOT / "docs/files.md").read_text()
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert [room for room, _ in sections if room in ROOMS] == [*ROOMS]
    for room, section in sections:
        assert set(re.findall(r"^\| `(\w+)/[\w/]+\.py`", section, re.M)) <= {room}


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_no_line_of_a_table_is_wider_than_a_screen() -> None:
    wide = [
        f"{page.name}:{number} has {len(line)} characters"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if line.startswith("|") and len(line) > 160
    ]
    assert wide == []


def test_every_row_of_a_table_has_its_heads_columns() -> None:
    """A `|` within a cell splits it, unless it is escaped."""
    torn = []
    for page in PAGES:
        tables = re.findall(r"^\|.*\n\|[-:|]+\|\n(?:\|.*\n)*", page.read_text(), re.M)
        for rows in (table.splitlines() for table in tables):
            columns = len(re.findall(r"(?<!\\)\|", rows[0]))
            torn += [
                f"{page.name}: {row}"
                for row in rows
                if len(re.findall(r"(?<!\\)\|", row)) != columns
            ]
    assert torn == []


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(file), f"{page.name}: {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_setting_that_a_page_names_exists() -> None:
    named = {
        (page.name, match[0])
        for page, span in _spans()
        if (match := re.match(r"[a-z_]+(\.[a-z_]+)+(?=[=: ]|$)", span))
        and match[0].split(".")[0] in RunConfig.model_fields
        and match[0] != "rollout.token_s"  # of a file of rates, docs/plan.md
    }
    assert len(named) > 50
    for page, setting in sorted(named):
        *sections, key = setting.split(".")
        assert "args" in sections or key in _keys_at(RunConfig, {}, sections), f"{page}: {setting}"


def test_every_metric_that_a_page_names_is_recorded() -> None:
    source = {room: "".join(f.read_text() for f in (ROOT / room).rglob("*.py")) for room in ROOMS}
    everything = "".join(source.values())
    known = {*re.findall(r'"([a-z_]+/[a-z0-9_]+)"', everything)}
    known |= {f"timing_s/{phase}" for phase in re.findall(r'\.lap\("(\w+)"\)', everything)}
    kinds = {metric.split("/")[0] for metric in known}
    named = {(page.name, span) for page, span in _spans() if re.fullmatch(r"[a-z_]+/\w+", span)}
    named = {(page, metric) for page, metric in named if metric.split("/")[0] in kinds}
    assert len(named) > 30
    for page, metric in sorted(named):
        stage, detail = metric.split("/")  # what workers report of themselves is `stage/detail`
        reported = stage in source and re.search(rf'"{detail}"|\b{detail}=', source[stage])
        assert metric in known or reported, f"{page}: {metric}"


def _spans() -> Iterator[tuple[Path, str]]:
    """What stands between backticks."""
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", page.read_text()):
            yield page, span
