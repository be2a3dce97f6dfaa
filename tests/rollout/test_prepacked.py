from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rollout.prepacked import PrepackedLinear, prepack
from tests.builders import tiny_model

AVX = "AVX" in torch.backends.cpu.get_cpu_capability()


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40)


@given(
    rows=st.integers(1, 200),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_computes_what_the_plain_layer_computes(
    rows: int, width: int, height: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    plain = nn.Linear(width, height, bias=bias)
    packed, given_rows = PrepackedLinear(plain), torch.randn(rows, 1, width)
    with torch.inference_mode():
        torch.testing.assert_close(packed(given_rows), plain(given_rows), rtol=1e-4, atol=1e-5)


def test_new_weights_are_used_at_once(layer: nn.Linear) -> None:
    packed, rows = PrepackedLinear(layer), torch.randn(3, 24)
    with torch.inference_mode():
        packed(rows)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 24))
        layer.bias.copy_(torch.randn(40))
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), layer(rows))


def test_with_gradients_it_is_the_plain_layer(layer: nn.Linear) -> None:
    rows = torch.randn(3, 24)
    PrepackedLinear(layer)(rows).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, rows.sum(0).expand(40, 24))


def test_a_model_keeps_its_parameters_and_their_names() -> None:
    model = tiny_model(0)
    before = dict(model.named_parameters())
    prepack(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    packed = [m for m in model.modules() if isinstance(m, PrepackedLinear)]
    # 7 in every layer, and the output; nothing where oneDNN has no kernels for the machine
    assert len(packed) == (7 * model.config.num_hidden_layers + 1 if AVX else 0)


def test_other_precisions_are_left_as_they_are() -> None:
    model = tiny_model(0).bfloat16()
    prepack(model)
    assert not any(isinstance(m, PrepackedLinear) for m in model.modules())
