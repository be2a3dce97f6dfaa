"""The table of all families, and a few of them that need the most care, made and tried anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

from benchmarks.families import (
    MARK,
    Row,
    examine,
    examine_vllm,
    plain,
    table,
    tiny_config,
    write,
)  # fmt: skip
from services import packed
from services.models import ModelError, load_model, parameter_shapes, stored_names, write_model
from tests.builders import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


# Of each, what makes it unlike those of tests/services/test_layouts.py.
FAMILIES = {
    "bert": "its output is more than one matrix",
    "cohere_compass_text": "its rotary embedding has three positions",
    "dbrx": "experts; settings in configs of their own",
    "deepseek_v3": "latent attention; values are narrower than keys",
    "exaone4": "no rotation where it sees everything",
    "glm_moe_dsa": "its own attention chooses keys",
    "llama4_text": "chunks, experts",
    "mamba": "no attention",
    "openai-gpt": "has no cache",
    "opt": "learns positions",
    "phi3": "queries, keys and values are one matrix",
    "roberta": "a padding token has no position",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_the_page_says(family: str) -> None:
    (line,) = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {family} |")
    ]  # fmt: skip
    found = examine(family)
    said = f"| {family} | {found.score} | {found.gradient} | {found.sampling} |"
    assert line.startswith(said)


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",  # experts that are packed anew
        "gpt_oss",  # experts and sinks that are written past their loaders
    ],
)
def test_a_family_is_right_in_vllm_under_new_weights(family: str) -> None:
    assert asyncio.run(examine_vllm(family)) == "right"


def test_the_page_holds_every_family() -> None:
    text = PAGE.read_text(encoding="utf-8").split(MARK)[1]
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert f"| {family} |" in text or f"* {family}: " in text, family


def test_what_is_wrong_is_not_among_the_right() -> None:
    rows = [
        Row("fine", "A", "packed", "right", "no cache"),
        Row("served", "A", "rows", "right", "no cache", "right"),
        Row("refused", "A", "rows", "right", "no cache", "vLLM says | " + "no " * 40),
        Row("before", "A", "rows", "right", "no cache"),
        Row("unknown", "C", "rows", "right", "no cache"),
        Row("off", "B", "packed", "WRONG by 2 at x", "no cache"),
        Row("odd", "C", "rows", "right", "WRONG by 0.3"),
    ]
    old = {"before": "WRONG by 0.2", "fine": "no", "unknown": "listed"}
    made = table(rows, frozenset({"A"}), old)
    assert "| fine | packed | right | no cache | listed |" in made
    assert "| served | rows | right | no cache | right |" in made
    assert "| refused | rows | right | no cache | vLLM says / no no" in made
    assert "| before | rows | right | no cache | WRONG by 0.2 |" in made
    assert "| unknown | rows | right | no cache | no |" in made
    assert max(map(len, made.splitlines())) < 120
    assert "* off: WRONG by 2 at x" in made and "* odd: WRONG by 0.3" in made
    assert "5 of 7 families" in made


def test_a_family_examined_alone_changes_its_line_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"text\n\n{MARK}\n\n| a | old |\n| b | old |\n\n* c: off\n", encoding="utf-8")
    write(page, [Row("b", "B", "rows", "right", "no cache", "right")], frozenset())
    assert page.read_text(encoding="utf-8") == (
        f"text\n\n{MARK}\n\n| a | old |\n| b | rows | right | no cache | right |\n\n* c: off\n"
    )


def test_what_was_found_with_vllm_stays_when_it_is_not_asked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"text\n\n{MARK}\n\n| b | packed | right | old | right |\n", encoding="utf-8")
    for known in (frozenset({"B"}), frozenset()):
        write(page, [Row("b", "B", "rows", "right", "no cache")], known)
        assert "| b | rows | right | no cache | right |" in page.read_text(encoding="utf-8")


def test_the_text_model_inside_a_multimodal_checkpoint_is_put_back_after_training(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    source, export = tmp_path / "whole", tmp_path / "export"
    whole = Qwen3_5ForConditionalGeneration(tiny_config("qwen3_5")).bfloat16().eval()
    whole.save_pretrained(source, max_shard_size="200KB")
    text: Any = load_model(str(source))
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    parameters = dict(text.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert parameter_shapes(str(source)) == shapes
    ids = [3, 4, 5, 6, 7, 8]
    (scores,) = packed.score(packed.prepare(text), [ids], [1])
    torch.testing.assert_close(torch.tensor(scores), plain(whole.float(), ids), rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in parameters.values():  # trains
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    write_model(export, text.config, parameters, tiny_tokenizer(64))

    before, after = stored(source), stored(export)
    assert before.keys() == after.keys()
    vision = {name for name in before if ".visual." in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert vision and not vision & changed
    assert all(after[name].dtype == torch.bfloat16 for name in vision)
    assert {stored_names(str(source), shapes)[name] for name in shapes} == changed
    expected = plain(text, ids)
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        again = kind.from_pretrained(export).eval()
        torch.testing.assert_close(plain(again, ids), expected, rtol=0, atol=1e-5)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as they are in its files."""
    return {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}


def test_a_multimodal_checkpoint_without_a_tensor_is_refused(tmp_path: Path) -> None:
    whole = Qwen3_5ForConditionalGeneration(tiny_config("qwen3_5"))
    whole.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"could not be put back: it holds no tensor of model.odd"):
        stored_names(str(tmp_path), ["model.norm.weight", "model.odd"])
