"""Packed log-probs against transformers' own padded-free forward, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config

from services import packed
from tests.builders import VOCAB, tiny_model


@torch.no_grad()
def plain_logprobs(
    model: PreTrainedModel, ids: list[int], start: int, temperature: float = 1.0
) -> list[float]:
    logits = model(torch.tensor([ids])).logits[0] / temperature
    table = logits.log_softmax(-1)
    return [float(table[i - 1, ids[i]]) for i in range(start, len(ids))]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    token = st.integers(0, VOCAB - 1)
    sequences = draw(st.lists(st.lists(token, min_size=2, max_size=40), min_size=1, max_size=8))
    return sequences, [draw(st.integers(1, len(s))) for s in sequences]


@settings(max_examples=30, deadline=None)
@given(batches())
def test_packing_changes_no_logprob(batch: tuple[list[list[int]], list[int]]) -> None:
    sequences, starts = batch
    expected = [plain_logprobs(tiny_model(), s, i) for s, i in zip(sequences, starts, strict=True)]
    got = packed.score(packed.prepare(tiny_model()), sequences, starts)
    assert [len(g) for g in got] == [len(e) for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert g == pytest.approx(e, abs=1e-4)


def test_chunks_and_temperatures_and_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, starts = [[2, 3, 4, 5, 6], [7, 8, 9]], [1, 2]
    model = tiny_model()
    expected = torch.tensor(
        [
            [lp for s, i in zip(sequences, starts, strict=True)
             for lp in plain_logprobs(model, s, i, temperature)]
            for temperature in (1.0, 0.6)
        ]
    )  # fmt: skip
    pack = packed.pack(sequences, starts)
    packed.prepare(model)
    whole = packed.token_logprobs(model, pack, [1.0, 0.6])
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    whole.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(packed, "CHUNK", 2)
    chunked = packed.token_logprobs(model, pack, [1.0, 0.6])
    torch.testing.assert_close(chunked, whole)
    chunked.sum().backward()
    for got, before in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(got.grad, before, atol=1e-5, rtol=1e-4)


def test_other_architectures_work_unchanged() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    expected = plain_logprobs(llama, [3, 4, 5, 6], 1)
    (got, _) = packed.score(packed.prepare(llama), [[3, 4, 5, 6], [7, 8]], [1, 1])
    assert got == pytest.approx(expected, abs=1e-5)


def test_a_sliding_window_that_would_matter_is_refused() -> None:
    from transformers import Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, intermediate_size=40,
        num_attention_heads=4, num_key_value_heads=4, use_sliding_window=True, sliding_window=4,
        max_window_layers=0,
    )  # fmt: skip
    model = packed.prepare(Qwen2ForCausalLM(config).eval())
    with pytest.raises(ValueError, match="sliding window"):
        packed.score(model, [[1] * 9, [2] * 3], [1, 1])


@pytest.mark.parametrize("start", [0, 4])
def test_a_start_outside_the_sequence_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"from token {start} of a sequence of 3"):
        packed.pack([[1, 2, 3]], [start])


def test_nothing_to_score_is_nothing() -> None:
    model = packed.prepare(tiny_model())
    assert packed.score(model, [[1, 2, 3], [4, 5]], [3, 1])[0] == []


def test_the_most_likely_tokens_are_those_of_the_whole_matrix() -> None:
    model = tiny_model()
    sequences, starts = [[3, 4, 5, 6, 7], [7, 8], [9, 2, 4]], [2, 1, 1]
    expected = [
        model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    found = packed.score_top(packed.prepare(model), sequences, starts, 5)
    for ids, start, whole, (chosen, top_ids, top) in zip(
        sequences, starts, expected, found, strict=True
    ):
        values, places = whole.topk(5)
        torch.testing.assert_close(
            chosen, whole.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        )
        torch.testing.assert_close(top_ids, places)
        torch.testing.assert_close(top, values)
