"""The demo task is what its README says: right data, and models that are as good as stated."""

import itertools
import re
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from examples.arithmetic.make_models import schoolbook, shown
from examples.arithmetic.measure import SAMPLES, complete, is_correct, measure
from examples.arithmetic.task import (
    HERE,
    Problem,
    build_tokenizer,
    held_out_problems,
    random_problems,
)

MODELS = ("student", "teacher", "reader")
SPLITS = {"train": 4096, "heldout": 256}
LARGEST_FOLDER = 7_500_000  # of which the five models take 6.6 million
# Half of the held-out prompts keep the test fast. Two standard errors are then about five points,
# and another version of torch may draw samples that fall anywhere in them.
PROMPTS = 128
TOLERANCE = 0.06


class Row(NamedTuple):
    prompt: str
    truth: str


def raw_rows(split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(HERE / f"{split}.parquet").to_pylist()
    return rows


def rows(split: str) -> list[Row]:
    return [
        Row(row["prompt"][0]["content"], row["reward_model"]["ground_truth"])
        for row in raw_rows(split)
    ]


def stated_accuracies(model: str) -> tuple[float, float]:
    """Avg@8 and Pass@8 from the README's table row of this model."""
    readme = (HERE / "README.md").read_text()
    found = re.search(rf"^\| {model} \|.*\| ([\d.]+)% \| ([\d.]+)% \|$", readme, re.MULTILINE)
    assert found is not None, f"the README states no accuracies for the {model}"
    return float(found[1]) / 100, float(found[2]) / 100


def test_no_prompt_is_in_both_splits_or_twice_in_one() -> None:
    train = [row.prompt for row in rows("train")]
    held_out = [row.prompt for row in rows("heldout")]
    assert len({*train, *held_out}) == len(train) + len(held_out)


def test_the_models_never_study_a_held_out_problem() -> None:
    held_out = held_out_problems()
    stream = random_problems(2, excluded=frozenset(held_out))  # the seed that drew the held-out set
    assert not set(held_out) & {next(stream) for _ in range(1000)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_ground_truth_is_the_value_of_its_prompt(split: str) -> None:
    for prompt, truth in rows(split):
        assert re.fullmatch(r"\d+[+-]\d+[+-]\d+=", prompt)
        assert str(eval(prompt.removesuffix("="))) == truth


@pytest.mark.parametrize(("split", "size"), SPLITS.items())
def test_the_files_have_the_columns_of_verl(split: str, size: int) -> None:
    found = raw_rows(split)
    assert len(found) == size
    for index, row in enumerate(found):
        solution = row["extra_info"].pop("solution")
        assert is_correct(solution, row["reward_model"]["ground_truth"])
        assert row["extra_info"] == {"index": index, "split": split}
        assert set(row) == {"prompt", "data_source", "reward_model", "extra_info"}
        assert row["data_source"] == "arithmetic"
        assert row["reward_model"]["style"] == "rule"
        assert [message["role"] for message in row["prompt"]] == ["user"]


def test_a_solution_is_a_chain_that_ends_in_the_answer() -> None:
    problem = Problem(37, (58, -21))
    assert problem.prompt == "37+58-21="
    assert problem.solution == "37+58=95,95-21=74;74"
    assert is_correct(problem.solution, problem.answer)


def test_a_slip_is_carried_on_and_is_wrong() -> None:
    problem = Problem(37, (58, -21))
    slipped = problem.solution_with((-10, 0))
    assert slipped == "37+58=85,85-21=64;64"
    assert not is_correct(slipped, problem.answer)
    assert Problem(5, (-3, 1)).solution_with((-10, 0)) is None


def test_only_a_careless_schoolbook_has_mistakes() -> None:
    def share_wrong(slip_rate: float) -> float:
        pages = list(itertools.islice(schoolbook(0, slip_rate), 400))
        return sum(not is_correct(text, problem.answer) for problem, text in pages) / len(pages)

    assert share_wrong(0.0) == 0.0
    assert share_wrong(0.5) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("model", MODELS)
def test_the_tokenizer_gives_one_token_a_character_and_back(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / model)
    text = "37+58=95,95-21=74;74"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("model", MODELS)
def test_the_chat_template_adds_nothing_to_the_prompt(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / model)
    messages = [{"role": "user", "content": "37+58-21="}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert text == "37+58-21="
    assert ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_all_models_have_the_same_tokenizer(name: str) -> None:
    assert len({(HERE / model / name).read_bytes() for model in MODELS}) == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_model_loads_and_stops_at_the_end_token(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / model)
    loaded = AutoModelForCausalLM.from_pretrained(HERE / model, dtype=torch.float32)
    assert loaded.config.model_type == "qwen3"
    assert loaded.config.vocab_size == len(tokenizer)
    assert loaded.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_reader_writes_down_what_it_is_shown() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(HERE / "reader", dtype=torch.float32)
    problems = held_out_problems()[:32]
    texts = complete(model, build_tokenizer(), [shown(problem) for problem in problems])
    answers = [problem.answer for problem in problems for _ in range(SAMPLES)]
    assert sum(map(is_correct, texts, answers)) / len(texts) > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_as_good_as_the_readme_says(model: str) -> None:
    average, passed = stated_accuracies(model)
    found = measure(HERE / model, prompts=PROMPTS)
    assert found.average == pytest.approx(average, abs=TOLERANCE)
    assert found.passed == pytest.approx(passed, abs=TOLERANCE)


def test_the_folder_stays_small() -> None:
    files = [path for path in HERE.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= LARGEST_FOLDER
