"""Two ranks, sharded or not, against one rank in plain float32: the same gradients, the same step.

Each test of two ranks costs two interpreters, so all that is asked of them is asked at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from services import attention, packed
from services.trajectory import ScoredGroup
from tests.builders import scored_group, tiny_model
from tests.trainer import test_families as families
from trainer.batch import Batch
from trainer.checkpoint import Progress, Saver, latest
from trainer.config import LoraConfig, OptimizerConfig, TrainerConfig
from trainer.learner import Clock, Learner
from trainer.step_plan import StepPlan
from trainer.storage import Storage


def groups() -> list[ScoredGroup]:
    """Skewed lengths, groups that two ranks have to split, and answers that share their prompt,
    in one micro-batch and in several."""
    return [
        scored_group(["correct", "correct", "incorrect", "incorrect"], lengths=[4, 90, 3, 12]),
        scored_group(["correct", "correct", "correct"], order=1, lengths=[7, 2, 5]),
        scored_group(["incorrect", "unknown"], order=2, lengths=[6, 3]),
        scored_group(
            ["correct", "correct", "incorrect", "incorrect", "incorrect"],
            order=3,
            lengths=[6, 5, 5, 4, 3],
            prompt_length=9,
        ),
    ]


def config(**settings: Any) -> TrainerConfig:
    return TrainerConfig(
        optimizer=OptimizerConfig(lr=1e-2, max_grad_norm=0.5), micro_batch_tokens=20, **settings
    )


def model(*, tied: bool = True, seed: int = 0) -> Qwen3ForCausalLM:
    if tied:
        return tiny_model(seed)
    made = tiny_model(seed)
    untied = Qwen3ForCausalLM(Qwen3Config(**made.config.to_dict() | {"tie_word_embeddings": False}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in untied.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p
    return untied.eval()


WAYS: dict[str, dict[str, Any]] = {
    "replicas": {"parallel": "ddp"},
    "shards": {},
    "shards, recomputed": {"gradient_checkpointing": True},
    "shards in host memory": {"offload": True},
    "shards in bfloat16": {"autocast": "bfloat16"},
    "shards of adapters": {"lora": LoraConfig(rank=4, alpha=8)},
    "shards, not tied": {},
}


UNSHARDED = ("shards", "shards in bfloat16", "shards in host memory")


def made(way: str, *, alone: bool = False, seed: int = 0) -> Learner:
    """A learner that works in this way, or, `alone`, in the plain one that it must agree with,
    which shares no prompt."""
    settings = WAYS[way]
    if alone:
        settings = {k: v for k, v in settings.items() if k == "lora"}
    student = model(tied="not tied" not in way, seed=seed)
    torch.manual_seed(1)
    learner = Learner(student, config(**settings), temperature=0.6)
    learner._share = not alone
    with torch.no_grad():  # adapters begin at zero, where they have no gradient to speak of
        for name, p in learner.student.trained.items():
            if ".lora_B." in name:
                full = torch.linspace(-0.1, 0.1, p.numel()).reshape(p.shape)
                p.copy_(_like(full, p))
    return learner


def _like(full: Tensor, p: Tensor) -> Tensor:
    return distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_plan(learner: Learner, groups: list[ScoredGroup]) -> StepPlan:
    return learner.plans(Batch.of(groups))[learner._rank]


def outcome(learner: Learner) -> dict[str, Any]:
    """Gradients of one backward, then what two steps lead to. A rank holds no sequences but
    those that it works on."""
    plan = own_plan(learner, groups())
    learner.backward(plan, Clock())
    learner.student.sum_gradients()
    gradients = {n: whole(p.grad).clone() for n, p in learner.student.trained.items()}
    learner._optimizer.zero_grad()
    metrics = [learner.step(plan), learner.step(own_plan(learner, groups()[2:]))]  # idle
    weights = learner.weights()
    return {
        "gradients": gradients,
        "metrics": metrics,
        "weights": dict(weights.tensors()) if weights else {},
        "probe": weights.probe_logprobs if weights else (),
    }


def _rank(rank: int, ranks: int, directory: str) -> None:
    """What a process does; its results are files."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    if rank == 0:
        torch.save(messages(made("shards")), f"{directory}/messages.pt")
    else:
        messages(made("shards"))
    held = {way: unsharded_bytes(made(way)) for way in UNSHARDED}
    torch.save(held, f"{directory}/held {rank}.pt")
    torch.save({way: computed_in(made(way)) for way in WAYS}, f"{directory}/computed in {rank}.pt")
    for way in WAYS:
        learner = made(way)
        got = outcome(learner)
        if rank == 0:
            torch.save(got, f"{directory}/{way}.pt")
    for family, way in families.SHARDS:
        gradients = families.shards(rank, family, way)
        if rank == 0:
            torch.save(gradients, f"{directory}/{family}, {way}.pt")
    save(made("shards"), Path(directory) / "from two")
    resumed = load(made("shards", seed=5), Path(directory) / "from one")
    torch.save(resumed.step(own_plan(resumed, groups())), f"{directory}/resumed {rank}.pt")
    dist.destroy_process_group()


def messages(learner: Learner) -> dict[str, int]:
    """What one backward over several micro-batches sends, by kind."""
    plan = own_plan(learner, groups())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        learner.backward(plan, Clock())
    return {event.key: event.count for event in profiled.key_averages() if "c10d::" in event.key}


