"""Packed log-probs against transformers' own padded-free forward, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
)

from services import attention, output_layer, packed
from services.attention import ATTENTION
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


@settings(max_examples=20, deadline=None)
@given(batches())
def test_packing_changes_no_logprob(batch: tuple[list[list[int]], list[int]]) -> None:
    sequences, starts = batch
    expected = [plain_logprobs(tiny_model(), s, i) for s, i in zip(sequences, starts, strict=True)]
    got = packed.score(packed.prepare(tiny_model()), sequences, starts)
    assert [len(g) for g in got] == [len(e) for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert g == pytest.approx(e, abs=1e-4)


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Samples of a few prompts, short and long ones, in any order; some of them empty."""
    token = st.integers(0, VOCAB - 1)
    lengths = st.integers(1, packed.MIN_PREFIX - 1) | st.integers(packed.MIN_PREFIX, 60)
    prompts = draw(st.lists(lengths.flatmap(lambda n: st.lists(token, min_size=n, max_size=n)),
                            min_size=1, max_size=3))  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=9))
    completions = [draw(st.lists(token, max_size=30)) for _ in chosen]
    completions[0] = completions[0] or [1]
    return [p + c for p, c in zip(chosen, completions, strict=True)], [len(p) for p in chosen]


@settings(max_examples=25, deadline=None)
@given(samples())
def test_sharing_what_stands_before_the_completions_changes_no_logprob(
    batch: tuple[list[list[int]], list[int]],
) -> None:
    sequences, starts = batch
    expected = [plain_logprobs(tiny_model(), s, i) for s, i in zip(sequences, starts, strict=True)]
    got = packed.score_top(packed.prepare(tiny_model()), sequences, starts, 0)
    assert [len(g.logprobs) for g in got] == [len(e) for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert g.logprobs.tolist() == pytest.approx(e, abs=1e-4)


def test_what_is_shared_is_computed_once() -> None:
    """A prompt of 50 tokens with three completions, and their last tokens not at all."""
    prompt = [2 + i % 20 for i in range(50)]
    sequences = [[*prompt, *range(2, 2 + n)] for n in (1, 5, 9)]
    sequences.insert(1, [3, 4, 5])
    pack = packed.pack(sequences, [50, 1, 50, 50], families=[[0, 2, 3], [1]])
    assert len(pack.token_ids) == 50 + 0 + 4 + 8 + 3
    assert pack.max_seqlen == 59
    assert pack.lengths == (1, 2, 5, 9)


@st.composite
def trained_families(
    draw: st.DrawFn,
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Answers to a few prompts, of one token each or many; the families in any order, of one
    answer or several, and some prompts in two families, as when a group has no room in a pack."""
    token = st.integers(0, VOCAB - 1)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=3))
    sequences: list[list[int]] = []
    starts: list[int] = []
    families: list[list[int]] = []
    for prompt in [*prompts, *prompts[: draw(st.integers(0, 1))]]:
        answers = draw(st.lists(st.lists(token, max_size=25), min_size=1, max_size=4))
        families.append(list(range(len(sequences), len(sequences) + len(answers))))
        sequences += [prompt + answer for answer in answers]
        starts += [len(prompt)] * len(answers)
    sequences[0] = [*sequences[0], 1]
    return sequences, starts, draw(st.permutations(families))


def as_documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`varlen_attn` as a GPU computes it, each query by itself: the last sees the last key."""
    assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
    bounds, of_keys = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert max(np.diff(bounds)) <= max_q and max(np.diff(of_keys)) <= max_k
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    rows = []
    for end, first, last, start in zip(
        bounds[1:], of_keys[:-1], of_keys[1:], bounds[:-1], strict=True
    ):
        for place in range(start, end):
            k, v = (x[first : last - (end - 1 - place)] for x in (key, value))
            scores = torch.einsum("hd,khd->hk", query[place], k) * (scale or query.shape[2] ** -0.5)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(1), v))
    return torch.stack(rows)


