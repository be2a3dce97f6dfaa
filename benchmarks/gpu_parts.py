"""What `benchmarks.gpu` measures: each part by itself, in a process of its own.

The model is random, at DeepSeek-R1-Distill-Qwen-1.5B's shapes. Utilisation is model FLOPs over
time, against the bf16 matrix rate that the same chip reaches on large matrices: forward, backward
and AdamW, by the learner's own step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # each part imports what it needs: what is missing is missing for that one alone
    from transformers import PreTrainedModel

    from examples.one_process import Stages, Trained
    from rollout.prompts import Row as PromptRow
    from services.trajectory import ScoredGroup
    from trainer.learner import Learner

TEMPERATURE = 0.6  # rollouts'; the teacher is compared with at 1
SAMPLES = 8  # answers to a prompt
ASSUMED_BUS = 25.0  # GB/s, docs/vllm.md
GOAL = 0.55
REGIMES = {  # the precision of the master weights, and that which is computed in
    "float32 masters, bfloat16 autocast": ("float32", "bfloat16"),
    "pure bfloat16": ("bfloat16", "none"),
}
MATRIX_RATE = "gpu: bf16 matrix rate"
Known = Mapping[str, float | None]
"""Figures of the rows that are there already, by name."""


class Found(NamedTuple):
    """One figure, as in `benchmarks.rows.Row`."""

    ours: float | None
    peer: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is measured, and on what."""

    device: str = "cuda"
    vocab: int = 151_936
    hidden: int = 1536
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    intermediate: int = 8960
    prompt: int = 128
    completion: int = 12_288
    small_pack: int = 16_384  # tokens in one forward
    large_pack: int = 32_768
    scored: int = 16_384  # tokens, for the output layer by itself and for the teacher
    matrix: int = 8192  # rows and columns, for the matrix rate
    answers: int = 64  # sampled at once
    sampled: int = 256  # tokens of each of these
    small_model: str = "examples/smollm/build/model"  # the demo's models where it is not there
    loop_steps: int = 8
    loop_prompts: int = 8  # of a step


TINY = Shapes(
    device="cpu", vocab=300, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, prompt=8,
    completion=40, small_pack=100, large_pack=150, scored=100, matrix=64, answers=16, sampled=4,
    small_model="", loop_steps=2, loop_prompts=2,
)  # fmt: skip


def kernel_tests(_: Shapes, __: Known) -> list[Found]:
    """How many tests for a GPU pass here. Without conftest.py and the project's settings: those ask
    for packages that may be missing.

    Raises:
        RuntimeError: some failed; it names them.
    """
    import pytest

    class Tally:
        passed, failed = 0, list[str]()

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.failed.append(report.nodeid.rpartition("::")[2])
            self.passed += report.when == "call" and report.passed

    tally = Tally()
    files = ["tests/services/test_packed_gpu.py", "tests/trainer/test_optimizer.py"]
    options = ["-q", "-c", "/dev/null", "--rootdir=.", "--noconftest", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[tally])
    if tally.failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"failed: {', '.join(tally.failed) or code}")
    return [Found(tally.passed)]


def matrix_rate(shapes: Shapes, _: Known) -> list[Found]:
    """TFLOP/s of a large bf16 matrix product on this chip."""
    size = shapes.matrix
    make: dict[str, Any] = {"device": shapes.device, "dtype": torch.bfloat16}
    a, b = (torch.randn(size, size, **make) for _ in range(2))
    return [Found(2e-12 * size**3 / seconds(lambda: a @ b, shapes, repeats=20))]


# ------------------------------------------------------------------------------------ the learner


def utilisation(shapes: Shapes, known: Known, regime: str, budget: int) -> list[Found]:
    """Share of the matrix rate, milliseconds and GiB of a step on one micro-batch."""
    from trainer.batch import Batch

    lengths = answers_that_fill(shapes, budget)
    learner = make_learner(shapes, regime, budget)
    plans = learner.plans(Batch.of([scored_group(shapes, lengths)]))
    learner.step(*plans)  # which makes AdamW's moments, and compiles kernels
    forget_peak(shapes)
    taken = seconds(lambda: learner.step(*plans), shapes, repeats=3)
    whole = [shapes.prompt + length for length in lengths]
    reached = model_flops(shapes, whole, scored=sum(lengths)) / taken
    rate = known.get(MATRIX_RATE)
    share = Found(reached / rate / 1e12, GOAL) if rate else Found(None, GOAL, "no matrix rate")
    return [share, Found(taken * 1e3), Found(peak_gib(shapes))]


