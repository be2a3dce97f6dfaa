"""The learner's rows on a GPU. Needs torch and transformers, nothing else of this repository but
`services/packed.py`.

    python -m benchmarks.gpu [--json FILE] [--layers 28 --hidden 1536 …]

Utilisation is model FLOPs over time, against the bf16 matrix rate that the same chip reaches on
large matrices: forward and backward of the packed surrogate and AdamW, with random weights. The
shapes are options; the defaults are Qwen2 1.5B and completions of 12,288 tokens.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.rows import Row, machine
from services.packed import linear_logprobs, pack, prepare, token_logprobs

P = ParamSpec("P")
T = TypeVar("T")


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
    scored: int = 16_384  # tokens, for the output layer by itself
    matrix: int = 8192  # rows and columns, for the matrix rate


def rows(shapes: Shapes) -> Iterator[Row]:
    """Each part in a process of its own: what one of them lacks, memory above all, or does to the
    device, leaves the others alone."""
    if shapes.device == "cuda" and not torch.cuda.is_available():
        for name in ("utilisation", "memory and time of the fused log-probs"):
            yield Row(f"gpu: {name}", None, None, "", machine(), note="no GPU here")
        return
    rate, why = apart(matrix_rate, shapes)
    yield Row("gpu: bf16 matrix rate", rate and rate / 1e12, None, "TFLOP/s", machine(), note=why)
    yield from fused_rows(shapes)
    for budget in (shapes.small_pack, shapes.large_pack):
        yield from utilisation_rows(shapes, budget, rate)


def utilisation_rows(shapes: Shapes, budget: int, rate: float | None) -> list[Row]:
    reached, why = apart(utilisation, shapes, budget)
    name = f"gpu: packed to {budget:,} tokens"
    if reached is None:
        return [Row(name, None, None, "", machine(), note=why)]
    share = reached.flops / rate if rate else None
    missing = "" if rate else "no matrix rate to compare with"
    return [
        Row(f"{name}, share of the matrix rate", share, 0.55, "peer: the goal", machine(),
            note=missing),
        Row(f"{name}, model FLOPs", reached.flops / 1e12, None, "TFLOP/s", machine()),
        Row(f"{name}, tokens/s", reached.tokens, None, f"{reached.gib:.1f} GiB at most",
            machine()),
    ]  # fmt: skip


def apart(part: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, str]:
    """What the part gives in a process of its own, or None and why: what it raised, or that the
    process died. A device that one part has broken is broken for its process only."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        future = process.submit(part, *args, **kwargs)
        error = future.exception()
        if error is None:
            return future.result(), ""
    lines = str(error).strip().splitlines() or [""]
    return None, f"{type(error).__name__}: {lines[0]}"


def student(shapes: Shapes) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=shapes.vocab, hidden_size=shapes.hidden, num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads, num_key_value_heads=shapes.kv_heads,
        intermediate_size=shapes.intermediate, max_position_embeddings=32_768,
        tie_word_embeddings=True, attention_dropout=0.0,
    )  # fmt: skip
    with torch.device(shapes.device):
        model = Qwen2ForCausalLM(config).bfloat16()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return prepare(model.train())  # type: ignore[return-value]


def matrix_rate(shapes: Shapes) -> float:
    """FLOP/s of a large bf16 matrix product on this chip."""
    size = shapes.matrix
    make = {"device": shapes.device, "dtype": torch.bfloat16}
    a, b = (torch.randn(size, size, **make) for _ in range(2))  # type: ignore[call-overload]
    return 2.0 * size**3 / seconds(lambda: a @ b, shapes, repeats=20)


@dataclass(frozen=True, slots=True)
class Reached:
    flops: float  # model FLOPs a second
    tokens: float  # a second, prompts included
    gib: float  # at most, of the device's memory; 0 on a CPU, which does not count it


def utilisation(shapes: Shapes, budget: int) -> Reached:
    """Whole completions, and a last one that fills the pack up to `budget` tokens."""
    torch.manual_seed(0)
    model = student(shapes)
    longest = shapes.prompt + shapes.completion
    lengths = [longest] * (budget // longest)
    if budget - sum(lengths) > shapes.prompt + 1:
        lengths.append(budget - sum(lengths))
    sequences = [torch.randint(0, shapes.vocab, (n,)).tolist() for n in lengths]
    packed = pack(sequences, [shapes.prompt] * len(sequences)).to(shapes.device)
    pull = torch.randn(len(packed.targets), device=shapes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        (token_logprobs(model, packed, [1.0])[0] * pull).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    forget_peak(shapes)
    taken = seconds(step, shapes, repeats=3)
    work = model_flops(shapes, lengths, scored=len(packed.targets))
    return Reached(work / taken, sum(lengths) / taken, peak_gib(shapes))


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
    return torch.cuda.max_memory_allocated() / 2**30 if shapes.device == "cuda" else 0.0


# ------------------------------------------------------------------ the output layer by itself


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_rows(shapes: Shapes) -> Iterator[Row]:
    """Negated log-probs summed, forward and backward, in peak memory over the inputs and
    gradients that every contestant holds, and in time."""
    ours, why_not_ours = apart(cost, "ours", shapes)
    for name, package in PACKAGES.items():
        if package and not importlib.util.find_spec(package):
            theirs, why = None, "not installed"
        else:
            theirs, why = apart(cost, name, shapes)
        note = "; ".join(filter(None, [why_not_ours and f"ours: {why_not_ours}", why]))
        for number, (what, unit) in enumerate((("memory", "GiB"), ("time", "ms"))):
            yield Row(
                f"gpu: log-probs, {name}, {what}", ours and ours[number],
                theirs and theirs[number], unit, machine(), lower_is_better=True, note=note,
            )  # fmt: skip


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
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
PACKAGES = {"naive": "", "Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def cost(name: str, shapes: Shapes) -> tuple[float, float]:
    """GiB over the inputs (0 on a CPU, which does not count them), and milliseconds."""
    torch.manual_seed(0)
    loss = CONTESTANTS[name]
    make = {"device": shapes.device, "dtype": torch.bfloat16, "requires_grad": True}
    hidden = torch.randn(shapes.scored, shapes.hidden, **make)  # type: ignore[call-overload]
    weight = torch.randn(shapes.vocab, shapes.hidden, **make)  # type: ignore[call-overload]
    targets = torch.randint(0, shapes.vocab, (shapes.scored,), device=shapes.device)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()

    step()
    held = torch.cuda.memory_allocated() / 2**30 if shapes.device == "cuda" else 0.0
    forget_peak(shapes)
    taken = seconds(step, shapes, repeats=5)
    return peak_gib(shapes) - held, taken * 1e3


if __name__ == "__main__":
    import argparse
    from pathlib import Path

    from benchmarks.rows import show, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    for shape in fields(Shapes):
        default = getattr(Shapes(), shape.name)
        option = "--" + shape.name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default)
    options = parser.parse_args()
    chosen = Shapes(**{shape.name: getattr(options, shape.name) for shape in fields(Shapes)})
    results: list[Row] = []
    for row in rows(chosen):
        results.append(row)
        print(show([row]), flush=True)
        if options.json:  # after each: the machine may be taken away
            write(results, options.json)
