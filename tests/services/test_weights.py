from __future__ import annotations

import torch

from services.weights import Weights, manifest, on_the_wire


def test_mixed_dtypes_and_shapes_come_back_bit_for_bit() -> None:
    parameters = {
        "odd": torch.randn(3, dtype=torch.bfloat16),  # leaves the next one off its alignment
        "matrix": torch.randn(4, 5),
        "scalar": torch.tensor(2.5),
        "ints": torch.arange(7),
    }
    weights = Weights.flatten(3, parameters.items(), [1, 2], [-0.5])
    back = dict(weights.tensors())
    assert list(back) == list(parameters)
    for name, tensor in parameters.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_version_does_not_change_with_the_model_it_came_from() -> None:
    parameter = torch.ones(3)
    weights = Weights.flatten(0, [("p", parameter)], [1], [])
    parameter.zero_()
    assert dict(weights.tensors())["p"].tolist() == [1, 1, 1]


def test_read_only_buffers_as_ray_gives_them_are_fine() -> None:
    weights = Weights.flatten(0, [("p", torch.ones(3))], [1], [])
    weights.buffer.flags.writeable = False
    assert dict(weights.tensors())["p"].sum() == 3


def test_matrices_travel_in_the_precision_that_engines_compute_in() -> None:
    """An engine in bfloat16 comes out the same, bit for bit, from half the bytes."""
    masters = {"matrix": torch.randn(4, 6), "norm": torch.randn(5), "ids": torch.arange(4)[None]}
    sent = on_the_wire(manifest(masters.items()), "bfloat16")
    weights = Weights.gather(0, sent, masters.values(), [1], [])
    came = dict(weights.tensors())
    assert {name: one.dtype for name, one in came.items()} == {
        "matrix": torch.bfloat16, "norm": torch.float32, "ids": torch.int64,
    }  # fmt: skip
    assert torch.equal(came["matrix"], masters["matrix"].bfloat16())
    assert torch.equal(came["norm"], masters["norm"])
    assert on_the_wire(sent, "float32") == sent