def answers_that_fill(shapes: Shapes, budget: int) -> list[int]:
    """Tokens of answers that make, with their prompts, a pack of `budget` tokens: whole ones, and a
    last one that is cut."""
    longest = shapes.prompt + shapes.completion
    lengths = [shapes.completion] * (budget // longest)
    rest = budget - longest * len(lengths) - shapes.prompt
    return [*lengths, rest] if rest > 1 else lengths


def scored_group(shapes: Shapes, lengths: Sequence[int]) -> ScoredGroup:
    """A group of answers of these lengths, every second one of them correct."""
    from services.trajectory import (
        Prompt,
        RolloutGroup,
        Sampling,
        ScoredGroup,
        Trajectory,
        Verdict,
        VerifiedGroup,
    )

    random = np.random.default_rng(0)
    prompt_ids, *answers = (
        random.integers(2, shapes.vocab, size).astype(np.int32)
        for size in (shapes.prompt, *lengths)
    )
    likely = -np.log(shapes.vocab)  # what a random model says of any token
    trajectories = tuple(
        Trajectory(ids, np.full(len(ids), likely, np.float32), "stop", "") for ids in answers
    )
    prompt = Prompt("0", 0, prompt_ids, "", "", Sampling(len(lengths), max(lengths)))
    verdicts = tuple(Verdict("correct" if i % 2 else "incorrect", "") for i in range(len(lengths)))
    verified = VerifiedGroup(RolloutGroup(prompt, trajectories, weight_version=0), verdicts)
    scores = {i: np.full(size, likely - 0.2, np.float32) for i, size in enumerate(lengths)}
    return ScoredGroup(verified, scores, "teacher")


def make_learner(shapes: Shapes, regime: str, budget: int) -> Learner:
    """As a run would have it on one GPU."""
    from trainer.config import TrainerConfig
    from trainer.learner import Learner

    dtype, autocast = REGIMES[regime]
    config = TrainerConfig.model_validate(
        {
            "dtype": dtype,
            "autocast": autocast,
            "gradient_checkpointing": True,
            "micro_batch_tokens": budget,
            "objective": {"kind": "scope"},
        }
    )
    model = random_model(shapes, dtype)
    return Learner(model, config, temperature=TEMPERATURE, engine_dtype="bfloat16")


def random_model(shapes: Shapes, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads, num_key_value_heads=shapes.kv_heads,
        intermediate_size=shapes.intermediate, max_position_embeddings=131_072,
        tie_word_embeddings=False, attention_dropout=0.0,
    )  # fmt: skip
    with torch.device(shapes.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype)
        )
    return model.eval()


def model_flops(shapes: Shapes, lengths: Sequence[int], *, scored: int) -> float:
    """Of a forward and a backward over sequences of so many tokens, `scored` of which go through
    the output layer. Matrix products only, two operations a weight and token, three times (once
    forward, twice backward). What is computed again is time and no work: this is model FLOPs
    utilisation, not the hardware's. Attention is causal: half of all pairs of tokens, for the
    queries with the keys and for the weights with the values."""
    head = shapes.hidden // shapes.heads
    attention = 2 * shapes.hidden * (shapes.heads + shapes.kv_heads) * head  # q and o, k and v
    layer = attention + 3 * shapes.hidden * shapes.intermediate
    pairs = sum(n * n / 2 for n in lengths)
    forward = 2.0 * shapes.layers * layer * sum(lengths)
    forward += 2.0 * shapes.vocab * shapes.hidden * scored
    forward += 2 * 2.0 * shapes.layers * shapes.heads * head * pairs
    return 3 * forward