def on_a_gpu() -> AbstractContextManager[Any]:
    """Attention goes the way of a GPU's kernel, which is plain products here."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(attention, "_takes_varlen", lambda *_: True))
    stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", as_documented))
    return stack


@pytest.mark.parametrize("kernel", [nullcontext, on_a_gpu], ids=["CPU", "as on a GPU"])
@settings(max_examples=25, deadline=None)
@given(batch=trained_families(), tied=st.booleans(), recomputed=st.booleans())
def test_gradients_of_answers_that_share_a_prompt_are_those_of_its_sequences_one_by_one(
    kernel: Callable[[], AbstractContextManager[Any]],
    batch: tuple[list[list[int]], list[int], list[list[int]]],
    tied: bool,
    recomputed: bool,
) -> None:
    """Each answer pulls at the prompt's keys and values, and at its last hidden state."""
    sequences, starts, families = batch
    model = tiny_model(tied=tied)
    expected = plain_gradients(model, sequences, starts, 0.6)
    model.zero_grad()
    packed.prepare(model)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    pack = packed.pack(sequences, starts, families=families)
    with kernel():
        logprobs = packed.token_logprobs(model, pack, [1.0, 0.6])[1]
        (logprobs * pulls(sequences, starts)).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(trained_families())
def test_a_segment_after_the_other_sees_what_the_kernel_sees(
    batch: tuple[list[list[int]], list[int], list[list[int]]],
) -> None:
    """The way of a model that is tried on a GPU in float32."""
    sequences, starts, families = batch
    pack = packed.pack(sequences, starts, families=families)
    assume(pack.keys is not None)
    assert pack.keys is not None
    q, k, v = (torch.randn(1, heads, len(pack.token_ids), 8) for heads in (4, 2, 2))
    found = attention._one_by_one(q, k, v, pack.cu_seqlens, pack.keys, attention.Rule(None))
    merged: Any = attention._Cascaded.apply
    expected = merged(q, k, v, pack.buckets, pack.prefixes, None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_whether_a_kernel_sees_ends_is_measured() -> None:
    """One that lines up beginnings, as flash attention did before 2.1, is found out."""

    @wraps(as_documented)
    def beginnings(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: Any, **more: Any
    ) -> Any:
        kept = bounds[1].clone()
        kept[-1] = bounds[0][-1]
        return as_documented(q, k[: len(q)], v[: len(q)], bounds[0], kept, *bounds[2:], **more)

    cpu = torch.device("cpu")
    for kernel, aligned in ((as_documented, True), (beginnings, False)):
        attention._aligns_ends.cache_clear()
        with mock.patch("torch.nn.attention.varlen.varlen_attn", kernel):
            assert attention._aligns_ends(cpu) == aligned
    attention._aligns_ends.cache_clear()


def test_padding_of_a_bucket_sends_back_nothing_however_large_the_scores() -> None:
    """A padded row stands for a query with other keys, whose scores may be far above the
    normaliser that it is given."""
    torch.manual_seed(0)
    query, key, value = (
        (torch.randn(1, heads, 60, 8) * 60).requires_grad_() for heads in (4, 2, 2)
    )
    lengths = [20, 15, 14, 11]  # a prefix, and what follows it
    pack = packed.pack(
        [[0] * 20 + [0] * (n + 1) for n in lengths[1:]], [20] * 3, families=[[0, 1, 2]]
    )
    assert len(pack.token_ids) == 60
    call: Any = AttentionInterface()[ATTENTION]
    out, _ = call(
        None, query, key, value, None, cu_seq_lens_q=pack.cu_seqlens, max_length_q=36,
        buckets=pack.buckets, prefixes=pack.prefixes, keys=pack.keys,
    )  # fmt: skip
    slope = torch.randn(out.shape)
    got = torch.autograd.grad(out, (query, key, value), slope)
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    seen = (segment[:, None] == segment) & (torch.arange(60)[:, None] >= torch.arange(60))
    seen |= segment == 0
    seen &= torch.arange(60)[:, None] >= torch.arange(60)
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    plain = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
    expected = torch.autograd.grad(plain, (q, k, v), slope.double())
    torch.testing.assert_close(out.double(), plain, atol=1e-3, rtol=1e-3)
    for mine, theirs in zip(got, expected, strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        assert error < 1e-3


def test_one_row_a_temperature() -> None:
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


def plain_gradients(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], temperature: float
) -> list[torch.Tensor]:
    for ids, start in zip(sequences, starts, strict=True):
        table = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        for i in range(start, len(ids)):
            (table[i - 1, ids[i]] * (1 + i % 3)).backward(retain_graph=True)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def pulls(sequences: list[list[int]], starts: list[int]) -> torch.Tensor:
    """What `plain_gradients` weighs each token by."""
    return torch.tensor(
        [1.0 + i % 3 for ids, s in zip(sequences, starts, strict=True) for i in range(s, len(ids))]
    )


@pytest.mark.parametrize(("lengths", "buckets"), [((9, 3, 30, 4), 3), ((7, 7, 7, 7), 1)])
def test_gradients_of_a_pack_are_those_of_its_sequences_one_by_one(
    lengths: tuple[int, ...], buckets: int
) -> None:
    """Several buckets, out of order, and one bucket without padding: nothing may leak from one
    sequence into another."""
    sequences = [[2 + (i * j) % 20 for i in range(length)] for j, length in enumerate(lengths)]
    starts = [2, 1, 5, 1]
    model = tiny_model()
    expected = plain_gradients(model, sequences, starts, 0.6)
    model.zero_grad()
    pack = packed.pack(sequences, starts)
    assert len(pack.buckets.indices) == buckets
    logprobs = packed.token_logprobs(packed.prepare(model), pack, [1.0, 0.6])[1]
    (logprobs * pulls(sequences, starts)).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_other_architectures_work_unchanged() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    expected = plain_logprobs(llama, [3, 4, 5, 6], 1)
    (got, _) = packed.score(packed.prepare(llama), [[3, 4, 5, 6], [7, 8]], [1, 1])
    assert got == pytest.approx(expected, abs=1e-5)


def test_a_sliding_window_is_left_to_the_models_own_masks() -> None:
    from transformers import Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, intermediate_size=40,
        num_attention_heads=4, num_key_value_heads=4, use_sliding_window=True, sliding_window=4,
        max_window_layers=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    sequences = [[2 + i * i % 20 for i in range(19)], [2, 7, 3]]
    expected = [plain_logprobs(model, ids, 1) for ids in sequences]
    got = packed.score(packed.prepare(model), sequences, [1, 1])
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("start", [0, 4])
def test_a_start_outside_the_sequence_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"from token {start} of a sequence of 3"):
        packed.pack([[1, 2, 3]], [start])


