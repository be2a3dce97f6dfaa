"""Ray that does not come up. What it raises then was seen on a machine with a load of 20: its class
is `Exception`, and the next start works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deploy.cluster import NoRay, start_ray
from deploy.config import RayConfig


def failing(times: int, error: Exception) -> tuple[Callable[..., Any], list[Any]]:
    """In the place of `ray.init`: fails so many times first."""
    asked: list[Any] = []

    def init(**options: Any) -> str:
        asked.append(options["address"])
        if len(asked) <= times:
            raise error
        return "context"

    return init, asked


def start(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any], **settings: Any) -> Any:
    said: list[str] = []
    monkeypatch.setattr("ray.init", init)
    return start_ray(RayConfig(**settings), "here", said.append), said


def test_a_start_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    init, asked = failing(2, Exception("the current node timed out"))
    context, said = start(monkeypatch, init)
    assert context == "context" and asked == ["local"] * 3
    assert said == ["Ray did not start, trying again: the current node timed out"] * 2


def test_in_the_end_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    init, asked = failing(9, Exception("the current node timed out"))
    with pytest.raises(NoRay, match="Ray does not start: the current node timed out"):
        start(monkeypatch, init)
    assert len(asked) == 3


def test_a_directory_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray does not fall back to another one, as Python itself does."""
    init, asked = failing(9, FileNotFoundError(2, "No such file or directory", "/proc/ray"))
    with pytest.raises(NoRay, match="where TMPDIR tells it to or /tmp: "):
        start(monkeypatch, init)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("settings", "error"),
    [({}, RuntimeError("twice")), ({"address": "h:1"}, ConnectionError("no cluster"))],
)
def test_other_errors_are_not_swallowed(
    settings: dict[str, str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, asked = failing(9, error)
    with pytest.raises(type(error)):
        start(monkeypatch, init, **settings)
    assert len(asked) == 1
