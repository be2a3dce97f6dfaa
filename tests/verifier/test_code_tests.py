"""Programs are really run here, in real sandboxes: right ones, wrong ones, slow and greedy ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from services.errors import Unavailable
from services.sandbox import confined
from services.sandbox.bubblewrap import Bubblewrap
from services.sandbox.confined import Limits
from services.trajectory import Verdict
from tests.waiting import DEADLINE_S
from verifier import code_tests
from verifier.code_tests import CodeJudge
from verifier.config import CodeConfig

CONFIG = CodeConfig(time_s=2, memory_mb=256, disk_mb=1, output_mb=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judge() -> CodeJudge:
    return await CodeJudge.start(CONFIG)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def landlock() -> CodeJudge:
    return await CodeJudge.start(CONFIG.model_copy(update={"sandbox": "landlock"}))


pytestmark = pytest.mark.asyncio(loop_scope="module")

SUM = {"inputs": ["1 2 3", "4 5\n"], "outputs": ["6\n", "9"]}
ADD = {"inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]], "fn_name": "add"}
TWO_SUM = [
    {"input": "[2,7,11,15]\n9", "output": "[0, 1]", "testtype": "functional", "fn_name": "two_sum"},
    {"input": "[3,3]\n6", "output": "[0,1]", "testtype": "functional"},
]
HUMAN_EVAL = {
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "entry_point": "double",
    "test": "def check(candidate):\n"
    "    for i in range(5):\n        assert candidate(i) == i + i\n"
    "    assert abs(candidate(0.1) - 0.2) < 1e-9\n"
    "    assert candidate((1, 2)) == (1, 2, 1, 2)\n",
}
MBPP = {
    "test_setup_code": "import math",
    "test_list": ["assert area(1) == math.pi", "assert unit() == {'a': {1, 2}}"],
}


_TREE = "class Tree:\n def __init__(s, v, l=None, r=None): s.v, s.l, s.r = v, l, r\n"
DEPTH = {
    "entry_point": "depth",
    "test": _TREE + "def check(candidate):\n"
    "    assert candidate(Tree(1, Tree(2), Tree(3, Tree(4)))) == 3\n"
    "    assert candidate(None) == 0",
}
MIRROR = {
    "entry_point": "mirror",
    "test": _TREE + " def __eq__(s, o): return (s.v, s.l, s.r) == (o.v, o.l, o.r)\n"
    "class Anything:\n def __eq__(s, o): return True\n"
    "def check(candidate):\n"
    "    assert candidate(Tree(1, Tree(2))) == Tree(1, None, Tree(2))",
}
PAIRS = {"test_list": ["assert span([Pair(1, 5), Pair(2, 3)]) == 4"]}
_DEPTH = "def depth(t): return 1 + max(depth(t.l), depth(t.r)) if t else 0"
_MIRROR = "def mirror(t):\n if t: t.l, t.r = mirror(t.r), mirror(t.l)\n return t"
_PAIR = "class Pair:\n def __init__(self, a, b): self.a, self.b = a, b\n"


@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("print(sum(map(int, input().split())))", SUM),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), end='\\n\\n')", SUM),
        ("if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))", SUM),
        ("def add(a, b): return a + b", ADD),
        ("class Solution:\n def add(self, a, b):\n  print('hi')\n  return a + b", ADD),
        (
            "class Solution:\n"
            "    def two_sum(self, nums: List[int], target: int) -> List[int]:\n"
            "        seen = defaultdict(int)\n"
            "        for i, n in enumerate(nums):\n"
            "            if target - n in seen: return (seen[target - n], i)\n"
            "            seen[n] = i\n",
            TWO_SUM,
        ),
        ("def double(x):\n    return x + x", HUMAN_EVAL),
        ("    return x + x", HUMAN_EVAL),
        ("def area(r): return pi * r * r\ndef unit(): return {'a': {2, 1}}", MBPP),
        ("import threading\nt = threading.Thread(target=lambda: print(1))\nt.start()\nt.join()",
         {"inputs": [""], "outputs": ["1"]}),
        ("open('note', 'w').write('7')\nprint(open('note').read())",
         {"inputs": [""], "outputs": ["7"]}),
        ("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20000))",
         {"inputs": [""], "outputs": ["20000"]}),
        (_DEPTH, DEPTH),
        (f"class Solution:\n def depth(self, t: Optional[int]):\n  {_DEPTH}\n  return depth(t)",
         DEPTH),
        (_TREE + _DEPTH, DEPTH),
        (_MIRROR, MIRROR),
        (_PAIR + "def span(ps): return max(p.b - p.a for p in ps)", PAIRS),
        ("def add(a, b):\n yield a\n yield b",
         {"test_list": ["assert list(add(1, 2)) == [1, 2]", "assert add(1, 2) != [1, 2]"]}),
        ("print('x' * 500000)", {"inputs": ["y" * 900_000], "outputs": ["x" * 500_000]}),
    ],
)  # fmt: skip
async def test_right_programs(
    judge: CodeJudge, landlock: CodeJudge, source: str, reference: Any
) -> None:
    completion = f"Thus:\n```python\n{source}\n```\n"
    for level in (judge, landlock):
        verdict = await level.judge(completion, json.dumps(reference))
        assert verdict.outcome == "correct", verdict


@pytest.mark.parametrize(
    ("source", "reference", "reason"),
    [
        ("print(6)", SUM, "case 2: the output differs"),
        ("print(1 / 0)", SUM, "case 1: the program failed (ZeroDivisionError: division by zero)"),
        ("print(6); exit(1)", SUM, "case 1: the program failed (exit code 1)"),
        ("def f(:", SUM, "case 1: the program failed (SyntaxError: invalid syntax)"),
        ("while True: pass", SUM, "case 1: the program used more than 2 s"),
        ("print('x' * (2 << 20))", SUM, "the program printed more than 1 MiB"),
        ("x = bytearray(1 << 30)", SUM, "case 1: the program failed (MemoryError)"),
        ("def add(a, b): return a", ADD, "case 1: the value differs"),
        ("def add(a, b): return True", {**ADD, "outputs": [1, 1]}, "case 1: the value differs"),
        ("def sub(a, b): return a", ADD, "case 1: the program failed (KeyError: 'add')"),
        ("def add(a, b): return add", ADD,
         "case 1: the program failed (TypeError: a function is not plain data)"),
        ("def depth(t): return 3", DEPTH, "after 2 calls, a test failed (AssertionError)"),
        ("def mirror(t): return t", MIRROR,
         "after 1 calls, a test failed (AttributeError: 'NoneType' object has no attribute 'v')"),
        ("class Anything: pass\ndef mirror(t): return Anything()", MIRROR,
         "after 1 calls, a test failed (AttributeError: 'Anything' object has no attribute 'v')"),
        (_TREE + " def __eq__(s, o): return True\ndef mirror(t): return Tree(9)", MIRROR,
         "after 1 calls, a test failed (AssertionError)"),
        (_PAIR + "def span(ps): return ps[0].a", PAIRS,
         "after 3 calls, a test failed (AssertionError)"),
        (_PAIR + "def add(a, b): return Pair(a, b)", ADD,
         "the program returned what is not plain data"),
        ("def double(x): return x", HUMAN_EVAL, "after 2 calls, a test failed (AssertionError)"),
        ("def double(x): return None", HUMAN_EVAL, "after 1 calls, a test failed (AssertionError)"),
        ("def double(x): raise ValueError('no')", HUMAN_EVAL,
         "call 1: the program failed (ValueError: no)"),
    ],
)  # fmt: skip
async def test_wrong_programs(judge: CodeJudge, source: str, reference: Any, reason: str) -> None:
    verdict = await judge.judge(f"```py\n{source}\n```", json.dumps(reference))
    assert verdict == Verdict("incorrect", reason)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("6", "the reference cannot be read: it is neither an object nor a list"),
        ("six", "the reference cannot be read: it is not JSON"),
        ('{"inputs": [], "outputs": []}',
         "the reference cannot be read: ValueError: there are no cases"),
        ('{"inputs": ["1"]}', "the reference cannot be read: KeyError: 'outputs'"),
        ('{"test_list": ["assert 1 == 2"]}',
         "the tests cannot be run: they failed (AssertionError)"),
        ('{"test_list": ["assert True"]}', "the tests never called the program"),
    ],
)  # fmt: skip
async def test_tests_that_cannot_judge_leave_it_unknown(
    judge: CodeJudge, reference: str, reason: str
) -> None:
    assert await judge.judge("print(6)", reference) == Verdict("unknown", reason)


PROMPT_WITH_HELPER = {
    "prompt": "import math\n\ndef enc(s):\n    return s[::-1]\n\n\ndef dec(s):\n    '''Undo.'''\n",
    "entry_point": "dec",
    "test": "def check(candidate):\n    assert candidate(enc('abc')) == 'abc'\n",
}
NEGATIVE = {
    "prompt": "def f(n):\n",
    "entry_point": "f",
    "test": "def check(f):\n    assert f(3) == 3\n    try:\n        f(-1)\n"
    "    except ValueError:\n        return\n    assert False\n",
}
ONE = {"inputs": [""], "outputs": ["1"]}
STACK = "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n"
STACK += "@lru_cache(None)\ndef f(n): return 1 if n == 0 else f(n - 1)\nprint(f(20000))"
INPUT = "def add(a, b):\n    try:\n        input()\n    except EOFError:\n        return a + b"
BIG = {"inputs": ["9" * 5000], "outputs": ["1" + "0" * 5000], "fn_name": "f"}
MET = [{"input": "3", "output": "4", "testtype": "functional"} | {"metadata": '{"func_name": "f"}'}]


@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("print(open('/dev/stdin').read())", {"inputs": ["1"], "outputs": ["1"]}),
        ("import pathlib\nprint(pathlib.Path('/dev/stdin').read_text())",
         {"inputs": ["1"], "outputs": ["1"]}),
        (STACK, ONE),
        (INPUT, ADD),
        ("print(len(str(10**5000)))", {"inputs": [""], "outputs": ["5001"]}),
        ("print(1 / 3)", {"inputs": [""], "outputs": ["0.3333333333"]}),
        ("def f(n): return n + 1", BIG),
        ("def f(n): return n + 1", MET),
        ("def f(n): return n * 0.1", {"inputs": [[3]], "outputs": [0.3], "fn_name": "f"}),
        ("def dec(s): return s[::-1]", PROMPT_WITH_HELPER),
        ("return s[::-1]", PROMPT_WITH_HELPER),
        ("def f(n):\n    if n < 0: raise ValueError('negative')\n    return n", NEGATIVE),
        ("class Own(ValueError): pass\ndef f(n):\n if n < 0: raise Own()\n return n", NEGATIVE),
    ],
)  # fmt: skip
async def test_what_the_field_s_programs_take_for_granted(
    judge: CodeJudge, landlock: CodeJudge, source: str, reference: Any
) -> None:
    for level in (judge, landlock):
        verdict = await level.judge(f"```Python3\n{source}\n```", json.dumps(reference))
        assert verdict.outcome == "correct", verdict


@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("def f(n): return n", NEGATIVE),
        ("def f(n): raise KeyError(n)", NEGATIVE),
        ("def f(n): raise NameError('f')", NEGATIVE),  # its own fault, whatever its name
        ("class eval(Exception): pass\ndef f(n): raise eval('1')", NEGATIVE),
        ("def add(a, b): return missing", ADD),
        ("print('\\ud800')", ONE),
        ("print(0.333334)", {"inputs": [""], "outputs": ["0.3333333333"]}),
    ],
)
async def test_no_exception_of_a_program_is_anybody_else_s_fault(
    judge: CodeJudge, source: str, reference: Any
) -> None:
    verdict = await judge.judge(f"```py3\n{source}\n```", json.dumps(reference))
    assert verdict.outcome == "incorrect", verdict


@pytest.mark.parametrize(
    "reference",
    [
        {"test": "def check(f):\n    f(1)\n    import numpee\n", "entry_point": "f"},
        {"test": "def check(f):\n    f(1)\n    del x\n", "entry_point": "f"},
        {"test": "def check(f):\n    f(lambda: 1)\n", "entry_point": "f"},
        {"test": "def check(f:\n", "entry_point": "f"},
        [{"input": "1", "output": "1", "testtype": "functional"}],
        {"inputs": ["{"], "outputs": ["1"], "fn_name": "f"},
        {"inputs": ["1", "2"], "outputs": ["1"]},
    ],
)
async def test_a_reference_s_own_fault_is_never_the_program_s(
    judge: CodeJudge, reference: Any
) -> None:
    verdict = await judge.judge("def f(n): return n", json.dumps(reference))
    assert verdict.outcome == "unknown", verdict
    nested = await judge.judge("def f(n): return n", "[" * 100_000)
    assert nested == Verdict("unknown", "the reference cannot be read: it is not JSON")


async def test_every_case_has_a_fresh_sandbox(judge: CodeJudge, landlock: CodeJudge) -> None:
    """What one run of a program leaves behind, no other finds."""
    source = "import os\nprint(os.listdir('.'))\nopen('note', 'w').write('7')"
    cases = json.dumps({"inputs": ["", ""], "outputs": ["[]", "[]"]})
    for level in (judge, landlock):
        assert (await level.judge(source, cases)).outcome == "correct"
        assert (await level.judge(source, cases)).outcome == "correct"


@pytest.mark.parametrize("level", ["bubblewrap", "landlock"])
async def test_programs_die_with_a_verifier_that_is_killed(level: str) -> None:
    """Although they never look at the pipes that are closed under them."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, level], cwd=Path(__file__).parents[2])
    family: list[psutil.Process] = []
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not any(map(_spins, family)):
                assert parent.poll() is None
                family = psutil.Process(parent.pid).children(recursive=True)
                await asyncio.sleep(0.02)
        parent.kill()
        async with asyncio.timeout(DEADLINE_S):
            while any(map(_lives, family)):
                await asyncio.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
        for process in filter(_lives, family):
            process.kill()


