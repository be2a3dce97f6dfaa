"""YAML as every file and override of ours is read: UTF-8, and no key twice in one table.

PyYAML takes the last of two equal keys without a word, which would drop whole sections of a config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class UnreadableYaml(ValueError):
    """It cannot be read; one sentence, with the line where there is one."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a second key of one name."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: D102
        # Here, because later on merged keys (`<<`) stand beside a table's own.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise UnreadableYaml(
                    f"the key {key.value!r} stands twice in one table, in lines {lines[name]} and "
                    f"{line}"
                )
            lines[name] = line
        return node


def read(path: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        UnreadableYaml: the file cannot be read, is not UTF-8 or not YAML, or has a key twice.
    """
    try:
        return parse(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UnreadableYaml(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UnreadableYaml(
            f"{path} is not UTF-8: line {line} holds the byte 0x{error.object[error.start]:02x}"
        ) from None
    except UnreadableYaml as error:
        raise UnreadableYaml(f"{path}: {error}") from None


def parse(text: str) -> Any:
    """What YAML text holds.

    Raises:
        UnreadableYaml: it is not YAML, or has a key twice.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        said = f"line {line} holds the character {text[error.position]!r}"
        raise UnreadableYaml(f"this is not YAML: {said}") from None
    except yaml.MarkedYAMLError as error:
        raise UnreadableYaml(f"this is not YAML: {_where(text, error)}") from None
    except UnreadableYaml:
        raise
    except (ValueError, RecursionError) as error:  # such as a date of a thirteenth month
        raise UnreadableYaml(f"this is not YAML: {error}") from None


def _where(text: str, error: yaml.MarkedYAMLError) -> str:
    said = str(error.problem or error.context)
    if error.problem_mark is None:
        return said
    line = error.problem_mark.line
    if "'\\t'" in said:
        return f"line {line + 1} is indented with a tab, where YAML takes spaces only"
    return f"line {line + 1}: {said}"