def weights_off_the_device(shapes: Shapes, _: Known) -> list[Found]:
    """Seconds and GB/s of a version on its way to the host, the forward of its probe included."""
    learner = make_learner(shapes, next(iter(REGIMES)), shapes.small_pack)
    taken = seconds(learner.weights, shapes, repeats=3)
    weights = learner.weights()
    assert weights is not None  # this is the first rank
    return [Found(taken), Found(weights.buffer.nbytes / taken / 1e9, ASSUMED_BUS)]


# ------------------------------------------------------------------ the output layer by itself


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from services.output_layer import linear_logprobs

    return -linear_logprobs(hidden, weight, None, targets, entropy=False).logprobs.sum()


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -(hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None]).sum()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
    return loss


def _cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return loss


CONTESTANTS: dict[str, Loss] = {
    "ours": _ours,
    "naive": _naive,
    "Liger": _liger,
    "cut-cross-entropy": _cut,
}
PACKAGES = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def head(shapes: Shapes, known: Known, name: str) -> list[Found]:
    """Negated log-probs summed, forward and backward: GiB over the inputs and gradients that every
    contestant holds, and milliseconds."""
    cost = head_cost(shapes, name)
    if name == "ours":
        return [Found(one) for one in cost]
    ours = (known.get(f"gpu: log-probs, ours, {what}") for what in ("memory", "time"))
    return [Found(mine, theirs) for mine, theirs in zip(ours, cost, strict=True)]


def head_cost(shapes: Shapes, name: str) -> tuple[float, float]:
    """GiB (0 on a CPU, which does not count them) and milliseconds."""
    torch.manual_seed(0)
    loss = CONTESTANTS[name]
    make: dict[str, Any] = {
        "device": shapes.device, "dtype": torch.bfloat16, "requires_grad": True,
    }  # fmt: skip
    hidden = torch.randn(shapes.scored, shapes.hidden, **make)
    weight = torch.randn(shapes.vocab, shapes.hidden, **make)
    targets = torch.randint(0, shapes.vocab, (shapes.scored,), device=shapes.device)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()

    step()
    held = torch.cuda.memory_allocated() / 2**30 if shapes.device == "cuda" else 0.0
    forget_peak(shapes)
    taken = seconds(step, shapes, repeats=5)
    return peak_gib(shapes) - held, taken * 1e3


# ------------------------------------------------------------------- engines without vLLM


