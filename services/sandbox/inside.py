"""What runs inside the sandbox, beside the untrusted code. Standard library only, one file.

    python inside.py MODE CPU_SECONDS MEMORY_BYTES DISK_BYTES THREADS SOURCE_BYTES [ENTRY_POINT]

Standard input brings the source code first. What follows it depends on the mode:

    program   the rest of standard input is the program's own, as is standard output
    calls     in {"nonce", "call", "args", "kwargs"}, out {"nonce", "value" or "raised"}
    tests     the reverse: the source is tests, and whom they call is somewhere else

The first byte of standard output, `READY`, says that the sandbox was made and the code begins. In
`calls` and `tests`, it then carries frames (a length in 4 bytes, big endian, and that
many bytes of JSON), what the code prints is dropped, and what it reads is empty. What takes long to
import is imported by the mode that needs it: a bare program starts in half the time that `import
json` takes.

Values cross as plain data (`encode`, `decode`), so nothing that is executed ever crosses. This
process belongs to the untrusted code: all that it says is judged by the one outside. What a
program raises outside a call ends the process.
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
_MESSAGE = 200  # characters of an exception's
_RECURSION = 50_000
_STACK_BYTES = 112 << 20  # the kernel leaves 128 MiB for it at least
_HUGE = 1 << 4_000  # JSON keeps integers in digits, which Python limits
_OURS = ("program", "tests")  # the modules that the code to run is
_passed: dict[str, Any] = {}  # the classes of objects that crossed from here
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}  # there may be no /proc
_STREAMS |= {f"/proc/self/fd/{fd}": fd for fd in range(3)}

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
    """Plain data as JSON that keeps tuples, sets, bytes and keys of any type. Of an object whose
    class the code itself defines, its attributes cross.

    Raises:
        TypeError: it is something else, a subclass of a plain type included.
        RecursionError: it is nested too deeply, or in itself.
    """
    kind = type(value)
    if kind is int and not -_HUGE < value < _HUGE:
        return {"int": hex(value)}
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
    if hasattr(value, "__next__"):
        return {"iter": [encode(item) for item in value]}
    if kind.__module__ in _OURS and hasattr(value, "__dict__"):
        _passed[kind.__name__] = kind
        return {"object": [kind.__name__, encode(vars(value))]}
    raise TypeError(f"a {kind.__name__} is not plain data")


def decode(value: Any, names: dict[str, Any] | None = None) -> Any:
    """The value that `encode` was given. An object is one of the class that has its name among
    `names`, or of one without methods.

    Raises:
        TypeError, ValueError, RecursionError: no value of that form, or an object without `names`.
    """
    if isinstance(value, list):
        return [decode(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(key, names): decode(item, names) for key, item in content}
    if kind == "iter":
        return iter(decode(content, names))
    if kind == "object":
        if names is None:
            raise TypeError("an object")
        name, attributes = content
        known = names.get(name)
        if not isinstance(known, type) or known.__module__ not in _OURS:
            known = names.setdefault(f"class {name}", type(name, (), {"__module__": _OURS[0]}))
        made = object.__new__(known)
        vars(made).update(decode(attributes, names))
        return made
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    made = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return made(decode(item, names) for item in content)


def main() -> None:
    """Takes its limits from the arguments and runs what it is sent."""
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # site's, without site
    mode, cpu_s, memory, disk, threads, size, *entry_point = sys.argv[1:]
    source = _read(int(size)).decode()
    _limit(int(cpu_s), int(memory), int(disk), int(threads))
    sys.set_int_max_str_digits(0)  # the limits are those of time and memory
    os.write(1, READY)
    if mode == "program":
        _run_program(source)
        return
    questions, replies = os.dup(0), os.dup(1)
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        nothing = os.open(os.devnull, flags)
        os.dup2(nothing, stream)
        os.close(nothing)
    if mode == "calls":
        _answer_calls(source, questions, replies)
    else:
        _run_tests(source, entry_point, questions, replies)


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
    # Recursion through C, such as lru_cache's, needs more of a stack than eight MiB.
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    most = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (most, hard))


def _run_program(source: str) -> None:
    sys.setrecursionlimit(_RECURSION)
    sys.argv = ["program.py"]
    _open_streams_by_name()
    exec(compile(source, "program.py", "exec"), _namespace("__main__"))


def _open_streams_by_name() -> None:
    """Lets open("/dev/stdin") be standard input where /dev has no such file."""
    import io

    plain = io.open

    def open_(file: Any, *args: Any, **kwargs: Any) -> Any:
        named = isinstance(file, (str, os.PathLike))
        stream = _STREAMS.get(os.fspath(file)) if named else None
        return plain(file, *args, **kwargs) if stream is None else plain(stream, *args, **kwargs)

    builtins.open = io.open = open_


def _namespace(name: str) -> dict[str, Any]:
    """The globals of the code to run, known as the module `name`."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def _answer_calls(source: str, questions: int, replies: int) -> None:
    sys.setrecursionlimit(_RECURSION)
    names = _namespace("program")
    exec(_PRELUDE, names)
    exec(compile(source, "program.py", "exec"), names)
    while call := _receive(questions):
        try:
            value = _find(names, call["call"])(
                *decode(call["args"], names), **decode(call["kwargs"], names)
            )
            reply = {"value": encode(value)}
        except Exception as error:  # whatever the program raises, its tests may expect
            reply = {"raised": [_builtin(type(error)), str(error)[:_MESSAGE]]}
        _send(replies, {"nonce": call["nonce"], **reply})


