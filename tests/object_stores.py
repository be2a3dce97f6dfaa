"""An object store on this machine that speaks Google's protocol."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.ports import free_port
from tests.waiting import DEADLINE_S


@contextmanager
def gcs(directory: Path) -> Iterator[str]:
    """The address of a bucket that asks for no credentials."""
    port = free_port()
    command = ["-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    log = directory / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command, "--in-memory", "--default-bucket=bucket"],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        while not _listens(port):
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        yield f"gs://anonymous@bucket/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=DEADLINE_S)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
