"""The learner's rows on a GPU. Needs torch and transformers, nothing else of this repository but
`services/packed.py`.

Utilisation is model FLOPs over time, against the bf16 matrix rate that the same chip reaches on
large matrices: forward and backward of the packed surrogate and AdamW, at the shapes of Qwen2
1.5B with random weights, completions of 12,288 tokens.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.rows import Row, machine
from services.packed import linear_logprobs, pack, prepare, token_logprobs

PROMPT, COMPLETION = 128, 12_288
VOCAB, HIDDEN, LAYERS = 151_936, 1536, 28
FUSED_TOKENS = 16_384


def rows() -> Iterator[Row]:
    """Each part by itself: what one of them lacks, memory above all, leaves the others alone."""
    if not torch.cuda.is_available():
        for name in ("utilisation", "memory and time of the fused log-probs"):
            yield Row(f"gpu: {name}", None, None, "", machine(), note="no GPU here")
        return
    torch.manual_seed(0)
    rate = matrix_rate()
    yield Row("gpu: bf16 matrix rate", rate / 1e12, None, "TFLOP/s", machine())
    yield from attempt("log-probs", fused_rows)
    for budget in (16_384, 32_768):
        yield from attempt(
            f"packed to {budget:,} tokens", lambda budget=budget: utilisation(budget, rate)
        )


def attempt(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """The part's rows, or one that says why there are none. RuntimeError is torch's for all that a
    device refuses."""
    try:
        return part()
    except (RuntimeError, ImportError, TypeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [Row(f"gpu: {name}", None, None, "", machine(), note=why)]
    finally:
        torch.cuda.empty_cache()


def student() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, max_position_embeddings=32_768,
        tie_word_embeddings=True, attention_dropout=0.0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).bfloat16()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return prepare(model.train())  # type: ignore[return-value]


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product on this chip."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / seconds(lambda: a @ b, repeats=20)


def utilisation(budget: int, rate: float) -> list[Row]:
    """One completion of 12,288 tokens and a second one that fills the pack up. Recomputed
    activations cost time and do not count as work, so this is MFU and not hardware use."""
    model = student()
    lengths = [PROMPT + COMPLETION] * (budget // (PROMPT + COMPLETION))
    if budget - sum(lengths) > PROMPT + 1:
        lengths.append(budget - sum(lengths))
    sequences = [torch.randint(0, VOCAB, (n,)).tolist() for n in lengths]
    packed = pack(sequences, [PROMPT] * len(sequences)).to("cuda")
    pull = torch.randn(len(packed.targets), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        (token_logprobs(model, packed, [1.0])[0] * pull).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, repeats=3)
    memory = torch.cuda.max_memory_allocated() / 2**30
    layers = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    work = 6.0 * (layers * sum(lengths) + VOCAB * HIDDEN * len(packed.targets))
    work += 6.0 * LAYERS * HIDDEN * sum(float(n) * n for n in lengths)  # causal: half of 12
    name = f"gpu: packed to {budget:,} tokens"
    return [
        Row(f"{name}, share of the matrix rate", work / taken / rate, 0.55, "peer: the goal",
            machine()),
        Row(f"{name}, tokens/s", sum(lengths) / taken, None, f"{memory:.1f} GiB at most",
            machine()),
    ]  # fmt: skip


def seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Mean time of `work` on the device, after a warm-up."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


# ------------------------------------------------------------------ the output layer by itself


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_rows() -> list[Row]:
    """Negated log-probs summed, forward and backward, in peak memory over the inputs and
    gradients that every contestant holds, and in time."""
    ours = _cost(_ours)
    made = []
    for name, loss in contestants().items():
        if loss is None:
            made.append(Row(f"gpu: log-probs, {name}", None, None, "", machine(),
                            note="not installed"))  # fmt: skip
        else:
            made += attempt(f"log-probs, {name}", lambda n=name, f=loss: _against(n, f, ours))
    return made


def _against(name: str, loss: Loss, ours: tuple[float, float]) -> list[Row]:
    return [
        Row(f"gpu: log-probs, {name}, {what}", mine, other, unit, machine(), lower_is_better=True)
        for what, unit, mine, other in zip(
            ("memory", "time"), ("GiB", "ms"), ours, _cost(loss), strict=True
        )
    ]


def contestants() -> dict[str, Loss | None]:
    return {
        "naive": _naive,
        "Liger": _liger if importlib.util.find_spec("liger_kernel") else None,
        "cut-cross-entropy": _cut if importlib.util.find_spec("cut_cross_entropy") else None,
    }


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


def _cost(loss: Loss) -> tuple[float, float]:
    """GiB over the inputs, and milliseconds."""
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    hidden = torch.randn(FUSED_TOKENS, HIDDEN, **make)  # type: ignore[call-overload]
    weight = torch.randn(VOCAB, HIDDEN, **make)  # type: ignore[call-overload]
    targets = torch.randint(0, VOCAB, (FUSED_TOKENS,), device="cuda")

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()

    step()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, repeats=5)
    return (torch.cuda.max_memory_allocated() - held) / 2**30, taken * 1e3


if __name__ == "__main__":
    import argparse
    from pathlib import Path

    from benchmarks.rows import show, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[Row] = []
    for row in rows():
        found.append(row)
        print(show([row]), flush=True)
        if options.json:  # after each: the machine may be taken away
            write(found, options.json)
