"""The page of `scope report` as a browser shows it, with what a hostile model may have written."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from deploy.report import write
from tests.deploy.test_report import a_run

HOSTILE = (
    "<!--<script>",
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "]]>&quot;\u2028\u2029\x00\ud800`${1}`",
    "x" * 300,
)
_SIZES = ((400, 800), (1600, 900))


class Page:
    """A tab of a headless Chromium, by its own protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True)["result"]
        assert "exceptionDetails" not in found, found
        return found.get("value")

    def show(self, page: Path, width: int, height: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.ask("Page.navigate", url=page.as_uri())
        loaded = "new Promise(done => document.readyState === 'complete' ? done(1) : onload = done)"
        while self.value("location.href") != page.as_uri():
            pass
        self.value(f"{loaded}.then(() => 1)")

    def choose_next(self, select: str) -> None:
        """As a person does: a click on it, an arrow, and Enter."""
        place = self.value(
            f"(() => {{ const e = document.getElementById('{select}'); e.scrollIntoView();"
            "const r = e.getBoundingClientRect();"
            "return `${r.x + r.width / 2} ${r.y + r.height / 2}` })()"
        )
        x, y = map(float, place.split())
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        for key, code in (("ArrowDown", 40), ("Enter", 13)):
            for kind in ("rawKeyDown", "keyUp"):
                self.ask(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode=code,
                )  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    assert binary, "apt-get install chromium"
    process = subprocess.Popen(
        [
            binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
            "about:blank",
        ],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        with connect(line.split()[-1], max_size=None) as socket:
            whole = Page(socket)
            target = whole.ask("Target.createTarget", url="about:blank")["targetId"]
        address = line.split()[-1].partition("/devtools")[0]
        with connect(f"{address}/devtools/page/{target}", max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stderr.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs; the second shows trajectories of two steps, full of what a model may write."""
    runs = tmp_path_factory.mktemp("rüns mit Leerzeichen")
    one, two = a_run(runs, "one", 3), a_run(runs, "two", 2, "trainer.objective.kind=opd")
    shown = json.loads((two / "trajectories.jsonl").read_text(encoding="utf-8"))
    shown["trajectories"][0] |= {
        "tokens": list(HOSTILE), "log_ratio": [0.5, -1.0, None, None, 2.0],
        "length": 7, "reason": HOSTILE[0],
    }  # fmt: skip
    lines = [shown | {"step": step, "prompt": HOSTILE[1]} for step in (1, 2)]
    lines[1]["trajectories"] = 2 * shown["trajectories"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (two / "trajectories.jsonl").write_text(text, encoding="utf-8")
    return write([one, two], runs / "report")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), _SIZES)
def test_a_hostile_model_breaks_nothing(
    report: Path, browser: Page, width: int, height: int
) -> None:
    browser.show(report, width, height)
    cards = "document.querySelectorAll('.trajectory').length"
    assert browser.value(cards) == 1
    browser.choose_next("run")
    assert browser.value("document.getElementById('run').value") == "two"
    assert browser.value(cards) == 1
    browser.choose_next("step")
    assert browser.value("document.getElementById('step').value") == "2"
    assert browser.value(cards) == 2
    token = "document.querySelectorAll('.trajectory .text span')"
    for place, text in enumerate(HOSTILE[:3]):
        assert browser.value(f"{token}[{place}].textContent") == text
    assert browser.value("document.title") == "scope, opd"
    assert browser.value("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.value("document.documentElement.scrollWidth") <= width
