"""Datasets as the files have them, and the order that they are fed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout.config import DataConfig, SamplingConfig
from rollout.prompts import Context, PromptSource, Row, load_rows
from rollout.sources import DataError
from tests.builders import tiny_tokenizer

SAMPLING = SamplingConfig(n=3, max_tokens=16, temperature=0.6)
GOOD: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "1+2="}],
    "data_source": "sums",
    "reward_model": {"ground_truth": "3", "style": "rule"},
    "extra_info": {"index": 0},
}


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, which takes any text; the template ends with a generation prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}"
        "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def data(*paths: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"path": paths, "max_prompt_tokens": 4096, **changes})


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompt_that_is_text_is_one_user_message(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = {**GOOD, "prompt": GOOD["prompt"][0]["content"]}
    lines = jsonl(tmp_path / "rows.jsonl", plain, GOOD)
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([plain]), table)
    made = load_rows(data(lines, table), byte_tokenizer)
    assert len({tuple(row.token_ids) for row in made}) == 1
    assert len(made) == 3


def rows(count: int) -> list[Row]:
    return [Row(np.array([number], np.int32), "test", str(number)) for number in range(count)]


def source(count: int, *, seed: int = 0, **changes: Any) -> PromptSource:
    return PromptSource(rows(count), SAMPLING, seed=seed, data=data(Path("x.jsonl"), **changes))


# ------------------------------------------------------------------------------- reading


def test_the_authors_own_parquet(deepmath: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    read = load_rows(data(deepmath), byte_tokenizer)
    raw = pq.read_table(deepmath).to_pylist()
    assert len(read) == len(raw) == 1000
    for row, original in zip(read, raw, strict=True):
        text = f"<user>{original['prompt'][0]['content']}<assistant>"
        assert byte_tokenizer.decode(row.token_ids.tolist()) == text
        assert row.reference == original["reward_model"]["ground_truth"]
        assert row.data_source == "deepmath_new"


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    other = {**GOOD, "reward_model": {"ground_truth": "4", "style": "rule"}}
    lines = jsonl(tmp_path / "a.jsonl", GOOD, other)
    pq.write_table(pa.Table.from_pylist([GOOD, other]), tmp_path / "a.parquet")
    both = load_rows(data(lines, tmp_path / "a.parquet"), tiny_tokenizer())
    assert [r.reference for r in both] == ["3", "4", "3", "4"]
    assert [r.token_ids.tolist() for r in both] == [[3, 12, 4, 14]] * 4


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**GOOD, "prompt": [{"role": "user", "content": "1+2+3="}]}
    file = jsonl(tmp_path / "a.jsonl", GOOD, long, GOOD)
    with caplog.at_level("WARNING"):
        assert len(load_rows(data(file, max_prompt_tokens=4), tiny_tokenizer())) == 2
    assert "1 of 3 prompts are longer than 4 tokens" in caplog.text
    with pytest.raises(DataError, match="every prompt"):
        load_rows(data(file, max_prompt_tokens=3), tiny_tokenizer())


def test_a_number_is_a_ground_truth(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "reward_model": {"ground_truth": 42}})
    assert load_rows(data(file), tiny_tokenizer())[0].reference == "42"


def _route(named: str | None, data_source: str) -> str:
    if named == "cod":
        raise ValueError("this run has no teacher 'cod'; did you mean 'code'?")
    return named or data_source


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_s_teacher_travels_with_its_prompt(tmp_path: Path, suffix: str) -> None:
    named = {**GOOD, "extra_info": {"index": 1, "teacher": "code", "long": "x" * 100}}
    plain = {**GOOD, "extra_info": {"index": 2}}
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        jsonl(file, named, plain)
    else:
        pq.write_table(pa.Table.from_pylist([named, plain]), file)
    read = load_rows(data(file), tiny_tokenizer(), _route)
    assert [row.teacher for row in read] == ["code", "sums"]
    fed = PromptSource(read, SAMPLING, seed=0, data=data(file, shuffle=False))
    assert [fed.prompt(order).teacher for order in range(2)] == ["code", "sums"]
    assert {row.teacher for row in load_rows(data(file), tiny_tokenizer())} == {"default"}


def _default(named: str | None, data_source: str) -> str:
    return named or "default"


SOLVED = {**GOOD, "extra_info": {"solution": "1+2=3", "shots": 2, "long": "x" * 100}}
TEMPLATE = (("system", "{shots} {not a key} {reference}"), ("user", "{prompt}{solution}"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_teacher_s_context_is_made_of_the_row_and_the_student_never_sees_it(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, suffix: str
) -> None:
    plain = {**SOLVED, "extra_info": {**SOLVED["extra_info"], "teacher": "code"}}
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        jsonl(file, SOLVED, plain)
    else:
        pq.write_table(pa.Table.from_pylist([SOLVED, plain]), file)
    contexts = {"default": Context(TEMPLATE, byte_tokenizer, 100)}
    solved, other = load_rows(data(file), byte_tokenizer, _default, contexts=contexts)
    asked = GOOD["prompt"][0]["content"]
    assert byte_tokenizer.decode(solved.token_ids.tolist()) == f"<user>{asked}<assistant>"
    assert contexts["default"].text(solved) == (
        f"<system>2 {{not a key}} 3<user>{asked}1+2=3<assistant>"
    )
    assert other.teacher_context is None
    fed = PromptSource([solved, other], SAMPLING, seed=0, data=data(file, shuffle=False))
    assert fed.prompt(0).teacher_ids is solved.teacher_context
    assert fed.prompt(1).teacher_ids is other.token_ids


def test_each_teacher_has_its_own_context(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "think"}]
    own = {**GOOD, "extra_info": {"teacher": "code", "teacher_prompt": messages}}
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([own]), table)
    file = jsonl(tmp_path / "a.jsonl", SOLVED, own)
    contexts = {
        "default": Context((("user", "{solution}"),), byte_tokenizer, 100),
        "code": Context(None, tiny_tokenizer(), 100),
    }
    contexts["code"].tokenizer.chat_template = "3+{{ messages|length }}"
    read = load_rows(data(file, table), byte_tokenizer, _default, contexts=contexts)
    assert [contexts[row.teacher].text(row) for row in read] == [
        "<user>1+2=3<assistant>", "3+1", "3+1",
    ]  # fmt: skip


def test_a_context_that_does_not_fit_is_left_out_and_counted(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = {"default": Context((("user", "{solution}"),), byte_tokenizer, 22)}
    longer = {**SOLVED, "extra_info": {"solution": "1+2=03"}}
    file = jsonl(tmp_path / "a.jsonl", SOLVED, longer, SOLVED)
    with caplog.at_level("WARNING"):
        read = load_rows(data(file), byte_tokenizer, _default, contexts=contexts)
    assert [contexts["default"].text(row) for row in read] == ["<user>1+2=3<assistant>"] * 2
    assert "1 of 3 contexts of the teacher 'default' are longer than the 22 tokens" in caplog.text


@pytest.mark.parametrize(
    ("extra", "messages", "complaint"),
    [
        (None, TEMPLATE, "names 'shots'|names 'solution'"),
        ({"solution": None, "shots": 2}, TEMPLATE, "line 1: .* names 'solution', and the row's"),
        ({"solution": ["x"], "shots": 2}, TEMPLATE, "names 'solution', and the row's extra_info"),
        ({"solution": "\ud800", "shots": 2}, TEMPLATE, "the teacher's context: .* half a char"),
        ({}, None, "extra_info.teacher_prompt is neither text nor a list of chat messages"),
        ({"teacher_prompt": [{"role": "robot", "content": "x"}]}, None, "no robots"),
    ],
    ids=["no extra_info", "no value", "a list", "half a character", "no messages", "refused"],
)
def test_a_row_without_what_its_context_names_is_named(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast,
    extra: Any, messages: Any, complaint: str,
) -> None:  # fmt: skip
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "extra_info": extra})
    contexts = {"default": Context(messages, byte_tokenizer, 100)}
    with pytest.raises(DataError, match=complaint):
        load_rows(data(file), byte_tokenizer, _default, contexts=contexts)


@pytest.mark.parametrize(
    ("teacher", "complaint"),
    [("cod", "extra_info.teacher: this run has no teacher 'cod'; did you"), (7, "is not text")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_that_names_no_teacher_of_the_run_is_named(
    tmp_path: Path, suffix: str, teacher: str | int, complaint: str
) -> None:
    bad = {**GOOD, "extra_info": {"teacher": teacher}}
    file, where = tmp_path / f"a.{suffix}", "line 2" if suffix == "jsonl" else "row 1"
    if suffix == "jsonl":
        jsonl(file, GOOD, bad)
    else:
        pq.write_table(pa.Table.from_pylist([{**bad, "extra_info": {"teacher": None}}, bad]), file)
    with pytest.raises(DataError, match=complaint) as caught:
        load_rows(data(file), tiny_tokenizer(), _route)
    assert f"{file}, {where}: extra_info.teacher" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompt": None}, "column 'prompt' is missing"),
        ({"data_source": None}, "column 'data_source' is missing"),
        ({"data_source": 3}, "column 'data_source' is not text"),
        ({"reward_model": None}, "column 'reward_model' is missing"),
        ({"reward_model": {"style": "rule"}}, "column 'reward_model' has no ground_truth"),
        ({"reward_model": {"ground_truth": ""}}, "has no ground_truth"),
        ({"reward_model": "3"}, "has no ground_truth"),
        ({"reward_model": {"ground_truth": float("nan")}}, "'reward_model': ground_truth is nan"),
        ({"reward_model": {"ground_truth": float("-inf")}}, "ground_truth is -inf, no number"),
        ({"prompt": "1+\ud800="}, r"'prompt': '\\ud800' is half a character"),
        ({"prompt": ""}, "column 'prompt' is neither text nor a list of chat messages"),
        ({"prompt": []}, "is neither text nor a list of chat messages"),
        ({"prompt": [{"role": "user"}]}, "is neither text nor a list of chat messages"),
        (
            {"prompt": [{"role": "user", "content": ["1"]}]},
            "is neither text nor a list of chat messages",
        ),
        ({"prompt": [{"role": "robot", "content": "1"}]}, "refuses the messages: no robots"),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
    change: dict[str, Any],
    complaint: str,
) -> None:
    file = jsonl(tmp_path / "a.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(DataError, match=complaint) as caught:
        load_rows(data(file), byte_tokenizer)
    assert str(caught.value).startswith(f"{file}, line 2: column ")


def test_a_prompt_of_no_tokens(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {**GOOD, "prompt": [{"role": "user", "content": ""}]})
    with pytest.raises(DataError, match=r"line 1.*makes nothing of it"):
        load_rows(data(file), tiny_tokenizer())


def test_a_character_that_the_tokenizer_does_not_know_is_named(tmp_path: Path) -> None:
    model = models.WordLevel({"1": 0, "+": 1}, unk_token="[UNK]")  # and no such token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    known, unknown = ({**GOOD, "prompt": text} for text in ("1", "ü"))
    file = jsonl(tmp_path / "a.jsonl", known, unknown)
    with pytest.raises(
        DataError, match=r"line 2: column .prompt.: the tokenizer cannot encode .*UNK"
    ):
        load_rows(data(file), tokenizer)


def test_a_missing_parquet_column_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": GOOD["prompt"], "data_source": "x"}]), file)
    with pytest.raises(DataError, match=r"a\.parquet, row 0: column 'reward_model' is missing"):
        load_rows(data(file), tiny_tokenizer())


def _empty_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path / "a.parquet")
    return path / "a.parquet"


def _written(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path / name


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path / "a.jsonl", "there is no file"),
        (lambda path: path, r"is a directory: name its files, as in .*\*\.parquet"),
        (lambda path: _written(path, "a.csv", b"x"), "neither .parquet nor .jsonl"),
        (lambda path: _written(path, "a.jsonl", b"\n"), "is empty"),
        (lambda path: _written(path, "a.jsonl", b"{"), "line 1 is not JSON"),
        (lambda path: _written(path, "a.jsonl", b'"\xff"'), "line 1 is not JSON"),
        (lambda path: _written(path, "a.jsonl", b"[]"), "line 1 is not a JSON object"),
        (lambda path: _written(path, "a.parquet", b"PAR1"), "not an intact parquet"),
        (_empty_parquet, "is empty"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, make: Callable[[Path], Path], complaint: str) -> None:
    file = make(tmp_path)
    with pytest.raises(DataError, match=complaint) as caught:
        load_rows(data(file), tiny_tokenizer())
    assert str(file) in str(caught.value)


# ------------------------------------------------------------------------------ the order


@given(
    count=st.integers(1, 30),
    epochs=st.integers(1, 4),
    seed=st.integers(-(2**40), 2**40),
    shuffle=st.booleans(),
)
def test_every_epoch_has_every_row_once(count: int, epochs: int, seed: int, shuffle: bool) -> None:
    made = source(count, seed=seed, epochs=epochs, shuffle=shuffle)
    prompts = [made.prompt(order) for order in range(len(made))]
    assert len(prompts) == count * epochs
    for epoch in range(epochs):
        here = [int(p.token_ids[0]) for p in prompts[epoch * count : (epoch + 1) * count]]
        assert sorted(here) == list(range(count))
        if not shuffle:
            assert here == list(range(count))
    assert len({p.id for p in prompts}) == len(prompts)
    assert len({p.sampling.seed for p in prompts}) == len(prompts)
    assert [p.order for p in prompts] == list(range(len(prompts)))


@given(orders=st.lists(st.integers(0, 59), max_size=40), seed=st.integers(0, 2**32))
def test_any_prompt_can_be_had_at_any_time(orders: list[int], seed: int) -> None:
    again = source(20, seed=seed, epochs=3)
    for order in orders:
        fresh = source(20, seed=seed, epochs=3).prompt(order)
        assert (again.prompt(order).id, again.prompt(order).sampling) == (fresh.id, fresh.sampling)


def test_epochs_and_seeds_shuffle_differently() -> None:
    made, other = source(50, seed=1, epochs=2), source(50, seed=2)
    first, second = ([made.prompt(50 * e + i).token_ids[0] for i in range(50)] for e in (0, 1))
    assert first != second
    assert first != [other.prompt(i).token_ids[0] for i in range(50)]
    assert made.prompt(0).sampling.seed != other.prompt(0).sampling.seed


def test_the_order_is_pinned() -> None:
    """A run that is resumed with a newer NumPy must go on where it stopped."""
    made = source(8, seed=7)
    assert [int(made.prompt(i).token_ids[0]) for i in range(8)] == [3, 1, 4, 5, 0, 2, 6, 7]
    assert made.prompt(3).sampling.seed == 1122840046999092046


def test_a_prompt_carries_all_of_its_row_and_the_sampling() -> None:
    prompt = source(3, shuffle=False).prompt(2)
    assert (prompt.id, prompt.order, prompt.reference) == ("0-2", 2, "2")
    assert prompt.data_source == "test"
    assert prompt.min_weight_version == 0
    sampling = prompt.sampling
    assert (sampling.n, sampling.max_tokens, sampling.temperature) == (3, 16, 0.6)
    assert 0 <= sampling.seed < 2**62


@pytest.mark.parametrize("order", [-1, 6])
def test_there_is_no_prompt_past_the_end(order: int) -> None:
    with pytest.raises(IndexError, match="of 6"):
        source(3, epochs=2).prompt(order)
