"""What the trainer adds to a model, on families that are built differently: gradients are those of
the plain forward of each sequence by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.families import tiny, tiny_config
from services import packed
from services.shrink import small_model
from trainer import lora
from trainer.config import LoraConfig, TrainerConfig
from trainer.divergence import divergence
from trainer.student import Student, routers

FAMILIES = (
    "qwen3", "qwen3_5_text", "gemma3_text", "lfm2", "mistral", "qwen3_moe", "gpt_oss",
)  # fmt: skip
EXPERTS = ("qwen3_moe", "gpt_oss")
SEQUENCES = [[2 + i * i % 50 for i in range(n)] for n in (19, 11, 12)]
STARTS = [1, 5, 2]
TOP = 4  # tokens that the teacher names
ADAPTERS = LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj", "o_proj"))
CPU = torch.device("cpu")
# What the trainer is told, and whether it trains on a divergence over the teacher's tokens.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "whole": ({}, False),
    "recomputed": ({"gradient_checkpointing": True}, False),
    "adapters": ({"lora": ADAPTERS}, False),
    "top-k": ({}, True),
    "shards": ({}, False),
    "shards, recomputed": ({"gradient_checkpointing": True}, False),
    "shards, top-k": ({}, True),
    "shards in bfloat16": ({"autocast": "bfloat16"}, False),
}
# Which of two ranks' ways are tried with which family; in 16 bits, those whose routers are not.
SHARDS = [
    (family, way)
    for family in FAMILIES
    for way in WAYS
    if "shards" in way and ("bfloat16" not in way or family in EXPERTS)
]


def student(family: str, way: str) -> Student:
    """With adapters that change something, or half of them would have no gradient."""
    model = tiny(family)
    torch.manual_seed(1)
    made = Student(model, TrainerConfig(**WAYS[way][0]), CPU)
    _stir(dict(made.trained), made.sharded)
    return made


def _stir(parameters: dict[str, Tensor], sharded: bool = False) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name and not sharded:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))


def teachers(count: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs [C, k] of a teacher's most likely tokens, from the count of all before."""
    ids = torch.arange(count * TOP).view(count, TOP) * 7 % 64
    return ids, torch.full((count, TOP), 0.9 / TOP).log() + torch.arange(TOP) * 0.01


def gradients(made: Student, way: str, members: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Of the loss over these sequences, by name; whole."""
    batch = packed.pack([SEQUENCES[i] for i in members], [STARTS[i] for i in members])
    if WAYS[way][1]:
        parts = [teachers(len(SEQUENCES[i]) - STARTS[i]) for i in members]
        ids, logprobs = (torch.cat(both) for both in zip(*parts, strict=True))
        every = made.forward(packed.token_logprobs, batch, [1.0], ids)[0]
        divergence(every[:, 1:], logprobs, "reverse_kl").sum().backward()
    else:
        made.forward(packed.token_logprobs, batch, [1.0]).sum().backward()
    return {n: _whole(p.grad) for n, p in made.trained.items() if p.grad is not None}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@cache
def plain_gradients(family: str, adapters: bool, top: bool) -> dict[str, Tensor]:
    """As `gradients`, with the model's own forward, one sequence after the other."""
    model = tiny(family)
    if adapters:
        torch.manual_seed(1)
        lora.attach(model, ADAPTERS)
        _stir(dict(model.named_parameters()))
    for ids, start in zip(SEQUENCES, STARTS, strict=True):
        table = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        table = table.log_softmax(-1)
        if top:
            named, logprobs = teachers(len(ids) - start)
            divergence(table.gather(1, named), logprobs, "reverse_kl").sum().backward()
        else:
            table.gather(1, torch.tensor(ids)[start:, None]).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_plain(got: dict[str, Tensor], family: str, way: str) -> None:
    """These gradients are those of the plain forward."""
    settings, top = WAYS[way]
    expected = plain_gradients(family, "lora" in settings, top)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((got[name] - gradient).norm() / (gradient.norm() + 1e-2))
        assert error < (0.1 if "bfloat16" in way else 2e-3), f"{name}: {error}"


@pytest.mark.parametrize("way", [way for way in WAYS if "shards" not in way])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_forward(family: str, way: str) -> None:
    assert_plain(gradients(student(family, way), way), family, way)


def shards(rank: int, family: str, way: str) -> dict[str, Tensor]:
    """`gradients` of one of two ranks, which have unequal numbers of buckets."""
    return gradients(student(family, way), way, (0, 1) if rank == 0 else (2,))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_are_the_model_that_was_trained(family: str) -> None:
    targets = ("q_proj", "v_proj") if family == "qwen3_moe" else "all-linear"
    settings = LoraConfig(rank=2, alpha=4, targets=targets)
    made = Student(tiny(family), TrainerConfig(lora=settings), CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.trained.values():
            parameter.normal_(0.0, 0.1)
    scores = packed.score(made.model, SEQUENCES, STARTS)
    published = tiny(family)
    unchanged = packed.score(packed.prepare(tiny(family)), SEQUENCES, STARTS)
    published.load_state_dict(dict(made.tensors()), strict=False)
    merged = packed.score(packed.prepare(published), SEQUENCES, STARTS)
    for mine, theirs, before in zip(scores, merged, unchanged, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=5e-4)
        assert (torch.tensor(mine) - torch.tensor(before)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # peft's own
def test_adapters_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="adapters of experts cannot be merged"):
        Student(tiny("qwen3_moe"), TrainerConfig(lora=LoraConfig()), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_likely_tokens_are_those_of_the_plain_forward(family: str) -> None:
    model, whole = packed.prepare(tiny(family)), tiny(family)
    results = packed.score_top(model, SEQUENCES, STARTS, 5)
    for ids, start, said in zip(SEQUENCES, STARTS, results, strict=True):
        with torch.no_grad():
            table = whole(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        best = table.log_softmax(-1).topk(5)
        torch.testing.assert_close(said.top_logprobs, best.values, rtol=0, atol=5e-4)
        assert (said.top_ids == best.indices).float().mean() > 0.95  # near ties may change places


# ------------------------------------------------------------------------ mixtures of experts


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("precision", ["autocast", "dtype"])
def test_a_router_computes_in_float32_where_the_rest_does_not(family: str, precision: str) -> None:
    model = tiny(family)
    if precision == "dtype":
        model = model.bfloat16()
    pairs: list[tuple[Any, Any]] = []

    def compare(router: torch.nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            whole: Any = copy.deepcopy(router).float()
            expected = type(router).forward(whole, given[0].float())
        pairs.extend((got, one.to(got.dtype)) for got, one in zip(output, expected, strict=True))

    made = Student(model, TrainerConfig.model_validate({precision: "bfloat16"}), CPU)
    for router in routers(model):
        router.register_forward_hook(compare)
    got = gradients(made, "whole")
    assert all(torch.isfinite(gradient).all() for gradient in got.values())
    assert len(pairs) == 2 * 3  # two layers: logits, scores and the experts that are chosen
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", EXPERTS)
def test_no_loss_balances_the_load_whatever_the_config_says(family: str) -> None:
    config = tiny_config(family)
    config.output_router_logits, config.router_aux_loss_coef = True, 100.0
    model: Any = small_model(config)
    ids = torch.tensor([SEQUENCES[0]])
    assert model(input_ids=ids, labels=ids, use_cache=False).aux_loss > 0.1  # transformers' own has
    assert_plain(gradients(Student(model, TrainerConfig(), CPU), "whole"), family, "whole")
