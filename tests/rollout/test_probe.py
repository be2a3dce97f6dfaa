"""The check after each update: what is stale or swapped is found, what is only rounded passes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3ForCausalLM

from rollout.transformers_engine import sequence_logprobs
from services.models import load_tokenizer, probe_tokens
from services.weights import Weights, WeightsMismatch, check_probe
from tests.builders import VOCAB, tiny_model, tiny_tokenizer

TOLERANCE = 1e-3  # the default
NAMES = [name for name, _ in tiny_model(tied=False).named_parameters()]


def student(seed: int = 0) -> Qwen3ForCausalLM:
    return tiny_model(seed, tied=False, spread=0.3)


def trained(model: Qwen3ForCausalLM, seed: int) -> Qwen3ForCausalLM:
    """A copy after a step of one per cent: about AdamW's of 1e-3 where weights are of 0.1."""
    after = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in after.parameters():
            weight += 0.01 * weight.abs().mean() * torch.randn_like(weight).sign()
    return after


def version(model: Qwen3ForCausalLM, number: int) -> Weights:
    probe = probe_tokens(VOCAB)
    logprobs = sequence_logprobs(model, probe)
    return Weights.flatten(number, model.named_parameters(), probe, logprobs)


def judged(engine: Qwen3ForCausalLM, weights: Weights, usual: float | None) -> float:
    return check_probe(weights, sequence_logprobs(engine, weights.probe_ids), TOLERANCE, usual)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["stale", "swapped"])
def test_each_single_tensor_that_is_not_the_learners_is_found(name: str, fault: str) -> None:
    before = student()
    after = trained(before, 1)
    usual = judged(before, version(before, 0), None)
    engine = copy.deepcopy(after)
    weight = engine.get_parameter(name)
    with torch.no_grad():
        if fault == "stale":
            weight.copy_(before.get_parameter(name))
        elif weight.ndim > 1:
            weight.copy_(weight.flip(0))
        else:
            weight.copy_(weight.roll(1))
    with pytest.raises(WeightsMismatch, match=r"version 1: .* nats, more than"):
        judged(engine, version(after, 1), usual)


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
