from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from services.models import (
    ModelError,
    differences,
    end_tokens,
    fingerprint,
    load_model,
    locate,
    probe_tokens,
    write_model,
)
from services.packed import prepare
from tests.builders import VOCAB, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_the_same_directory_has_the_same_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    assert fingerprint(str(copy)) == fingerprint(str(model_dir))


def test_other_weights_are_another_model(model_dir: Path, tmp_path: Path) -> None:
    other = fingerprint(str(save_tiny(tmp_path, seed=1)))
    ours = fingerprint(str(model_dir))
    assert other.model != ours.model
    assert replace(other, model=ours.model) == ours
    assert differences(ours, other) == {}


def test_a_byte_in_the_middle_of_the_weights_is_another_model(tmp_path: Path) -> None:
    file = save_tiny(tmp_path) / "model.safetensors"
    before, content = fingerprint(str(tmp_path)).model, bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert fingerprint(str(tmp_path)).model != before


def test_each_difference_is_one_sentence(model_dir: Path) -> None:
    ours = fingerprint(str(model_dir))
    assert (
        "24 tokens, the teacher's 99"
        in differences(ours, replace(ours, tokenizer_size=99))["tokenizer"]
    )
    assert "not the same ids" in differences(ours, replace(ours, tokenizer="x"))["tokenizer"]
    assert "predicts 5 tokens" in differences(ours, replace(ours, vocab_size=5))["vocabulary"]
    assert (
        "student [1], teacher [7]"
        in differences(ours, replace(ours, end_tokens=(7,)))["end_tokens"]
    )
    assert (
        "chat templates differ"
        in differences(ours, replace(ours, chat_template="x"))["chat_template"]
    )


def test_a_padded_output_matrix_of_the_teacher_is_no_difference(model_dir: Path) -> None:
    ours = fingerprint(str(model_dir))
    assert differences(ours, replace(ours, vocab_size=ours.vocab_size + 128)) == {}


def test_end_tokens_come_from_the_generation_config_first(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    assert end_tokens(str(copy)) == (1,)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert end_tokens(str(copy)) == (3, 4)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "a/b/c"])
def test_a_missing_model_is_one_sentence(path: str) -> None:
    with pytest.raises(ModelError, match="is not a model directory"):
        locate(path)


def test_loading_gives_the_saved_weights(model_dir: Path) -> None:
    loaded, expected = load_model(str(model_dir)), tiny_model()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)


def test_the_probe_is_spread_over_the_vocabulary() -> None:
    assert all(0 <= token < VOCAB for token in probe_tokens(VOCAB))
    assert len(set(probe_tokens(151_936))) == 64


def test_what_is_written_loads_in_transformers(tmp_path: Path) -> None:
    model = prepare(tiny_model())
    write_model(tmp_path, model.config, dict(model.named_parameters()), tiny_tokenizer())
    loaded = load_model(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert loaded(torch.tensor([[2, 3]])).logits.shape == (1, 2, VOCAB)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([2, 3]) == "01"