def unsharded_bytes(learner: Learner) -> int:
    """What this rank holds of gradients while micro-batches are still to come."""
    sums_at = learner.student.sums_at
    learner.student.sums_at = lambda last: sums_at(last=False)  # type: ignore[method-assign]
    learner.backward(own_plan(learner, groups()), Clock())
    shards: list[Any] = [m for m in learner.student.model.modules() if isinstance(m, FSDPModule)]
    parameters = [
        p
        for shard in shards
        for group in shard._get_fsdp_state()._fsdp_param_groups
        for p in group.fsdp_params
    ]
    # Those of the compute dtype are cast when they are put aside, others stay where they were.
    held = [p.unsharded_accumulated_grad for p in parameters]
    held += [p._unsharded_param.grad for p in parameters]
    return sum(grad.nbytes for grad in held if grad is not None)


def computed_in(learner: Learner) -> dict[str, set[torch.dtype]]:
    """The precision of what enters attention and the output layer. On a GPU the first decides
    whether the kernel of variable lengths is taken."""
    found: dict[str, set[torch.dtype]] = {"attention": set(), "output": set()}
    attend, score = attention._bucketed, packed.linear_logprobs

    def attended(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        found["attention"] |= {query.dtype, key.dtype, value.dtype}
        return attend(query, key, value, *rest)

    def scored(hidden: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Any:
        found["output"] |= {hidden.dtype, weight.dtype}
        return score(hidden, weight, *rest, **more)

    learner._share = False  # shared prompts have a way of their own, which no GPU takes
    with (
        mock.patch.multiple(attention, _bucketed=attended),
        mock.patch.multiple(packed, linear_logprobs=scored),
    ):
        learner.backward(own_plan(learner, groups()), Clock())
    return found


def save(learner: Learner, directory: Path) -> None:
    """Trains a step and writes a checkpoint."""
    learner.step(own_plan(learner, groups()))
    saver = Saver(Storage(directory), keep_last=1)
    saver.save(learner.state(), Progress(1, [], []))
    saver.finish()
    saver.close()


def load(learner: Learner, directory: Path) -> Learner:
    found = latest(Storage(directory))
    assert found is not None
    state = learner.state()
    found.load(state)
    learner.load_state(state)
    return learner


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that two ranks have left."""
    directory = tmp_path_factory.mktemp("ranks")
    save(made("shards"), directory / "from one")
    mp.spawn(_rank, args=(2, str(directory)), nprocs=2)
    return directory


def test_recomputed_activations_give_the_same_step_on_one_rank() -> None:
    recomputed: dict[str, Any] = {"gradient_checkpointing": True}
    got, expected = (
        outcome(Learner(model(), config(**settings), temperature=0.6))
        for settings in (recomputed, {})
    )
    for kind in ("gradients", "weights"):
        for name, tensor in expected[kind].items():
            _close(got[kind][name], tensor, False, f"{kind} {name}")


def test_answers_share_their_prompt_in_bfloat16_on_one_rank() -> None:
    """Autocast leaves queries and values in two precisions, which the kernel would refuse."""
    got = outcome(Learner(model(), config(autocast="bfloat16"), temperature=0.6))
    expected = outcome(made("replicas", alone=True))
    for name, tensor in expected["gradients"].items():
        _close(got["gradients"][name], tensor, True, name)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_make_the_same_step_as_one(two_ranks: Path, way: str) -> None:
    got = torch.load(two_ranks / f"{way}.pt")
    expected = outcome(made(way, alone=True))
    loose = "bfloat16" in way
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            _close(got[kind][name], tensor, loose, f"{kind} {name}")
    for step, metrics in enumerate(expected["metrics"]):
        for name, value in metrics.items():
            close = pytest.approx(value, rel=0.1 if loose else 1e-3, abs=1e-4, nan_ok=True)
            assert got["metrics"][step][name] == close, f"step {step} {name}"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "way"), families.SHARDS)
def test_two_ranks_have_the_gradients_of_the_plain_forward(
    two_ranks: Path, family: str, way: str
) -> None:
    families.assert_plain(torch.load(two_ranks / f"{family}, {way}.pt"), family, way)


@pytest.mark.slow
def test_gradients_travel_once_a_step_however_many_micro_batches(two_ranks: Path) -> None:
    sent = torch.load(two_ranks / "messages.pt")
    assert sent["c10d::_reduce_scatter_base_"] == 3  # two layers and the rest
    assert sent["c10d::_allgather_base_"] > 3 * 3  # more than one micro-batch


@pytest.mark.slow
def test_gradients_are_held_whole_and_in_float32_until_they_travel(two_ranks: Path) -> None:
    """As `deploy/memory.py` counts them, whatever precision is computed in."""
    whole = 4 * sum(p.numel() for p in model().parameters())
    for rank in range(2):
        assert torch.load(two_ranks / f"held {rank}.pt") == dict.fromkeys(UNSHARDED, whole)


@pytest.mark.slow
def test_shards_compute_in_the_precision_that_is_asked_for(two_ranks: Path) -> None:
    for rank in range(2):
        found = torch.load(two_ranks / f"computed in {rank}.pt")
        for way in WAYS:
            asked = {torch.bfloat16 if "bfloat16" in way else torch.float32}
            assert found[way] == {"attention": asked, "output": asked}, way


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_goes_on_in_two_and_back(two_ranks: Path) -> None:
    straight = made("shards", alone=True)
    (plan,) = straight.plans(Batch.of(groups()))
    straight.step(plan)
    expected = straight.step(plan)
    from_two = load(made("shards", alone=True, seed=5), two_ranks / "from two")
    assert from_two.step_number == 1
    for got in (
        from_two.step(plan),
        torch.load(two_ranks / "resumed 0.pt"),
        torch.load(two_ranks / "resumed 1.pt"),
    ):
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


def _close(got: Tensor, expected: Tensor, loose: bool, what: str) -> None:
    if loose:
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-6))
        assert error < 0.1, f"{what}: {error}"
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5, msg=what)
