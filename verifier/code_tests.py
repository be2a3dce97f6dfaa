r"""Is a program right? It runs in sandboxes (`verifier.confined`); the verdict is found here.

    stdin/stdout   each case's input ──▶ fresh sandbox ──▶ what it printed == what was expected
    calls          sandbox ◀─arguments, value─▶ value == what was expected
    tests          sandbox of the program ◀─▶ here ◀─▶ sandbox of the tests

What is expected never enters a sandbox with the program in it. Tests such as HumanEval's, which
hold it, run in another one: their `candidate` is a stand-in that asks for each call here, and
gets plain data back. So a program can only be right by giving right answers: there is nothing
in its reach to patch, to read or to claim.

A reference is JSON in one of the field's forms:

    {"inputs": [...], "outputs": [...]}                        stdin/stdout (LiveCodeBench, APPS)
    {"inputs": [...], "outputs": [...], "fn_name": "f"}        calls
    [{"input": ..., "output": ..., "testtype": ...}, ...]      either, as LiveCodeBench keeps them
    {"test": "def check(candidate): ...", "entry_point": "f"}  HumanEval; "prompt" may be there
    {"test_list": ["assert f(1) == 2", ...]}                   MBPP; "test_setup_code" may be there

"time_limit" (seconds) and "memory_limit" (MiB) may stand beside them.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Self, TypeAlias

from services.stage import Unavailable
from services.trajectory import Verdict
from verifier.bubblewrap import Bubblewrap
from verifier.cache import VerdictCache
from verifier.config import CodeConfig
from verifier.confined import Limit, Limits, NotStarted, Sandbox, Sandboxed, Starved
from verifier.inside import decode, encode
from verifier.landlock import Landlock

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"", "py", "python", "python3"})
_REASON_CHARS = 200
_QUICK_S = 2.0  # on the clock; what takes longer leaves its place to others
_PROGRAMS_PER_SLOW = 4


class BadReference(ValueError):
    """A reference in no form that is known here; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Printed:
    """Each case is an input and what the program must print for it."""

    cases: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Each case is the arguments of `function` and the values that it may return."""

    function: str
    cases: tuple[tuple[list[Any], tuple[Any, ...]], ...]


@dataclass(frozen=True, slots=True)
class Asserted:
    """Python code that raises if the program is wrong; `entry_point` goes to its `check`."""

    tests: str
    entry_point: str | None
    prompt: str


Tests: TypeAlias = Printed | Returned | Asserted


class CodeJudge:
    """Runs programs, some at once, each in sandboxes of its own.

    Raises:
        SandboxRefused: (from `start`) code cannot be confined here.
    """

    def __init__(self, sandbox: Sandbox, config: CodeConfig, cached_verdicts: int) -> None:
        self._sandbox = sandbox
        self._cache = VerdictCache(cached_verdicts)
        self._waiting = self._slow_programs = 0
        self._free = asyncio.Semaphore(config.programs)
        self._apart = asyncio.Semaphore(-(-config.programs // _PROGRAMS_PER_SLOW))
        self._limits = Limits(
            time_s=config.time_s,
            memory_bytes=config.memory_mb << 20,
            disk_bytes=config.disk_mb << 20,
            output_bytes=config.output_mb << 20,
        )

    @classmethod
    async def start(cls, config: CodeConfig, *, cached_verdicts: int = 0) -> Self:
        """Proves that programs can be confined here, or raises."""
        level = Bubblewrap if config.sandbox == "bubblewrap" else Landlock
        return cls(await level.prepare(config.python), config, cached_verdicts)

    async def judge(self, completion: str, reference: str) -> Verdict:
        """The verdict on the last block of Python code in `completion`.

        Time, memory and output limits are part of the task: a program that exceeds one is
        incorrect. `unknown` is a reference that cannot be read, tests that cannot be run, or a
        program that the machine had no processor or memory for (see `Starved`).

        Raises:
            SandboxRefused: see `Sandbox.open`.
            Unavailable: a sandbox cannot be made now.
        """
        try:
            tests, limits = read_reference(reference, self._limits)
        except BadReference as error:
            return Verdict("unknown", f"the reference cannot be read: {error}")
        source = program(completion)
        if not source.strip():
            return Verdict("incorrect", "no program found")
        verdict = self._cache.get(source, reference)
        if verdict is None:
            try:
                async with self._place():
                    verdict = await self._run(source, tests, limits)
            except Starved as starved:
                return Verdict("unknown", f"the program {starved}")
            except NotStarted as error:
                raise Unavailable(str(error)) from error
            self._cache.put(verdict, source, reference)
        return verdict

    @property
    def waiting(self) -> int:
        """How many programs wait for a sandbox."""
        return self._waiting

    @property
    def slow(self) -> int:
        """How many programs run apart from the others, because they take long."""
        return self._slow_programs

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place for one program. One that takes long gives it back, and goes on in a place for
        the slow as soon as one is free, so that slow ones never fill all places."""
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        moving = asyncio.create_task(self._move_apart())
        try:
            yield
        finally:
            if moving.done():
                self._slow_programs -= 1
                self._apart.release()
            else:
                moving.cancel()
                self._free.release()

    async def _move_apart(self) -> None:
        await asyncio.sleep(_QUICK_S)
        await self._apart.acquire()
        self._slow_programs += 1
        self._free.release()

    async def _run(self, source: str, tests: Tests, limits: Limits) -> Verdict:
        try:
            match tests:
                case Printed():
                    return await self._judge_printed(source, tests, limits)
                case Returned():
                    return await self._judge_returned(source, tests, limits)
                case Asserted():
                    return await self._judge_asserted(source, tests, limits)
        except Limit as limit:
            return Verdict("incorrect", f"the program {limit}")

    async def _judge_printed(self, source: str, tests: Printed, limits: Limits) -> Verdict:
        for number, (given, expected) in enumerate(tests.cases, 1):
            async with self._sandbox.open(limits, "program", source) as running:
                printed, how = await running.within(_run(running, given.encode()))
            if how:
                return Verdict("incorrect", f"case {number}: the program {how}")
            if not same_output(printed.decode(errors="replace"), expected):
                return Verdict("incorrect", f"case {number}: the output differs")
        return Verdict("correct", f"passed {len(tests.cases)} cases")

    async def _judge_returned(self, source: str, tests: Returned, limits: Limits) -> Verdict:
        async with self._sandbox.open(limits, "calls", source) as running:
            for number, (arguments, accepted) in enumerate(tests.cases, 1):
                try:
                    called = _call(running, tests.function, encode(arguments), encode({}))
                    value = _plain(await running.within(called))
                except EOFError:
                    how = await running.within(running.end()) or "ended before it answered"
                    return Verdict("incorrect", f"case {number}: the program {how}")
                if not any(same_value(value, expected) for expected in accepted):
                    return Verdict("incorrect", f"case {number}: the value differs")
        return Verdict("correct", f"passed {len(tests.cases)} cases")

    async def _judge_asserted(self, source: str, tests: Asserted, limits: Limits) -> Verdict:
        if tests.entry_point is not None and f"def {tests.entry_point}" not in source:
            source = tests.prompt + source  # the completion went on from where the prompt ended
        entry = () if tests.entry_point is None else (tests.entry_point,)
        calls = 0
        async with (
            self._sandbox.open(limits, "calls", source) as running,
            self._sandbox.open(limits, "tests", tests.tests, *entry) as examiner,
        ):
            while True:
                try:
                    question = await examiner.within(examiner.receive())
                except EOFError:
                    return _failed(calls, await _how_it_ended(examiner))
                except Limit as limit:
                    return _failed(calls, str(limit))
                if "passed" in question:
                    return _passed(calls)
                calls += 1
                try:
                    name, given = str(question["call"]), question["args"]
                    called = _call(running, name, given, question["kwargs"])
                    await examiner.send({"value": await running.within(called)})
                except EOFError:
                    how = await running.within(running.end()) or "ended before it answered"
                    return Verdict("incorrect", f"call {calls}: the program {how}")