_PARENT = """
import asyncio, sys
from verifier.code_tests import CodeJudge
from verifier.config import CodeConfig

async def main():
    judge = await CodeJudge.start(CodeConfig(sandbox=sys.argv[1], time_s=3600))
    await judge.judge("while True: pass", '{"inputs": [""], "outputs": [""]}')

asyncio.run(main())
"""


def _spins(process: psutil.Process) -> bool:
    """Whether it is past its start, and so in the loop of its program."""
    with suppress(psutil.NoSuchProcess):
        return "program 3600" in " ".join(process.cmdline()) and process.cpu_times().user > 0.3
    return False


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


async def test_a_reference_may_lower_the_limits_and_not_raise_them(judge: CodeJudge) -> None:
    hungry = "x = bytearray(100 << 20)\nprint(6 if input() == '1 2 3' else 9)"
    assert (await judge.judge(hungry, json.dumps(SUM))).outcome == "correct"
    lower = await judge.judge(hungry, json.dumps({**SUM, "memory_limit": 64}))
    assert lower.reason == "case 1: the program failed (MemoryError)"
    higher = await judge.judge("x = bytearray(1 << 29)", json.dumps({**SUM, "memory_limit": 4096}))
    assert higher.reason == "case 1: the program failed (MemoryError)"


