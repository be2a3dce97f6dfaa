"""Programs as text: which block is the program, and which output is the expected one."""

from __future__ import annotations

import pytest

from verifier.code_text import program, same_output, same_value


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        ("print(1)", "print(1)"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\nno:\n```python3\nprint(2)\n```\n", "print(2)\n"),
        ("```python\nprint(1)\n```\nrun it:\n```bash\npython a.py\n```\n", "print(1)\n"),
        ("```python\nprint(1)\n", ""),
        ("```bash\nls\n```", ""),
        ("```PYTHON\nprint(1)\n```\nPrints:\n```\n1\n```", "print(1)\n"),
        ("```\nprint(1)\n```\nPrints:\n```\n1\n```", "print(1)\n"),
        ("```python title='a.py'\nprint(1)\n```", "print(1)\n"),
        ("Use:```python\nprint(1)\n```", "print(1)\n"),
        ("```{.python}\nprint(1)\n```", "print(1)\n"),
        ("~~~python\nprint(1)\n~~~", "print(1)\n"),
        ("1. So:\n   ```py\n   if 1:\n       print(1)\n   ```", "if 1:\n    print(1)\n"),
        ("```python\nprint(0)\nlet me see\n```python\nprint(1)\n```", "print(1)\n"),
        ("<think>\n```python\nprint(0)\n</think>\n```python\nprint(1)\n```", "print(1)\n"),
        ("<think>\n```python\nprint(0)\n```\nI wonder", ""),
        ("Thus:\n\n    if 1:\n        print(1)\n", "if 1:\n    print(1)\n"),
        ("    return 1", "    return 1"),
        ("> ```python\n> print(1)\n> ```", "print(1)\n"),
        ("```python\nprint(1)\n```<|im_end|>", "print(1)\n"),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint(1)\n```\n```python\n# Example:\n# a.py\n```", "print(1)\n"),
        ("\ufeff```python\n\ufeffprint(1)\n```", "print(1)\n"),
        ("[BEGIN]\nprint([1])\n[DONE]", "print([1])\n"),
        ("<code>\nprint(1 < 2)\n</code>", "print(1 < 2)\n"),
        ("```python\nprint(1)\n# ```\nprint(2)\n```", "print(1)\n# ```\nprint(2)\n"),
    ],
)
def test_the_last_block_of_python_is_the_program(completion: str, source: str) -> None:
    assert program(completion) == source


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1.0 2", "1 2.000", True),
        ("1  2 \n3", "1 2\n3\n", True),
        ("1 2\n\n3", "1 2\n3", False),
        ("yes", "YES", False),
        ("1e1000000", "1", False),
        ("NaN", "nan", False),
        ("", "0", False),
        ("0.1", "0.10000001", False),
        ("0.66666666666666662966", "0.6666666666666666", True),
        ("0.3333333333 2", "0.3333333333333333 2", True),
        ("0.333333", "0.3333333333", True),
        ("0.333334", "0.3333333333", False),
        ("0.33", "0.3333333333", False),
        ("0.3333333333", "0.33", False),
        ("1000000000000000000001", "1000000000000000000002", False),
        ("1_0", "10", False),
    ],
)
def test_outputs(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        ((1, (2, 3)), [1, [2, 3]], True),
        ({1: "a"}, {"1": "a"}, True),
        (2.0, 2, True),
        (True, 1, False),
        ([1, 2], [2, 1], False),
        ({1, 2}, [1, 2], False),
        ("1", 1, False),
        (None, [], False),
        (0.1 + 0.2, 0.3, True),
        ([0.1 + 0.2], [0.3], True),
        (0.30001, 0.3, False),
        (1 / 3, 0.33333, True),
        (1 / 3, 0.3333, False),
        (1 / 3, 0.33334, False),
        (float("inf"), 0.33333, False),
        (3, 4, False),
    ],
)
def test_values(value: object, expected: object, same: bool) -> None:
    assert same_value(value, expected) is same


def test_the_thinking_counts_where_it_shall() -> None:
    thought = "<think>\n```python\nprint(0)\n```\nI wonder"
    assert program(thought, thinking=True) == "print(0)\n"


@pytest.mark.parametrize(
    "piece",
    [" ", "\t", "\n", "a", "_a ", "```\n", "~~", "`", "```py\n", "<think>", "</think>", ". ",
     "a =\n", "    x\n", "1"],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "```\n{}```\n", "{}` ```\n", "So:\n\n    {}\n"])
def test_a_megabyte_of_anything_is_read_once(piece: str, frame: str) -> None:
    """A hundred thousand blank lines in a block took minutes, a million would have taken hours."""
    text = frame.format(piece * (2**20 // len(piece)))
    assert len(program(text)) <= len(text)


@pytest.mark.parametrize("end", ["", "x", ".", "e", "e1x", ".5."])
def test_a_megabyte_of_digits_is_read_once(end: str) -> None:
    digits = "1" * 2**20
    assert not same_output(digits + end, "1.5")
    assert not same_output("1.5", f"0.{digits}{end}")