def test_nothing_to_score_is_nothing() -> None:
    model = packed.prepare(tiny_model())
    assert packed.score(model, [[1, 2, 3], [4, 5]], [3, 1])[0] == []


@pytest.mark.parametrize("chunk", [64 << 20, 4 * 24 * 2], ids=["one chunk", "two tokens a chunk"])
def test_what_is_said_of_a_place_is_what_the_whole_matrix_says(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(output_layer.CHUNK_BYTES, "cpu", chunk)
    model = tiny_model()
    sequences, starts = [[3, 4, 5, 6, 7], [7, 8], [9, 2, 4]], [2, 1, 1]
    expected = [
        model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    candidates = torch.arange(6 * 3).view(6, 3)  # three, one and two places
    prepared = packed.prepare(model)
    found = packed.score_top(prepared, sequences, starts, 5, candidates, entropy=True)
    named = torch.split(candidates, [3, 1, 2])
    for ids, start, whole, said, asked in zip(
        sequences, starts, expected, found, named, strict=True
    ):
        values, places = whole.topk(5)
        torch.testing.assert_close(
            said.logprobs, whole.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        )
        torch.testing.assert_close(said.top_ids, places)
        torch.testing.assert_close(said.top_logprobs, values)
        torch.testing.assert_close(said.candidates, whole.gather(1, asked))
        torch.testing.assert_close(said.entropy, -(whole.exp() * whole).sum(1))
    (plain, *_) = packed.score_top(prepared, sequences, starts, 0)
    assert plain.candidates.shape == (3, 0) and bool(plain.entropy.isnan().all())


def test_a_model_that_is_sure_has_no_entropy() -> None:
    """Logits so far apart that all other probabilities are 0 in float32: they count nothing."""
    model = packed.prepare(tiny_model())
    output_layer.output_head(model).weight.data.mul_(1e6)
    (said,) = packed.score_top(model, [[3, 4, 5]], [1], 0, entropy=True)
    assert said.entropy.tolist() == [0, 0]