def _builtin(kind: type[BaseException]) -> str:
    """The name of the nearest exception that tests know as well."""
    known = (k for k in kind.__mro__ if getattr(builtins, k.__name__, None) is k)
    return str(next(known).__name__)


def _find(names: dict[str, Any], name: str) -> Any:
    if name not in names and "Solution" in names:
        return getattr(names["Solution"](), name)
    return names[name]


def _run_tests(source: str, entry_point: list[str], questions: int, replies: int) -> None:
    """Executes tests whose calls are answered elsewhere. Only getting to the end is success."""
    import ast

    def remote(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                given = {"args": encode(list(args)), "kwargs": encode(kwargs)}
            except TypeError as error:
                _send(replies, {"unsupported": str(error)})
                sys.exit("the tests cannot be run here")
            _send(replies, {"call": name, **given})
            reply = _receive(questions)
            if "raised" in reply:
                raise _raised(*reply["raised"])
            # Only of classes that the tests passed: others of theirs may equal everything.
            return decode(reply["value"], _passed)

        return call

    tree = ast.parse(source)
    names = _namespace("tests")
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        if not hasattr(builtins, name):
            names[name] = remote(name)  # what the tests define themselves takes its place
    try:
        exec(compile(tree, "tests.py", "exec"), names)
        for name in entry_point:
            names["check"](remote(name))
    except Exception as error:  # tests may raise anything
        by_program = hasattr(error, "by_program")
        at_fault = isinstance(error, (NameError, ImportError)) and not by_program
        what = f"{type(error).__name__}: {error}".removesuffix(": ")[:_MESSAGE]
        _send(replies, {"failed": what, "by_program": by_program, "at_fault": at_fault})
    else:
        _send(replies, {"passed": True})


def _raised(kind: str, message: str) -> Exception:
    """The exception that a program says it raised; of what it says only the name is used."""
    error: Any = getattr(builtins, kind, None)
    if not (isinstance(error, type) and issubclass(error, Exception)):
        error = RuntimeError
    raised: Exception = error(message)
    raised.by_program = True  # type: ignore[attr-defined]
    return raised


def _receive(questions: int) -> dict[str, Any]:
    import json

    length = int.from_bytes(_read(LENGTH_BYTES, questions), "big")
    message = json.loads(_read(length, questions))
    assert isinstance(message, dict)
    return message


def _read(count: int, source: int = 0) -> bytes:
    # Unbuffered: what follows the source on standard input is the program's.
    parts = bytearray()
    while len(parts) < count:
        part = os.read(source, min(count - len(parts), _READ_BYTES))
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