# ------------------------------------------------------- whose fault it is that there is no result


@pytest.fixture
def short_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "wall_s", property(lambda self: 0.5))


@pytest.fixture
def crowded() -> Iterator[int]:
    """A processor that others keep busy."""
    place = min(os.sched_getaffinity(0))
    spinning = f"import os\nos.sched_setaffinity(0, [{place}])\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spinning]) for _ in range(3)]
    yield place
    for other in others:
        other.kill()
        other.wait()


async def program_of(judging: asyncio.Task[Verdict]) -> psutil.Process:
    """The process of the endless program that is judged now."""
    async with asyncio.timeout(DEADLINE_S):
        while not judging.done():
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    told = " ".join(process.cmdline())
                    if ("/inside.py" in told or "/landlocked.py" in told) and (
                        process.cpu_times().user >= 0.25
                    ):
                        return process
            await asyncio.sleep(0.001)
    raise AssertionError(judging.result())


@pytest.mark.usefixtures("short_wall")
async def test_a_program_that_the_machine_had_no_time_for_is_not_incorrect(
    judge: CodeJudge, landlock: CodeJudge, crowded: int
) -> None:
    for level in (judge, landlock):
        judging = asyncio.create_task(level.judge("while True: pass", json.dumps(SUM)))
        program = await program_of(judging)  # which ran for half of its time by then
        program.cpu_affinity([crowded])
        # It runs for a moment every tenth of a second: the kernel counts a wait when it is over.
        program.nice(min(19, os.nice(0) + 10))
        assert await judging == Verdict(
            "unknown",
            "the program did not get 2 s of a processor within 2 s",
        )


