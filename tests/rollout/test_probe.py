"""The check after each update: what is stale or swapped is found, what is only rounded passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from benchmarks.families import tiny
from rollout.transformers_engine import sequence_logprobs
from services.models import load_tokenizer, probe_tokens
from services.weights import Weights, WeightsMismatch, check_probe
from tests.builders import VOCAB, tiny_model, tiny_tokenizer

Model = TypeVar("Model", bound=PreTrainedModel)
TOLERANCE = 1e-3  # the default
NAMES = [name for name, _ in tiny_model(tied=False).named_parameters()]


# The mixtures have experts, attention sinks and biases.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: student(), "qwen3_moe": lambda: tiny("qwen3_moe"),
    "gpt_oss": lambda: tiny("gpt_oss"),
}  # fmt: skip


def student(seed: int = 0) -> Qwen3ForCausalLM:
    return tiny_model(seed, tied=False, spread=0.3)


def trained(model: Model, seed: int) -> Model:
    """A copy after a step of one per cent: about AdamW's of 1e-3 where weights are of 0.1."""
    after = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in after.parameters():
            weight += 0.01 * weight.abs().mean() * torch.randn_like(weight).sign()
    return after


def version(model: PreTrainedModel, number: int) -> Weights:
    probe = probe_tokens(model.config.vocab_size)
    logprobs = sequence_logprobs(model, probe)
    return Weights.flatten(number, model.named_parameters(), probe, logprobs)


def judged(
    engine: PreTrainedModel, weights: Weights, usual: float | None, tolerance: float = TOLERANCE
) -> float:
    return check_probe(weights, sequence_logprobs(engine, weights.probe_ids), tolerance, usual)


def swap(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(weight.flip(0) if weight.ndim > 1 else weight.roll(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["stale", "swapped"])
def test_each_single_tensor_that_is_not_the_learners_is_found(name: str, fault: str) -> None:
    before = student()
    after = trained(before, 1)
    usual = judged(before, version(before, 0), None)
    engine = copy.deepcopy(after)
    weight = engine.get_parameter(name)
    if fault == "swapped":
        swap(weight)
    else:
        with torch.no_grad():
            weight.copy_(before.get_parameter(name))
    with pytest.raises(WeightsMismatch, match=r"version 1: .* nats, more than"):
        judged(engine, version(after, 1), usual)


def test_each_tensor_of_a_mixture_of_experts_is_found_too() -> None:
    before = tiny("qwen3_moe")
    after, usual = trained(before, 1), judged(before, version(before, 0), None)
    weights = version(after, 1)
    for name, _ in before.named_parameters():
        stale, swapped = copy.deepcopy(after), copy.deepcopy(after)
        stale.load_state_dict({name: before.get_parameter(name)}, strict=False)
        swap(swapped.get_parameter(name))
        for engine in (stale, swapped):
            with pytest.raises(WeightsMismatch):
                judged(engine, weights, usual)


@pytest.mark.parametrize("family", MODELS)
def test_in_bfloat16_what_rounding_could_not_do_is_found(family: str) -> None:
    """One stale tensor is not, soon after it was: see docs/vllm.md."""
    before = MODELS[family]()
    usual = judged(copy.deepcopy(before).bfloat16(), version(before, 0), None, 0.3)
    after = before
    for seed in range(10):
        after = trained(after, seed)
    weights = version(after, 10)
    assert judged(copy.deepcopy(after).bfloat16(), weights, usual, 0.3) < 0.1
    with pytest.raises(WeightsMismatch):  # an update that changed nothing
        judged(copy.deepcopy(before).bfloat16(), weights, usual, 0.3)
    for name, weight in after.named_parameters():
        if weight.ndim == 1 or name.endswith("bias"):
            continue
        engine = copy.deepcopy(after).bfloat16()
        swap(engine.get_parameter(name))
        with pytest.raises(WeightsMismatch):
            judged(engine, weights, usual, 0.3)


def test_rounding_to_bfloat16_passes_version_after_version() -> None:
    model, usual = student(), None
    for number in range(6):
        weights = version(model, number)
        engine = copy.deepcopy(model).bfloat16()
        found = check_probe(weights, sequence_logprobs(engine, weights.probe_ids), 0.3, usual)
        usual = found if usual is None else usual
        assert 0 < found < 0.1
        model = trained(model, number)


def test_the_first_weights_say_how_far_later_ones_may_be_off() -> None:
    weights = version(student(), 3)
    near = [logprob + 5e-4 for logprob in weights.probe_logprobs]
    assert check_probe(weights, near, TOLERANCE) == pytest.approx(5e-4)
    with pytest.raises(WeightsMismatch, match="under its first weights it was 1e-06"):
        check_probe(weights, near, TOLERANCE, 1e-6)
    assert check_probe(weights, near, TOLERANCE, 1e-4) == pytest.approx(5e-4)


def test_a_few_outliers_pass_and_many_do_not() -> None:
    weights = version(student(), 0)
    count = len(weights.probe_logprobs)
    few = [0.8 if i < count // 12 else 0.0 for i in range(count)]
    many = [0.8 if i < count // 6 else 0.0 for i in range(count)]
    ours = weights.probe_logprobs
    assert check_probe(weights, [a + b for a, b in zip(ours, few, strict=True)], 0.1) < 0.1
    with pytest.raises(WeightsMismatch, match="nats"):
        check_probe(weights, [a + b for a, b in zip(ours, many, strict=True)], 0.1)


def test_the_probe_is_natural_text_where_the_tokenizer_knows_it() -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    assert probe_tokens(VOCAB, tokenizer) == probe_tokens(VOCAB)  # it knows a few of the letters
    tokenizer.add_tokens(list("ATIrithlnvskmpxLuf() \n*./:_"))
    ids = probe_tokens(len(tokenizer), tokenizer)
    assert tokenizer.decode(ids).startswith("A train leaves at 9:40")


def test_a_tokenizer_that_knows_no_letters_is_given_its_own_tokens() -> None:
    """The demo's, for which each unknown character is an error."""
    tokenizer = load_tokenizer("examples/arithmetic/student")
    assert probe_tokens(len(tokenizer), tokenizer) == probe_tokens(len(tokenizer))