def _passed(calls: int) -> Verdict:
    if not calls:
        return Verdict("unknown", "the tests never called the program")
    return Verdict("correct", f"passed the tests, in {calls} calls")


def _failed(calls: int, how: str) -> Verdict:
    """Tests that fail before they asked the program anything are not the program's fault."""
    if calls:
        return Verdict("incorrect", f"after {calls} calls, a test {how}")
    return Verdict("unknown", f"the tests cannot be run: they {how}")


async def _how_it_ended(examiner: Sandboxed) -> str:
    try:
        return await examiner.within(examiner.end()) or "ended early"
    except Limit as limit:
        return str(limit)


async def _run(running: Sandboxed, given: bytes) -> tuple[bytes, str]:
    """What a program prints for one input, and how it ended. Input and output flow at once, so
    that neither waits for the other's buffer."""
    writing = asyncio.create_task(running.write(given, last=True))
    try:
        return await running.output(), await running.end()
    finally:
        writing.cancel()


async def _call(running: Sandboxed, function: str, args: Any, kwargs: Any) -> Any:
    """The encoded value of one call.

    The nonce is new in each call, so nothing that was written before the question was asked can
    be taken for its answer.
    """
    nonce = secrets.token_hex(16)
    await running.send({"nonce": nonce, "call": function, "args": args, "kwargs": kwargs})
    reply = await running.receive()
    if reply.get("nonce") != nonce or "value" not in reply:
        raise Limit("answered what was not asked")
    return reply["value"]