@pytest.mark.usefixtures("short_wall")
@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("import time\ntime.sleep(3600)", SUM),
        ("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", SUM),
        ("import time\ndef add(a, b):\n time.sleep(0.1)\n return a + b",
         {"inputs": [[1, 2]] * 99, "outputs": [3] * 99, "fn_name": "add"}),
        ("import time\ndef double(x):\n time.sleep(0.4)\n return x + x", HUMAN_EVAL),
    ],
    ids=["it sleeps", "it waits for itself", "it sleeps in each call", "and so in each test"],
)  # fmt: skip
async def test_a_program_that_sleeps_until_its_time_is_over_is_incorrect(
    judge: CodeJudge, source: str, reference: Any
) -> None:
    verdict = await judge.judge(source, json.dumps(reference))
    assert verdict.outcome == "incorrect"
    assert re.search(r"took longer than (0.5|2) s, of which it slept 0.25$", verdict.reason)


async def test_a_program_that_is_killed_from_outside_is_not_incorrect(
    judge: CodeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel kills when the machine's memory runs out, and counts."""
    counts = tmp_path / "vmstat"
    counts.write_text("pgfault 5\noom_kill 1\n")
    monkeypatch.setattr(confined, "_COUNTS", counts)
    patient = CodeJudge(judge._sandbox, CodeConfig(time_s=3600), 0)
    judging = asyncio.create_task(patient.judge("while True: pass", json.dumps(SUM)))
    program = await program_of(judging)
    counts.write_text("pgfault 5\noom_kill 2\n")
    program.kill()
    assert await judging == Verdict(
        "unknown",
        "the program was killed before its time was over: is there enough memory?",
    )


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(137)",
        "raise SystemExit(137)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    ],
)
async def test_a_program_that_ends_as_if_it_were_killed_is_incorrect(
    judge: CodeJudge, landlock: CodeJudge, source: str
) -> None:
    assert Path("/proc/vmstat").exists()
    for level in (judge, landlock):
        verdict = await level.judge(source, json.dumps(SUM))
        assert verdict.outcome == "incorrect" and "failed" in verdict.reason


