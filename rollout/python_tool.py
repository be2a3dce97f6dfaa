"""The environment `python`: it runs the programs that the student writes, and says what they print.

    turn ─▶ its calls: <tool_call> (Hermes, Qwen), JSON or <|python_tag|> (Llama), or ```python
         ─▶ a sandbox of services.sandbox for each, or one for the episode ─▶ output, cut

A turn without a call ends the episode.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rollout.config import PythonToolConfig
from rollout.environment import EnvironmentFailed, Over, Reply
from services.sandbox.confined import Limit, Limits, NotStarted, Sandbox, Sandboxed, Starved
from services.sandbox.inside import decode, encode
from services.trajectory import Message

NAME = "python"
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCE = re.compile(r"^```(?:python|py)[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LLAMA = "<|python_tag|>"
_OUTPUT_BYTES = 8 << 20
_DISK_BYTES = 16 << 20

# Runs beside the student's programs, which may do with it what they like.
_DRIVER = """
import ast, contextlib, io, traceback
_names = {"__name__": "__main__"}

def run(code):
    printed, failed = io.StringIO(), False
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            body = ast.parse(code).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "program.py", "exec"), _names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "program.py", "eval"), _names)
                if value is not None:
                    print(repr(value))
        except SystemExit:
            pass
        except BaseException:
            failed = True
            print(traceback.format_exc(limit=-1))
    return [printed.getvalue(), failed]
"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of the tool: a program, or what is wrong with the call."""

    code: str = ""
    fault: str = ""


def calls(text: str) -> list[ToolCall]:
    """The calls in one turn, in their order; what stands in thinking is none."""
    said = text.rpartition("</think>")[2]
    if tags := _HERMES.findall(said):
        return [_json_call(call) for call in tags]
    if _LLAMA in said:
        behind = said.partition(_LLAMA)[2].strip()
        return [_json_call(behind) if behind.startswith("{") else ToolCall(behind)]
    if said.strip().startswith("{") and '"name"' in said:
        return [_json_call(said)]
    return [ToolCall(code) for code in _FENCE.findall(said)]


def _json_call(text: str) -> ToolCall:
    try:
        call = json.loads(text)
    except ValueError as error:
        return ToolCall(fault=f"the call is not JSON: {error}")
    if not isinstance(call, dict) or call.get("name") != NAME:
        return ToolCall(fault=f"the only tool is {NAME}")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        with suppress(ValueError):  # JSON in JSON, as some write it
            arguments = json.loads(arguments)
    code = arguments.get("code") if isinstance(arguments, dict) else arguments
    return (
        ToolCall(code) if isinstance(code, str) else ToolCall(fault='the arguments have no "code"')
    )


class PythonTool:
    """See `rollout.environment.Environment`."""

    def __init__(
        self, sandbox: Sandbox, config: PythonToolConfig, role: str, held: AsyncExitStack
    ) -> None:
        self._sandbox = sandbox
        self._role = role
        self._config = config
        self._held = held  # the episode's sandbox, where state is kept
        self._running: Sandboxed | None = None

    async def step(self, said: Sequence[Message], text: str) -> Reply | Over:
        """Runs the calls of the turn one after the other."""
        wanted = calls(text)
        if not wanted:
            return Over()
        answers = [await self._answer(call) for call in wanted]
        return Reply(
            [{"role": self._role, "content": self._cut(output)} for output, _ in answers],
            failed=any(failed for _, failed in answers),
        )

    async def _answer(self, call: ToolCall) -> tuple[str, bool]:
        """What a call prints, and whether it failed."""
        if call.fault:
            return call.fault, True
        try:
            if not self._config.keep_state:
                async with self._start() as running:
                    return await _run(running, call.code)
            if self._running is None:
                self._running = await self._held.enter_async_context(self._start())
            return await _run(self._running, call.code)
        except Limit as reached:
            self._running = None
            return f"the program {reached}", True
        except (NotStarted, Starved) as error:
            raise EnvironmentFailed(f"environment python: {error}") from error

    @asynccontextmanager
    async def _start(self) -> AsyncIterator[Sandboxed]:
        config = self._config
        limits = Limits(config.time_s, config.memory_mb << 20, _DISK_BYTES, _OUTPUT_BYTES)
        async with self._sandbox.start(limits, "calls", _DRIVER) as running:
            yield running

    def _cut(self, output: str) -> str:
        most, output = self._config.output_chars, output.strip()
        if not output:
            return "(no output)"
        if len(output) <= most:
            return output
        left_out = f"\n… {len(output) - most} characters …\n"
        return output[: most // 2] + left_out + output[len(output) - most // 2 :]


async def _run(running: Sandboxed, code: str) -> tuple[str, bool]:
    """
    Raises:
        Limit: the program reached one, or spoke in the driver's place.
        Starved: see `Sandboxed.within`.
    """
    call = {"nonce": 0, "call": "run", "args": encode([code]), "kwargs": encode({})}
    await running.send(call)
    try:
        reply: dict[str, Any] = await running.within(running.receive())
    except EOFError:
        raise Limit(await running.end() or "ended the interpreter") from None
    try:
        output, failed = decode(reply["value"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Limit("returned what cannot be read") from None
    if not isinstance(output, str):
        raise Limit("returned what cannot be read")
    return output.encode(errors="replace").decode(), bool(failed)


@asynccontextmanager
async def python_tool(
    sandbox: Sandbox, config: PythonToolConfig, role: str = "tool"
) -> AsyncIterator[PythonTool]:
    """The tool for one episode, which speaks as `role`."""
    async with AsyncExitStack() as held:
        yield PythonTool(sandbox, config, role, held)
