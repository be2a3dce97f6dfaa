"""Families of all kinds, tiny and random, against the plain forward of each sequence by itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_5 import modeling_qwen3_5

from rollout import transformers_engine
from rollout.rows import Request
from services import layouts, packed
from services.trajectory import Sampling
from tests.builders import VOCAB, tiny_model
from tests.rollout.conftest import full_logprobs

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # the layout that is right, and the config
    "qwen3": ("packed", {}),
    "qwen3_moe": ("packed", {**EXPERTS, "moe_intermediate_size": 16}),
    "cohere": ("packed", {"logit_scale": 0.25}),
    "granite": ("packed", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "gemma2": ("rows", {**WINDOW, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
    "gemma3_text": ("packed", WINDOW),
    "mistral": ("packed", {"sliding_window": 6}),
    "gpt_oss": ("packed", {**WINDOW, **EXPERTS}),
    "qwen3_5_text": (
        "rows",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "bloom": ("rows", {"n_layer": 2, "n_head": 4}),
    "stablelm": ("rows", {}),
    "lfm2": ("rows", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}
SEQUENCES = [[2 + i * i % 20 for i in range(n)] for n in (19, 3, 11, 12)]
STARTS = [1, 2, 5, 1]


def made(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    settings = {**SIZES, **FAMILIES[family][1], **changes}
    if family == "bloom":  # its names differ
        settings = {k: v for k, v in settings.items() if k[:4] not in ("num_", "head", "inte")}
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_config(CONFIG_MAPPING[family](**settings))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_plain_forward(family: str) -> None:
    model = made(family)
    expected = [
        full_logprobs(model, ids, 1.0)[start - 1 :]
        for ids, start in zip(SEQUENCES, STARTS, strict=True)
    ]
    got = packed.score(packed.prepare(model), SEQUENCES, STARTS)
    assert layouts.proven(model).layout == FAMILIES[family][0]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_rounding_makes_of_a_model_is_no_difference(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of deep models with large weights, which move further than any fixed tolerance. What mixes
    sequences is still found out."""
    monkeypatch.setattr(layouts, "tolerance", lambda model: 1e-7)
    model = made(family).to(dtype)
    before = [p.clone() for p in model.parameters()]
    packed.prepare(model)
    assert layouts.proven(model).layout == FAMILIES[family][0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_does_it_change_the_way_to_sample(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = transformers_engine.way(transformers_engine.prepare(made(family)))
    monkeypatch.setattr(transformers_engine, "tolerance", lambda model: 1e-7)
    assert transformers_engine.way(transformers_engine.prepare(made(family))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_logprobs_of_the_plain_forward(family: str) -> None:
    plain = made(family)
    model = transformers_engine.prepare(made(family))
    prompts = [[2], [5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 10]]
    requests = [
        Request(ids, Sampling(n=2, max_tokens=4 + 3 * i, seed=i)) for i, ids in enumerate(prompts)
    ]
    groups = transformers_engine.sample_groups(model, requests, [1])
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 2
        for drawn in group:
            ids = [*request.prompt_ids, *drawn.token_ids.tolist()]
            expected = full_logprobs(plain, ids, 1.0)[len(request.prompt_ids) - 1 :]
            np.testing.assert_allclose(drawn.logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_5_text"])
def test_one_model_scores_and_samples_by_turns(family: str) -> None:
    plain, model = made(family), made(family)
    expected = full_logprobs(plain, SEQUENCES[0], 1.0)
    request = Request([5, 6, 7], Sampling(n=2, max_tokens=9, seed=0))
    transformers_engine.prepare(packed.prepare(model))
    for _ in range(2):
        (got,) = packed.score(model, SEQUENCES[:1], STARTS[:1])
        np.testing.assert_allclose(got, expected, atol=2e-4)
        for drawn in transformers_engine.sample_groups(model, [request], [-1])[0]:
            whole = [5, 6, 7, *drawn.token_ids.tolist()]
            np.testing.assert_allclose(
                drawn.logprobs, full_logprobs(plain, whole, 1.0)[2:], atol=2e-4
            )


def heed(family: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a family's convolution and scan what their kernels for a GPU have: bounds."""
    convolve, scan = family.causal_conv1d_fn, family.torch_chunk_gated_delta_rule

    def convolution(hidden: torch.Tensor, *rest: Any, seq_idx: Any, **named: Any) -> torch.Tensor:
        lengths = torch.bincount(seq_idx[0]).tolist()
        named = {"activation": named["activation"]}
        return torch.cat([convolve(h, *rest, **named) for h in hidden.split(lengths, 2)], 2)

    def rule(*qkv: torch.Tensor, g: Any, beta: Any, cu_seqlens: Any, **named: Any) -> Any:
        named = {n: named[n] for n in ("output_final_state", "use_qk_l2norm_in_kernel")}
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, 1) for x in (*qkv, g, beta)), strict=True)
        return torch.cat([scan(*p[:3], g=p[3], beta=p[4], **named)[0] for p in parts], 1), None

    def bounded(by_kernel: Any, own: Any, name: str) -> Any:
        return lambda *x, **named: (by_kernel if named.get(name) is not None else own)(*x, **named)

    monkeypatch.setattr(family, "causal_conv1d_fn", bounded(convolution, convolve, "seq_idx"))
    monkeypatch.setattr(family, "torch_chunk_gated_delta_rule", bounded(rule, scan, "cu_seqlens"))


@pytest.mark.parametrize("heeded", [True, False])
def test_a_hybrid_is_packed_where_its_layers_heed_the_bounds(
    heeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their kernels do on a GPU; the trial finds out."""
    monkeypatch.setattr(layouts, "_may_be_packed", lambda model: True)
    model = made("qwen3_5_text")
    expected = [full_logprobs(model, ids, 1.0) for ids in SEQUENCES]
    if heeded:
        heed(modeling_qwen3_5, monkeypatch)
    got = packed.score(packed.prepare(model), SEQUENCES, [1] * len(SEQUENCES))
    assert layouts.proven(model).layout == ("packed" if heeded else "rows")
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_weights_that_are_no_numbers_are_named_by_the_sampler() -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="qwen3: the model's log-probs are no numbers"):
        transformers_engine.prepare(model)


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2", "lfm2"])
def test_gradients_are_those_of_the_plain_forward(family: str) -> None:
    model, plain = packed.prepare(made(family)), made(family)
    batch = packed.pack(SEQUENCES, STARTS)
    packed.token_logprobs(model, batch, [1.0]).sum().backward()
    for ids, start in zip(SEQUENCES, STARTS, strict=True):
        row = torch.tensor([ids])
        table = plain(input_ids=row, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        table.gather(1, row[0, start:, None]).sum().backward()
    mine, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("family", "scale", "cap"), [("cohere", 0.25, None), ("granite", 0.25, None),
                                 ("gemma2", 1.0, 2.0), ("qwen3", 1.0, None)]
)  # fmt: skip
def test_the_logit_map_is_read_off_the_model(family: str, scale: float, cap: float | None) -> None:
    found = layouts.proven(packed.prepare(made(family))).logits
    assert found.scale == pytest.approx(scale, rel=1e-4)
    assert found.cap == (None if cap is None else pytest.approx(cap, rel=1e-4))


def test_the_slope_of_the_logit_map_is_its_derivative() -> None:
    mapping = layouts.LogitMap(scale=0.7, cap=3.0)
    logits = torch.linspace(-9.0, 9.0, 13, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mapping(logits).sum(), [logits])
    torch.testing.assert_close(mapping.slope(logits.detach()), expected)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "rope_theta": 1e4}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def rotating(family: str, rope: dict[str, Any], context: int = 128) -> PreTrainedModel:
    torch.manual_seed(7)
    settings = {**SIZES, "rope_parameters": dict(rope), "max_position_embeddings": context}
    if family == "phi3":
        settings["original_max_position_embeddings"] = 24
    factory: Any = AutoModelForCausalLM
    made: PreTrainedModel = factory.from_config(CONFIG_MAPPING[family](**settings))
    return made.eval()


@pytest.mark.parametrize(
    ("family", "rope", "context"), [("phi3", LONGROPE, 128), ("qwen3", DYNAMIC, 24)]
)
def test_lengths_that_would_turn_a_rotary_embedding_are_refused(
    family: str, rope: dict[str, Any], context: int
) -> None:
    plain, model = rotating(family, rope, context), rotating(family, rope, context)
    ids = [2 + i * i % 20 for i in range(25)]
    (got,) = packed.score(packed.prepare(model), [ids[:24]], [1])
    np.testing.assert_allclose(got, full_logprobs(plain, ids[:24], 1.0), atol=2e-4)
    # What is to be kept from happening: the first tokens of a longer sequence are another's.
    assert np.abs(np.array(full_logprobs(plain, 2 * ids, 1.0))[:23] - got).max() > 1e-3
    said = f"{family}: 25 tokens are more than 24, where its rotary embedding changes"
    with pytest.raises(ValueError, match=said):
        packed.score(model, [ids[:5], ids], [1, 1])
    sampler = transformers_engine.prepare(rotating(family, rope, context))
    sampling = Sampling(n=2, max_tokens=20, seed=0)
    with pytest.raises(ValueError, match=said):
        transformers_engine.sample_groups(sampler, [Request(ids[:5], sampling)], [-1])
    fresh = rotating(family, rope, context)
    for drawn in transformers_engine.sample_groups(sampler, [Request(ids[:4], sampling)], [-1])[0]:
        expected = full_logprobs(fresh, [*ids[:4], *drawn.token_ids.tolist()], 1.0)[3:]
        np.testing.assert_allclose(drawn.logprobs, expected, atol=2e-4)


def test_a_longrope_with_one_factor_takes_all_lengths() -> None:
    rope = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    sequences = [[2 + i * i % 20 for i in range(n)] for n in (40, 7)]
    got = packed.score(packed.prepare(rotating("phi3", rope)), sequences, [1, 1])
    for ids, mine in zip(sequences, got, strict=True):
        np.testing.assert_allclose(mine, full_logprobs(rotating("phi3", rope), ids, 1.0), atol=2e-4)


class _Peeks(torch.nn.Module):
    """An output matrix that is given what it was not given in any one sequence alone."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden, *rest, **named)
        return out + out.mean(dim=(0, 1), keepdim=True)


def test_a_model_that_is_right_in_no_layout_is_refused_and_left_as_it_was() -> None:
    model: Any = tiny_model().train()
    before = model.config._attn_implementation
    model.model.layers[1].mlp = _Peeks(model.model.layers[1].mlp)  # no causal model
    with pytest.raises(ValueError, match="qwen3 models are not supported: no layout gives"):
        packed.prepare(model)
    assert model.training and model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="qwen3 models are not supported: none samples"):
        transformers_engine.prepare(model.eval())
    assert model.config._attn_implementation == before


def test_logits_changed_by_more_than_a_scale_and_a_cap_are_refused() -> None:
    model: Any = tiny_model()
    plain = model.forward

    def squared(*arguments: Any, **named: Any) -> Any:
        output = plain(*arguments, **named)
        output.logits = output.logits * output.logits.abs()
        return output

    model.forward = squared
    with pytest.raises(ValueError, match="qwen3 models are not supported: it changes its logits"):
        packed.prepare(model)