@pytest.mark.usefixtures("short_wall")
async def test_tests_that_say_nothing_and_do_not_end_hold_no_place(landlock: CodeJudge) -> None:
    tests = "import os, time\ndef check(f):\n os.closerange(0, 64)\n time.sleep(3600)"
    reference = json.dumps({"test": tests, "entry_point": "double"})
    verdict = await landlock.judge("def double(x): return x + x", reference)
    assert verdict.outcome == "unknown" and "took longer" in verdict.reason


async def test_a_sandbox_that_cannot_be_made_judges_nobody(judge: CodeJudge) -> None:
    """Its items wait until one can be made, as for anything else that is out of reach."""
    sandbox = judge._sandbox
    assert isinstance(sandbox, Bubblewrap)
    broken = replace(sandbox, command=(*sandbox.command, "--ro-bind", "/no", "/no"))
    with pytest.raises(Unavailable, match=r"no sandbox can be made: a program failed \(bwrap: "):
        await CodeJudge(broken, CONFIG, 0).judge("print(6)", json.dumps(SUM))


async def test_slow_programs_do_not_take_all_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tests, "_QUICK_S", 0.2)
    judge = await CodeJudge.start(CONFIG.model_copy(update={"time_s": 3600}))
    case = '{"inputs": [""], "outputs": ["1"]}'
    forever = "import time\ntime.sleep(3600)"
    slow = [asyncio.create_task(judge.judge(forever, case)) for _ in range(2)]
    async with asyncio.timeout(DEADLINE_S):
        while (judge.slow, judge.waiting) != (1, 0):  # the first one moved, and let the second in
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(judge.judge("print(1)", case))
        while judge.waiting != 1:  # there is one place for the slow, and it is taken
            await asyncio.sleep(0.01)
        slow[0].cancel()
        assert (await waiting).outcome == "correct"
        slow[1].cancel()
        await asyncio.wait(slow)
    assert (judge.slow, judge.waiting) == (0, 0)