def _plain(value: Any) -> Any:
    try:
        return decode(value)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise Limit("returned what is not plain data") from None


def program(completion: str) -> str:
    """The last fenced block of Python in `completion`, or all of it if nothing is fenced."""
    blocks = [code for language, code in _FENCE.findall(completion) if language in _PYTHON]
    if blocks:
        return str(blocks[-1])
    return "" if "```" in completion else completion


def same_output(printed: str, expected: str) -> bool:
    """Line by line, as LiveCodeBench does: equal text, or numbers that are equal one by one."""
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _same_numbers(a: str, b: str) -> bool:
    ours, theirs = a.split(), b.split()
    if len(ours) != len(theirs):
        return False
    try:
        return all(x == y or Decimal(x) == Decimal(y) for x, y in zip(ours, theirs, strict=True))
    except InvalidOperation:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """Equal as JSON is: a tuple is a list, but True is not 1."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool) != isinstance(expected, bool):
        return False
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        keyed = {str(key): item for key, item in value.items()}  # JSON has no other keys
        return keyed.keys() == expected.keys() and all(
            same_value(item, expected[key]) for key, item in keyed.items()
        )
    return bool(value == expected)


# ------------------------------------------------------------------------------- references


def read_reference(reference: str, most: Limits) -> tuple[Tests, Limits]:
    """The tests of a reference, and its limits: its own, if they are lower than `most`.

    Raises:
        BadReference: it is in no form that is known here.
    """
    try:
        found = json.loads(reference)
    except ValueError:
        raise BadReference("it is not JSON") from None
    if isinstance(found, list):
        found = {"cases": found}
    if not isinstance(found, dict):
        raise BadReference("it is neither an object nor a list")
    try:
        limits = replace(
            most,
            time_s=min(float(found.get("time_limit") or most.time_s), most.time_s),
            memory_bytes=min(int(found.get("memory_limit") or 1 << 30) << 20, most.memory_bytes),
        )
        return _tests(found), limits
    except (KeyError, TypeError, ValueError) as error:
        raise BadReference(f"{type(error).__name__}: {error}"[:_REASON_CHARS]) from None


def _tests(found: dict[str, Any]) -> Tests:
    if "test" in found:
        return Asserted(found["test"], found["entry_point"], found.get("prompt", ""))
    if "test_list" in found:
        setup = found.get("test_setup_code", "")
        return Asserted("\n".join([setup, *found["test_list"]]), None, "")
    function = found.get("fn_name") or found.get("func_name")
    if "cases" in found:
        if any(case.get("testtype") == "functional" for case in found["cases"]) and not function:
            function = found["cases"][0]["fn_name"]
        pairs = [(case["input"], case["output"]) for case in found["cases"]]
    else:
        pairs = list(zip(found["inputs"], found["outputs"], strict=True))
    if not pairs:
        raise ValueError("there are no cases")
    if function:
        return Returned(function, tuple(_returned(*pair) for pair in pairs))
    return Printed(tuple((_text(given), _text(expected)) for given, expected in pairs))


def _returned(given: Any, expected: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Arguments and accepted values, from either text (LiveCodeBench: one argument a line, as
    JSON) or data (APPS: a list of arguments; the value may stand in a list of one)."""
    if isinstance(given, str):
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
    else:
        arguments = list(given)
    if isinstance(expected, str) and isinstance(given, str):
        return arguments, (json.loads(expected),)
    if isinstance(expected, list) and len(expected) == 1:
        return arguments, (expected, expected[0])
    return arguments, (expected,)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise TypeError(f"a case is text, not {type(value).__name__}")
    return value
