"""Data files on this machine, in a real object store, and on a server that speaks the Hub's
protocol to the real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants as hub
import pytest
from pyarrow import fs

from rollout.config import DataConfig
from rollout.prompts import load_rows
from rollout.sources import DataError, find
from tests.builders import tiny_tokenizer
from tests.object_stores import gcs


def names(where: str) -> list[str]:
    return [file.name for file in find(where)]


def contents(where: str) -> list[bytes]:
    found = []
    for file in find(where):
        with file.stream() as stream:
            found.append(stream.read())
    return found


# ------------------------------------------------------------------------- this machine


def test_a_pattern_names_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.parquet", "deep/er/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert contents(f"{tmp_path}/*.jsonl") == [b"a.jsonl", b"b.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == [
        f"{tmp_path}/{name}" for name in ("a.jsonl", "b.jsonl", "deep/er/d.jsonl")
    ]
    assert contents(f"{tmp_path}/b.jsonl") == [b"b.jsonl"]
    for nothing in ("*.csv", "e.jsonl"):
        with pytest.raises(DataError, match="there is no file"):
            find(f"{tmp_path}/{nothing}")


# ------------------------------------------------------------------------- object stores


@pytest.mark.slow
def test_an_object_store_is_read_by_url_and_pattern(tmp_path: Path) -> None:
    row = {"prompt": "1+2=", "data_source": "sums", "reward_model": {"ground_truth": "3"}}
    with gcs(tmp_path) as store:
        files, _ = fs.FileSystem.from_uri(store.format("data"))
        for name in ("b.jsonl", "a.jsonl", "a.txt", "deep/c.jsonl"):
            with files.open_output_stream(f"bucket/data/{name}") as stream:
                stream.write(json.dumps(row).encode() + b"\n")
        assert names(store.format("data/*.jsonl")) == [
            "gs://bucket/data/a.jsonl", "gs://bucket/data/b.jsonl",
        ]  # fmt: skip
        assert names(store.format("data/b.jsonl")) == ["gs://bucket/data/b.jsonl"]
        config = DataConfig(path=store.format("data/**/*.jsonl"), max_prompt_tokens=9)
        assert len(load_rows(config, tiny_tokenizer())) == 3
        with pytest.raises(DataError, match="component"):
            find(store.format("data/**.jsonl"))
        with pytest.raises(DataError, match=r"^there is no file gs://bucket/data/d\.jsonl$"):
            find(store.format("data/d.jsonl"))


def test_a_scheme_that_nobody_knows_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^nfs4://host/rows\.jsonl cannot be read: .*nfs4"):
        find("nfs4://user:hidden@host/rows.jsonl")


# ---------------------------------------------------------------- the Hugging Face Hub

REVISIONS = {
    "main": {
        "README.md": b"# Sums", "data/train-00000-of-00002.jsonl": b"t0",
        "data/train-00001-of-00002.jsonl": b"t1", "data/test.jsonl": b"test",
    },
    "v1.0": {"rows.jsonl": b"old"},
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """One data set, `team/sums`: the list of its files, and the files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        for revision, files in REVISIONS.items():
            if path == f"/api/datasets/team/sums/tree/{revision}":
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": name}
                    for name, body in files.items()
                ]
                return self._answer(200, json.dumps(tree).encode())
            for name, body in files.items():
                if path == f"/datasets/team/sums/resolve/{revision}/{name}":
                    return self._answer(200, body, revision)
        return self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes, revision: str = "main") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", address)
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    yield "hf://datasets/team/sums"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_split_and_a_revision_are_in_the_url(sums: str) -> None:
    assert contents(f"{sums}?split=train") == [b"t0", b"t1"]
    assert contents(f"{sums}@main?split=test") == [b"test"]
    assert contents(f"{sums}@v1.0") == [b"old"]
    assert contents(f"{sums}/data/test.jsonl") == [b"test"]
    assert contents(f"{sums}/data/train-*.jsonl") == [b"t0", b"t1"]
    assert names(f"{sums}@v1.0") == ["hf://datasets/team/sums/rows.jsonl"]


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("", "has the splits test, train: add \\?split=NAME"),
        ("?split=dev", "no file of .* is called after the split: data/test.jsonl, data/train"),
        ("/README.md", "there is no .parquet or .jsonl file"),
        ("?splt=train", "only \\?split=NAME may follow"),
        ("@v2", "cannot be read: .*"),
        ("-of-others", "cannot be read: .*"),
    ],
)
def test_what_cannot_be_found_on_the_hub_is_one_sentence(
    sums: str, end: str, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as raised:
        find(sums + end)
    assert "\n" not in str(raised.value)


def test_a_hub_out_of_reach_is_one_sentence(sums: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its client's own retries
    with pytest.raises(DataError, match=r"^hf://datasets/team/sums cannot be read: .*refused"):
        find(sums)


def test_an_address_without_a_data_set_is_one_sentence() -> None:
    with pytest.raises(DataError, match="is not hf://datasets/OWNER/NAME"):
        find("hf://datasets/sums")