def sampling(shapes: Shapes, _: Known) -> list[Found]:
    """Tokens a second of answers that all run into their limit."""
    from rollout.rows import Request
    from rollout.transformers_engine import prepare, sample_groups
    from services.trajectory import Sampling

    model = prepare(random_model(shapes, "bfloat16"))
    prompts = torch.randint(2, shapes.vocab, (shapes.answers // SAMPLES, shapes.prompt)).tolist()
    requests = [Request(ids, Sampling(SAMPLES, shapes.sampled, seed=0)) for ids in prompts]
    taken = seconds(lambda: sample_groups(model, requests, [-1]), shapes, repeats=1)
    return [Found(len(requests) * SAMPLES * shapes.sampled / taken)]


def scoring(shapes: Shapes, _: Known) -> list[Found]:
    """Tokens a second through a teacher of the student's shapes, prompts included."""
    from services import packed

    model = packed.prepare(random_model(shapes, "bfloat16"))
    lengths = answers_that_fill(shapes, shapes.scored)
    sequences = [torch.randint(2, shapes.vocab, (shapes.prompt + n,)).tolist() for n in lengths]
    starts = [shapes.prompt] * len(sequences)
    taken = seconds(lambda: packed.score_top(model, sequences, starts, 0), shapes, repeats=3)
    return [Found(sum(map(len, sequences)) / taken)]


# --------------------------------------------------------------------------- a whole small run


def loop(shapes: Shapes, _: Known) -> list[Found]:
    """Sampling, verdict, scores, weights and gradient, one after another: seconds a step and
    sampled tokens a second but for the first step, which warms up; right answers among the last
    step's samples against the first's."""
    from trainer.config import TrainerConfig

    told = _smollm(shapes) if (Path(shapes.small_model) / "config.json").exists() else _sums(shapes)
    settings: dict[str, Any] = {
        "groups_per_step": shapes.loop_prompts, "micro_batch_tokens": 4096, **told.settings,
    }  # fmt: skip
    marks: list[tuple[float, int]] = []

    def mark(so_far: Trained) -> None:
        wait(shapes)
        marks.append((time.perf_counter(), so_far.sampled_tokens))

    trained = told.stages.train(
        TrainerConfig.model_validate(settings),
        told.rows,
        SAMPLES,
        seed=0,
        steps=shapes.loop_steps,
        each_step=mark,
    )
    (began, before), (ended, after) = marks[0], marks[-1]
    return [
        Found((ended - began) / (len(marks) - 1), note=told.name),
        Found((after - before) / (ended - began), note=told.name),
        Found(trained.accuracy[-1], trained.accuracy[0], told.name),
    ]


class _Task(NamedTuple):
    name: str
    stages: Stages
    rows: list[PromptRow]
    settings: dict[str, Any]  # of the trainer


def _stages(shapes: Shapes, models: tuple[Path, Path], judge: Any, max_tokens: int) -> Stages:
    from examples.one_process import Stages

    return Stages(
        *models,
        judge,
        max_tokens=max_tokens,
        rows_at_once=shapes.answers,
        device=shapes.device,
    )


def _smollm(shapes: Shapes) -> _Task:
    """`examples/smollm`: the student of before is the teacher, which reads the solution as well."""
    from examples.smollm.measure import MAX_TOKENS, ids
    from examples.smollm.task import TRAIN, TRAIN_SEED, distinct
    from rollout.prompts import Row
    from verifier import math_answer

    def judge(text: str, reference: str) -> Any:
        return math_answer.judge(text, reference, "hashes")

    model = Path(shapes.small_model)
    stages = _stages(shapes, (model, model), judge, MAX_TOKENS)
    rows = [
        Row(
            np.array(ids(story, stages.tokenizer, hints=False), np.int32),
            "stories",
            story.answer,
            teacher_context=np.array(ids(story, stages.tokenizer, hints=True), np.int32),
        )
        for story in distinct(TRAIN, TRAIN_SEED, shapes.loop_steps * shapes.loop_prompts)
    ]
    settings = {
        "objective": {"kind": "scope", "log_ratio_bound": 5.0},
        "optimizer": {"lr": 2e-5, "warmup_steps": 3, "betas": (0.9, 0.95), "weight_decay": 0.0},
    }
    return _Task("SmolLM2-135M-Instruct", stages, rows, settings)


def _sums(shapes: Shapes) -> _Task:
    """`examples/arithmetic`: the demo's models, which come with the source."""
    from examples.arithmetic.task import HERE, TRAIN_SEED, distinct_problems
    from rollout.prompts import Row
    from verifier import exact

    def judge(text: str, reference: str) -> Any:
        return exact.judge(text, reference, ";")

    stages = _stages(shapes, (HERE / "student", HERE / "teacher"), judge, max_tokens=32)
    rows = [
        Row(np.array(stages.tokenizer.encode(one.prompt), np.int32), "arithmetic", one.answer)
        for one in distinct_problems(shapes.loop_steps * shapes.loop_prompts, TRAIN_SEED)
    ]
    return _Task("the demo's models", stages, rows, {"objective": {"kind": "scope"}})


# ------------------------------------------------------------------------------------ the clock


def seconds(work: Callable[[], object], shapes: Shapes, *, repeats: int) -> float:
    """Mean time of `work` on the device, after a warm-up."""
    work()
    wait(shapes)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(shapes)
    return (time.perf_counter() - started) / repeats


def wait(shapes: Shapes) -> None:
    if shapes.device == "cuda":
        torch.cuda.synchronize()


def forget_peak(shapes: Shapes) -> None:
    if shapes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(shapes: Shapes) -> float:
    """At most, of the device's memory; 0 on a CPU, which does not count it."""
    return torch.cuda.max_memory_allocated() / 2**30 if shapes.device == "cuda" else 0.0
