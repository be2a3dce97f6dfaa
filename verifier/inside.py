"""What runs inside the sandbox, beside the untrusted code. Standard library only, one file.

    python inside.py MODE CPU_SECONDS MEMORY_BYTES DISK_BYTES THREADS SOURCE_BYTES [ENTRY_POINT]

Standard input brings the source code first. What follows it depends on the mode:

    program   the rest of standard input is the program's own, as is standard output
    calls     in {"nonce", "call", "args", "kwargs"}, out {"nonce", "value"}
    tests     the reverse: the source is tests, and whom they call is somewhere else

The first byte of standard output, `READY`, says that the sandbox was made and the code begins. In
`calls` and `tests`, it then carries frames (a length in 4 bytes, big endian, and that
many bytes of JSON), and what the code prints is dropped. What takes long to import is imported
by the mode that needs it: a bare program starts in half the time that `import json` takes.

Values cross as plain data (`encode`, `decode`), so nothing that is executed ever crosses. This
process belongs to the untrusted code: all that it says is judged by the one outside. What the
code raises ends the process.
"""

from __future__ import annotations

import builtins
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LENGTH_BYTES = 4
READY = b"\0"
_READ_BYTES = 1 << 16
_OPEN_FILES = 64
_RECURSION = 50_000

# What solutions in LeetCode's form take for granted.
_PRELUDE = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""


def frame(message: dict[str, Any]) -> bytes:
    """One message with its length in front."""
    import json

    body = json.dumps(message).encode()
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def encode(value: Any) -> Any:
    """Plain data as JSON that keeps tuples, sets, bytes and keys of any type.

    Raises:
        TypeError: it is something else, a subclass of a plain type included.
        RecursionError: it is nested too deeply, or in itself.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):  # a Counter or defaultdict is equal to the dict that it is
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    raise TypeError(f"a {kind.__name__} is not plain data")


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        TypeError, ValueError, RecursionError: no value of that form.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    made = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return made(decode(item) for item in content)


def main() -> None:
    """Takes its limits from the arguments and runs what it is sent."""
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # site's, without site
    mode, cpu_s, memory, disk, threads, size, *entry_point = sys.argv[1:]
    source = _read(int(size)).decode()
    _limit(int(cpu_s), int(memory), int(disk), int(threads))
    os.write(1, READY)
    if mode == "program":
        _run_program(source)
        return
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    if mode == "calls":
        _answer_calls(source, replies)
    else:
        _run_tests(source, entry_point, replies)


def _limit(cpu_s: int, memory_bytes: int, disk_bytes: int, threads: int) -> None:
    """Hard limits, which nothing in here can raise."""
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, disk_bytes, disk_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
        (resource.RLIMIT_NPROC, threads, threads),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(limit, (soft, hard))


def _run_program(source: str) -> None:
    sys.setrecursionlimit(_RECURSION)
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), _namespace("__main__"))


def _namespace(name: str) -> dict[str, Any]:
    """The globals of the code to run, known as the module `name`."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def _answer_calls(source: str, replies: int) -> None:
    sys.setrecursionlimit(_RECURSION)
    names = _namespace("program")
    exec(_PRELUDE, names)
    exec(compile(source, "program.py", "exec"), names)
    while call := _receive():
        value = _find(names, call["call"])(*decode(call["args"]), **decode(call["kwargs"]))
        _send(replies, {"nonce": call["nonce"], "value": encode(value)})


def _find(names: dict[str, Any], name: str) -> Any:
    if name not in names and "Solution" in names:
        return getattr(names["Solution"](), name)
    return names[name]


def _run_tests(source: str, entry_point: list[str], replies: int) -> None:
    """Executes tests whose calls are answered elsewhere. Only getting to the end is success."""
    import ast

    def remote(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _send(replies, {"call": name, "args": encode(list(args)), "kwargs": encode(kwargs)})
            return decode(_receive()["value"])

        return call

    tree = ast.parse(source)
    names = _namespace("tests")
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        if not hasattr(builtins, name):
            names[name] = remote(name)  # what the tests define themselves takes its place
    exec(compile(tree, "tests.py", "exec"), names)
    for name in entry_point:
        names["check"](remote(name))
    _send(replies, {"passed": True})


def _receive() -> dict[str, Any]:
    import json

    message = json.loads(_read(int.from_bytes(_read(LENGTH_BYTES), "big")))
    assert isinstance(message, dict)
    return message


def _read(count: int) -> bytes:
    # Unbuffered: what follows the source on standard input is the program's.
    parts = bytearray()
    while len(parts) < count:
        part = os.read(0, min(count - len(parts), _READ_BYTES))
        if not part:
            sys.exit("standard input ended")
        parts += part
    return bytes(parts)


def _send(replies: int, message: dict[str, Any]) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(replies, data) :]


if __name__ == "__main__":
    main()
