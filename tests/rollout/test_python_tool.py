"""The tool `python` in a real sandbox: calls in every form, outputs, limits and state."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_asyncio

from rollout.config import PythonToolConfig
from rollout.environment import EnvironmentFailed, Over, Reply
from rollout.python_tool import ToolCall, calls, python_tool
from services.sandbox.confined import NotStarted, Sandbox
from services.sandbox.levels import prepare

CODE = "print(6 * 7)"
JSON = json.dumps({"name": "python", "arguments": {"code": CODE}})
LLAMA = json.dumps({"name": "python", "parameters": {"code": CODE}})
TWICE = json.dumps({"name": "python", "arguments": json.dumps({"code": CODE})})


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        pytest.param(f"Let me see.\n<tool_call>\n{JSON}\n</tool_call>", [CODE], id="hermes"),
        pytest.param(f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}", [CODE] * 2, id="two"),
        pytest.param(f"<tool_call>{TWICE}</tool_call>", [CODE], id="json-in-json"),
        pytest.param(LLAMA, [CODE], id="llama-json"),
        pytest.param(f"<|python_tag|>{LLAMA}", [CODE], id="llama-tagged-json"),
        pytest.param(f"<|python_tag|>{CODE}", [CODE], id="llama-code"),
        pytest.param(f"So:\n```python\n{CODE}\n```\nand", [CODE + "\n"], id="fence"),
        pytest.param(f"```py\n{CODE}\n```", [CODE + "\n"], id="short-fence"),
        pytest.param(f"<think>\n```python\n{CODE}\n```\n</think>\n42", [], id="thinking"),
        pytest.param("The answer is {42} ```text\n42\n```", [], id="none"),
        pytest.param(f"```python\n{CODE}\n", [], id="open-fence"),
    ],
)
def test_calls_are_found_in_every_form(text: str, codes: list[str]) -> None:
    assert calls(text) == [ToolCall(code) for code in codes]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<tool_call>{'name': 'python'}</tool_call>", "the call is not JSON"),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "the only tool is python"),
        ('<tool_call>{"name": "python", "arguments": {}}</tool_call>', 'have no "code"'),
        ("<tool_call>[1]</tool_call>", "the only tool is python"),
    ],
)
def test_a_call_that_cannot_be_made_is_told_why(text: str, fault: str) -> None:
    (call,) = calls(text)
    assert fault in call.fault and not call.code


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> Sandbox:
    return await prepare("bubblewrap")


async def run(
    sandbox: Sandbox, *programs: str, role: str = "tool", **settings: Any
) -> list[tuple[str, bool]]:
    found = []
    async with python_tool(sandbox, PythonToolConfig(**settings), role) as tool:
        for program in programs:
            reply = await tool.step([], f"```python\n{program}\n```")
            assert isinstance(reply, Reply)
            (message,) = reply.messages
            assert message["role"] == role
            found.append((message["content"], reply.failed))
    return found


@pytest.mark.parametrize(
    ("program", "output"),
    [
        pytest.param("print(6*7)", "42", id="print"),
        pytest.param("x = 6\nx * 7", "42", id="last-value"),
        pytest.param("None", "(no output)", id="nothing"),
        pytest.param("print(1)\nexit()\nprint(2)", "1", id="exit"),
        pytest.param("import sys\nprint('a', file=sys.stderr)", "a", id="stderr"),
        pytest.param("print('x' * 100)", "xxxxxxxx\n… 84 characters …\nxxxxxxxx", id="cut"),
        pytest.param("'\\ud800'.encode('utf-8', 'surrogatepass')", r"b'\xed\xa0\x80'", id="half"),
        pytest.param("print('\\ud800')", "?", id="surrogate"),
    ],
)
async def test_what_a_program_prints_is_the_answer(
    sandbox: Sandbox, program: str, output: str
) -> None:
    assert await run(sandbox, program, output_chars=16, role="user") == [(output, False)]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param("print(1)\n1/0", ["1\nTraceback", "line 2", "ZeroDivisionError"], id="raises"),
        pytest.param("def", ["SyntaxError"], id="syntax"),
        pytest.param("while True: pass", ["the program used more than 1 s"], id="endless"),
        pytest.param("import os\nos._exit(3)", ["the program failed (exit code 3)"], id="exits"),
        pytest.param("'x' * (600 << 20)", ["MemoryError"], id="memory"),
        pytest.param("print('x' * (9 << 20))", ["the program returned too much"], id="flood"),
        pytest.param("open('/etc/passwd').read()", ["Error"], id="files"),
    ],
)
async def test_a_program_that_fails_is_told_how(
    sandbox: Sandbox, program: str, words: list[str]
) -> None:
    ((output, failed),) = await run(sandbox, program, time_s=1.0)
    assert failed and all(word in output for word in words), output


async def test_names_live_on_only_where_state_is_kept(sandbox: Sandbox) -> None:
    (_, (lost, failed)) = await run(sandbox, "x = 6", "x * 7")
    assert failed and "NameError" in lost
    assert (await run(sandbox, "x = 6", "x * 7", keep_state=True))[1] == ("42", False)
    after = await run(sandbox, "x = 6", "while True: pass", "x", keep_state=True, time_s=1.0)
    assert [failed for _, failed in after] == [False, True, True]  # with an interpreter of its own


async def test_a_turn_without_a_call_ends_the_episode(sandbox: Sandbox) -> None:
    async with python_tool(sandbox, PythonToolConfig()) as tool:
        assert await tool.step([], "42") == Over()
        both = f"<tool_call>{JSON}</tool_call><tool_call>{{}}</tool_call>"
        reply = await tool.step([], both)
        assert isinstance(reply, Reply) and reply.failed
        assert [m["content"] for m in reply.messages] == ["42", "the only tool is python"]


async def test_a_sandbox_that_cannot_be_made_is_no_fault_of_the_student(sandbox: Sandbox) -> None:
    class Full:
        def start(self, *_: object) -> Any:
            raise NotStarted("no processes left")

    async with python_tool(Full(), PythonToolConfig()) as tool:
        with pytest.raises(EnvironmentFailed, match="no processes left"):
            await tool.step([], f"```python\n{CODE}\n```")
