"""A step of the learner at DeepSeek-R1-Distill-Qwen-1.5B's shapes, 12,288 + 3,840 answer tokens,
counted on a GPU that is not there: kernels, precisions, waits of the host, bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy import memory
from tests.gpu_emulation.step import PROMPT, qwen_1_5b
from trainer.config import LoraConfig, OptimizerConfig, TrainerConfig

pytestmark = pytest.mark.slow
Step = Callable[..., dict[str, Any]]

AUTOCAST = ("--autocast", "bfloat16")
PURE = ("--autocast", "none", "--dtype", "bfloat16")
ADAPTERS = (*AUTOCAST, "--lora")
REPLICAS = (*AUTOCAST, "--ranks", "8")  # one of them
OFFLOADED = ("--offload",)
WINDOWS = (*AUTOCAST, "--window", "4096")
SETTINGS = {
    "masters": AUTOCAST, "bfloat16": PURE, "adapters": ADAPTERS, "replicas": REPLICAS,
    "windows": WINDOWS,
}  # fmt: skip
# Without the variable-length kernel: a bucket of sequences at a time, in the pack or in rows. Which
# of torch's attentions a GPU would take for these, a build without CUDA does not tell.
EXACT, ROWS = ("--autocast", "none"), ("--layout", "rows")
BUCKETED = {
    "float32": EXACT,
    "float32, windows": (*EXACT, "--window", "4096"),
    "rows": (*AUTOCAST, *ROWS),
    "rows, float32": (*EXACT, *ROWS),
    "rows, windows": (*WINDOWS, *ROWS),
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS.keys())
def counted(request: pytest.FixtureRequest, step: Step) -> dict[str, Any]:
    return step("--layers", "2", *request.param)


def test_attention_is_the_variable_length_kernel_in_bfloat16(counted: dict[str, Any]) -> None:
    kernels = {name for name in counted["calls"] if "attn" in name or "attention" in name}
    assert kernels == {"_varlen_attn bfloat16", "_varlen_attn_backward bfloat16"}


def test_matrices_are_multiplied_in_bfloat16(counted: dict[str, Any]) -> None:
    products = {name for name in counted["calls"] if name.split()[0] in ("mm", "addmm", "bmm")}
    assert products <= {"mm bfloat16", "addmm bfloat16", "bmm bfloat16", "bmm float32"}
    assert counted["calls"].get("bmm float32", 0) <= 3  # the angles of the rotary embedding


def test_logits_are_read_once_for_each_temperature(counted: dict[str, Any]) -> None:
    """By the kernels: no table of the vocabulary in float32, and one backward, at the temperature
    of ρ alone."""
    calls = counted["calls"]
    assert not {name for name in calls if "softmax" in name}
    assert calls["add_slope bfloat16"] * 2 == calls["summarise bfloat16"]


def test_the_host_waits_for_the_device_five_times_at_most(counted: dict[str, Any]) -> None:
    assert sum(counted["syncs"].values()) <= 5, counted["syncs"]


@pytest.mark.parametrize("settings", BUCKETED.values(), ids=BUCKETED.keys())
def test_buckets_make_the_host_wait_no_more_than_that(
    step: Step, settings: tuple[str, ...]
) -> None:
    """Two buckets, in the precision that was asked for."""
    counted = step("--layers", "2", *settings)
    assert sum(counted["syncs"].values()) <= 5, counted["syncs"]
    wanted, other = ("bfloat16", "float32") if "bfloat16" in settings else ("float32", "bfloat16")
    assert counted["calls"][f"addmm {wanted}"] > 0  # queries, keys and values
    assert not {f"{name} {other}" for name in ("mm", "addmm", "_varlen_attn")} & {*counted["calls"]}


def test_answers_that_share_a_prompt_compute_it_once_by_the_kernel(step: Step) -> None:
    """Eight of 100 tokens after 128, of which nothing is predicted from the last: the linear layers
    have 920 tokens for 1,824."""
    short = ("--layers", "2", "--lengths", ",".join(["100"] * 8), *AUTOCAST)
    apart, together = step(*short), step(*short, "--share")
    assert sum(together["syncs"].values()) <= 5, together["syncs"]
    assert (
        together["calls"]["_varlen_attn bfloat16"] == apart["calls"]["_varlen_attn bfloat16"] == 2
    )
    tokens = (PROMPT + 8 * 99) / (8 * (PROMPT + 100))
    assert together["moved_bytes"]["silu_product"] == pytest.approx(
        tokens * apart["moved_bytes"]["silu_product"], rel=0.02
    )
    assert together["backward_peak_bytes"] < apart["backward_peak_bytes"]


def test_the_optimizer_needs_no_copy_of_the_gradients(counted: dict[str, Any]) -> None:
    """Weights, two moments and gradients: nothing of their size beside them. Replicas hold their
    gradients twice while they are summed: in one message."""
    assert counted["optimizer_peak_bytes"] < 4.1 / 3 * counted["held_bytes"]
    assert counted["summing_peak_bytes"] < 5.1 / 3 * counted["held_bytes"]


def test_what_stands_between_the_matrices_is_fused(counted: dict[str, Any]) -> None:
    """No norm, rotation or activation written plainly; attention is not computed again."""
    calls = {name.split()[0]: number for name, number in counted["calls"].items()}
    assert not calls.keys() & {"rsqrt", "silu", "sigmoid", "pow"}
    assert calls.keys() >= {"rms_norm_back", "silu_product_back", "rotate"}
    assert calls["_varlen_attn"] == calls["_varlen_attn_backward"] == 2


def test_weights_leave_the_device_in_halves_and_in_one_wait(counted: dict[str, Any]) -> None:
    """Matrices in bfloat16, copied one after another into page-locked memory; beside their end the
    host waits for the log-probs of the probe alone."""
    assert counted["published_bytes"] == pytest.approx(2 * counted["parameters"], rel=1e-3)
    assert sum(counted["publishing_syncs"].values()) == 1, counted["publishing_syncs"]


def test_the_whole_model_needs_what_scope_check_says(step: Step, tmp_path: Path) -> None:
    counted = step(*AUTOCAST)
    assert counted["parameters"] == 1_777_088_000
    assert counted["later_peak_bytes"] == pytest.approx(said(tmp_path, 28, AUTOCAST), rel=0.1)
    assert sum(counted["seconds"].values()) < 0.6  # at assumed rates, see fake_cuda.py
    assert counted["backward_peak_bytes"] < 30e9  # a step's first: gradients are made in it
    assert counted["later_peak_bytes"] < 35e9


def test_with_moments_on_the_host_it_fits_30_gb(step: Step, tmp_path: Path) -> None:
    counted = step(*AUTOCAST, *OFFLOADED)
    assert counted["later_peak_bytes"] == pytest.approx(said(tmp_path, 28, OFFLOADED), rel=0.1)
    for peak in ("later_peak_bytes", "optimizer_peak_bytes"):
        assert counted[peak] < 24e9
    assert sum(counted["syncs"].values()) <= 5


@pytest.mark.parametrize(
    "settings",
    [PURE, (*AUTOCAST, "--no-checkpointing"), ADAPTERS, REPLICAS],
    ids=["bfloat16", "masters, all kept", "adapters", "replicas"],
)
def test_a_step_needs_the_memory_that_scope_check_says(
    step: Step, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    lengths = (3_000, 1_000)
    counted = step("--layers", "4", "--lengths", ",".join(map(str, lengths)), *settings)
    wanted = said(tmp_path, 4, settings, lengths)
    peaks = (counted["later_peak_bytes"], counted["summing_peak_bytes"])
    assert max(peaks) == pytest.approx(wanted, rel=0.1)


def said(
    directory: Path,
    layers: int,
    settings: tuple[str, ...],
    lengths: tuple[int, ...] = (12_288, 3_840),
) -> float:
    qwen_1_5b(layers).save_pretrained(directory)
    pure = settings[:4] == PURE
    trainer = TrainerConfig(
        dtype="bfloat16" if pure else "float32",
        autocast="none" if pure else "bfloat16",
        gradient_checkpointing="--no-checkpointing" not in settings,
        micro_batch_tokens=sum(lengths) + PROMPT * len(lengths),
        lora=LoraConfig() if settings == ADAPTERS else None,
        ranks=8 if settings == REPLICAS else 1,
        parallel="ddp",
        optimizer=OptimizerConfig(offload=settings == OFFLOADED),
    )
    parts = memory.learner(memory.Shape.of(str(directory)), trainer, max(lengths) + PROMPT)
    return sum(parts.values()) - parts["CUDA"]
