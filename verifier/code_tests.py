r"""Is a program right? It runs in sandboxes (`services.sandbox`); the verdict is found here.

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
import secrets
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Self, TypeAlias

from services.errors import Unavailable
from services.sandbox.confined import Limit, Limits, NotStarted, Sandbox, Sandboxed, Starved
from services.sandbox.inside import decode, encode
from services.sandbox.levels import prepare
from services.trajectory import Verdict
from verifier.cache import VerdictCache
from verifier.code_text import program, same_output, same_value
from verifier.config import CodeConfig

_MAX_SOURCE = 1 << 20  # characters
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

    def __init__(
        self,
        sandbox: Sandbox,
        config: CodeConfig,
        cached_verdicts: int,
        *,
        thinking: bool = False,
    ) -> None:
        self._sandbox = sandbox
        self._thinking = thinking
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
    async def start(
        cls, config: CodeConfig, *, cached_verdicts: int = 0, thinking: bool = False
    ) -> Self:
        """Proves that programs can be confined here, or raises. `thinking` is that of `program`."""
        sandbox = await prepare(config.sandbox, config.python)
        return cls(sandbox, config, cached_verdicts, thinking=thinking)

    async def judge(self, completion: str, reference: str) -> Verdict:
        """The verdict on the last block of Python code in `completion`.

        Time, memory and output limits are part of the task: a program that exceeds one is
        incorrect. `unknown` is a reference that cannot be read, tests that cannot be run, or a
        program that the machine had no processor or memory for (see `Starved`).

        Raises:
            SandboxRefused: see `Sandbox.start`.
            Unavailable: a sandbox cannot be made now.
        """
        try:
            tests, limits = read_reference(reference, self._limits)
        except BadReference as error:
            return Verdict("unknown", f"the reference cannot be read: {error}")
        source = program(completion, thinking=self._thinking)
        if not source.strip():
            return Verdict("incorrect", "no program found")
        if len(source) > _MAX_SOURCE:
            return Verdict("incorrect", "the program is too long")
        source = source.encode(errors="replace").decode()  # half a character is none
        verdict = self._cache.get(source, reference)
        if verdict is None:
            try:
                async with self._slot():
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
    async def _slot(self) -> AsyncIterator[None]:
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
            async with self._sandbox.start(limits, "program", source) as running:
                printed, how = await running.within(_run(running, given.encode(errors="replace")))
            if how:
                return Verdict("incorrect", f"case {number}: the program {how}")
            if not same_output(printed.decode(errors="replace"), expected):
                return Verdict("incorrect", f"case {number}: the output differs")
        return Verdict("correct", f"passed {len(tests.cases)} cases")

    async def _judge_returned(self, source: str, tests: Returned, limits: Limits) -> Verdict:
        async with self._sandbox.start(limits, "calls", source) as running:
            for number, (arguments, accepted) in enumerate(tests.cases, 1):
                try:
                    called = _call(running, tests.function, encode(arguments), encode({}))
                    reply = await running.within(called)
                except EOFError:
                    how = await running.within(running.end()) or "ended before it answered"
                    return Verdict("incorrect", f"case {number}: the program {how}")
                if "raised" in reply:
                    return Verdict("incorrect", f"case {number}: the program {_said(reply)}")
                value = _plain(reply["value"])
                if not any(same_value(value, expected) for expected in accepted):
                    return Verdict("incorrect", f"case {number}: the value differs")
        return Verdict("correct", f"passed {len(tests.cases)} cases")

    async def _judge_asserted(self, source: str, tests: Asserted, limits: Limits) -> Verdict:
        if tests.entry_point is not None:
            source = _completed(source, tests.prompt, tests.entry_point)
        entry = () if tests.entry_point is None else (tests.entry_point,)
        calls = 0
        async with (
            self._sandbox.start(limits, "calls", source) as running,
            self._sandbox.start(limits, "tests", tests.tests, *entry) as examiner,
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
                if "failed" in question:
                    return _raised(calls, question)
                if "unsupported" in question:
                    return Verdict("unknown", f"the tests pass what {question['unsupported']}")
                calls += 1
                try:
                    name, given = str(question["call"]), question["args"]
                    called = _call(running, name, given, question["kwargs"])
                    await examiner.send(await running.within(called))
                except EOFError:
                    how = await running.within(running.end()) or "ended before it answered"
                    return Verdict("incorrect", f"call {calls}: the program {how}")


def _completed(source: str, prompt: str, entry_point: str) -> str:
    """The program with what stands in the prompt alone: helpers, or where its function begins."""
    start = f"def {entry_point}"
    if start in source or "def " not in prompt:
        helpers, defined, _ = prompt.rpartition(start)
        ahead = "from __future__" in source or not defined
        return source if ahead else f"{helpers.rstrip()}\n\n{source}"
    body = source if source[:1].isspace() else textwrap.indent(source, "    ")
    return f"{prompt.rstrip()}\n{body}"


def _said(reply: dict[str, Any]) -> str:
    raised = ": ".join(filter(None, reply["raised"]))
    return f"failed ({raised})"[:_REASON_CHARS]


def _passed(calls: int) -> Verdict:
    if not calls:
        return Verdict("unknown", "the tests never called the program")
    return Verdict("correct", f"passed the tests, in {calls} calls")


def _raised(calls: int, question: dict[str, Any]) -> Verdict:
    """An exception in the tests is the program's fault if it raised it or if it gave a wrong
    value, but no value makes a name or a module unknown."""
    how = f"failed ({question['failed']})"
    if question["by_program"]:
        return Verdict("incorrect", f"call {calls}: the program {how}")
    return _failed(0 if question["at_fault"] else calls, how)


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


async def _call(running: Sandboxed, function: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """What one call came to: {"value": encoded}, or {"raised": [name, message]}.

    The nonce is new in each call, so nothing that was written before the question was asked can
    be taken for its answer.
    """
    nonce = secrets.token_hex(16)
    await running.send({"nonce": nonce, "call": function, "args": args, "kwargs": kwargs})
    match await running.receive():
        case {"nonce": str(echoed), "value": value} if echoed == nonce:
            return {"value": value}
        case {"nonce": str(echoed), "raised": [str(kind), str(message)]} if echoed == nonce:
            return {"raised": [kind, message]}
    raise Limit("answered what was not asked")


def _plain(value: Any) -> Any:
    try:
        return decode(value)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise Limit("returned what is not plain data") from None


# ------------------------------------------------------------------------------- references


def read_reference(reference: str, most: Limits) -> tuple[Tests, Limits]:
    """The tests of a reference, and its limits: its own, if they are lower than `most`.

    Raises:
        BadReference: it is in no form that is known here.
    """
    try:
        fields = json.loads(reference, parse_int=_integer)
    except (ValueError, RecursionError):
        raise BadReference("it is not JSON") from None
    if isinstance(fields, list):
        fields = {"cases": fields}
    if not isinstance(fields, dict):
        raise BadReference("it is neither an object nor a list")
    try:
        limits = replace(
            most,
            time_s=min(float(fields.get("time_limit") or most.time_s), most.time_s),
            memory_bytes=min(int(fields.get("memory_limit") or 1 << 30) << 20, most.memory_bytes),
        )
        return _tests(fields), limits
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadReference(f"{type(error).__name__}: {error}"[:_REASON_CHARS]) from None


def _integer(digits: str) -> int:
    """An integer of any length: `int` reads 4,300 digits only."""
    return int(Decimal(digits))


def _tests(fields: dict[str, Any]) -> Tests:
    if "test" in fields:
        return Asserted(fields["test"], fields["entry_point"], fields.get("prompt", ""))
    if "test_list" in fields:
        setup = fields.get("test_setup_code", "")
        return Asserted("\n".join([setup, *fields["test_list"]]), None, "")
    function = _function(fields)
    if "cases" in fields:
        if any(case.get("testtype") == "functional" for case in fields["cases"]) and not function:
            function = next(filter(None, map(_function, fields["cases"])), None)
            if function is None:
                raise ValueError("no case names the function")
        pairs = [(case["input"], case["output"]) for case in fields["cases"]]
    else:
        pairs = list(zip(fields["inputs"], fields["outputs"], strict=True))
    if not pairs:
        raise ValueError("there are no cases")
    if function:
        return Returned(function, tuple(_returned(*pair) for pair in pairs))
    return Printed(tuple((_text(given), _text(expected)) for given, expected in pairs))


def _function(fields: dict[str, Any]) -> str | None:
    """The function that is called, wherever its name stands."""
    metadata = fields.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    names = (fields.get("fn_name"), fields.get("func_name"), metadata.get("func_name"))
    return next((str(name) for name in names if name), None)


def _returned(given: Any, expected: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Arguments and accepted values, from either text (LiveCodeBench: one argument a line, as
    JSON) or data (APPS: a list of arguments; the value may stand in a list of one)."""
    if isinstance(given, str):
        arguments = [_json(line) for line in given.splitlines() if line.strip()]
    else:
        arguments = list(given)
    if isinstance(expected, str) and isinstance(given, str):
        return arguments, (_json(expected),)
    if isinstance(expected, list) and len(expected) == 1:
        return arguments, (expected, expected[0])
    return arguments, (expected,)


def _json(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise TypeError(f"a case is text, not {type(value).__name__}")
    return value
