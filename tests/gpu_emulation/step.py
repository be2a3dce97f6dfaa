"""One step of the learner on a fake GPU, at real shapes; what was counted, as a line of JSON.

python -m tests.gpu_emulation.step --lengths 12288,3840 --autocast bfloat16

With `-` it reads lines of such arguments, and counts a step for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.gpu_parts import Shapes, scored_group
from services import attention, layouts
from services.fused import fuse
from tests.gpu_emulation.fake_cuda import FakeCuda, pretend
from trainer import lora
from trainer.batch import Batch
from trainer.config import TrainerConfig
from trainer.learner import Clock, Learner
from trainer.optimizer import moments
from trainer.step_plan import plan_step

PROMPT = Shapes().prompt
ATTENTION_A_S, BACK_A_S = 330e12, 270e12  # FLOP/s assumed of an H100, forward and backward


def qwen_1_5b(layers: int, window: int | None = None) -> Qwen2Config:
    """DeepSeek-R1-Distill-Qwen-1.5B, with 28 layers; with a window, all but the first have it."""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=1_536,
        intermediate_size=8_960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=1,
    )


def attach_there(attach: Any) -> Any:
    """Fakes cannot be moved: adapters have to be made on the device."""

    def attached(*arguments: Any) -> None:
        with torch.device("cuda"):
            attach(*arguments)

    return attached


def made(shape: Qwen2Config, dtype: str, proven: layouts.Proven) -> PreTrainedModel:
    """The model on the device, as if it had been measured, which nothing can be there."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
    layouts.record(fuse(model), proven)
    return model


def counted(
    config: TrainerConfig,
    lengths: list[int],
    shape: Qwen2Config,
    dtype: str,
    proven: layouts.Proven,
) -> dict[str, object]:
    """One step on one rank, whose share these lengths are."""
    with FakeCuda() as device:
        model = made(shape, dtype, proven)
        learner = Learner(
            model,
            config,
            temperature=0.6,
            device=torch.device("cuda:0"),
            engine_dtype="bfloat16",
        )
        (plan,) = plan_step(
            Batch.of([scored_group(Shapes(), lengths)]),
            learner.objective,
            config,
            ranks=1,
            pair_cost=learner._pair_cost,
            share=learner._share,
        )
        for parameter in learner.student.trained.values():
            moments(learner._optimizer, parameter)  # which all steps but the first have
        held, device.peak = device.live, device.live
        device.calls.clear(), device.syncs.clear(), device.moved.clear(), device.seconds.clear()
        learner.backward(plan, Clock())
        backward = device.peak
        syncs = Counter(device.syncs)
        device.peak = device.live
        learner.student.sum_gradients()
        summed = device.peak
        device.peak = device.live
        learner.student.clip_gradients(config.optimizer.max_grad_norm)
        learner._optimizer.step()
        optimizer, calls, moved = device.peak, Counter(device.calls), Counter(device.moved)
        seconds = Counter(device.seconds)
        # As every micro-batch but a run's first: beside gradients and the optimizer's moments.
        learner.backward(plan, Clock())
        later = device.peak
        device.syncs.clear()
        weights = learner.weights()
    assert weights is not None
    # Two products of each causal pair forward, and five backward.
    pairs = model.config.hidden_size * sum((PROMPT + length) ** 2 / 2 for length in lengths)
    seconds["_varlen_attn"] = calls["_varlen_attn bfloat16"] * 4 * pairs / ATTENTION_A_S
    seconds["_varlen_attn_backward"] = (
        calls["_varlen_attn_backward bfloat16"] * 10 * pairs / BACK_A_S
    )
    return {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n),
        "held_bytes": held,
        "backward_peak_bytes": backward,
        "summing_peak_bytes": summed,
        "optimizer_peak_bytes": optimizer,
        "later_peak_bytes": later,
        "published_bytes": weights.buffer.nbytes,
        "publishing_syncs": device.syncs,
        "calls": calls,
        "syncs": syncs,
        "moved_bytes": moved,
        "seconds": seconds,
    }


def of(words: Sequence[str]) -> dict[str, object]:
    """What was counted for these arguments."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--autocast", default="bfloat16", choices=["none", "bfloat16"])
    arguments.add_argument("--dtype", default="float32", help="of the weights")
    arguments.add_argument("--lengths", default="12288,3840")
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument("--window", type=int, help="tokens that all layers but one see")
    arguments.add_argument("--layout", default="packed", choices=["packed", "rows"])
    arguments.add_argument("--share", action="store_true", help="answers may share their prompt")
    arguments.add_argument("--no-checkpointing", action="store_true")
    arguments.add_argument("--offload", action="store_true", help="the optimizer's moments")
    arguments.add_argument("--lora", action="store_true")
    arguments.add_argument("--ranks", type=int, default=1, help="replicas, of which one is here")
    given = arguments.parse_args(words)
    lengths = [int(length) for length in given.lengths.split(",")]
    config = TrainerConfig.model_validate(
        {
            "autocast": given.autocast,
            "gradient_checkpointing": not given.no_checkpointing,
            "micro_batch_tokens": sum(lengths) + PROMPT * len(lengths),
            "objective": {"kind": "scope"},
            "optimizer": {"offload": given.offload},
            "lora": {} if given.lora else None,
            "parallel": "ddp",
        }
    )
    shape = qwen_1_5b(given.layers, given.window)
    with replicas(given.ranks):
        proven = layouts.Proven(given.layout, layouts.LogitMap(), shares=given.share)
        return counted(config, lengths, shape, given.dtype, proven)


@contextmanager
def replicas(ranks: int) -> Iterator[None]:
    """This process as the first of so many."""
    if ranks == 1:
        yield
        return
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Prints what was counted."""
    pretend()
    lora.attach = attach_there(lora.attach)
    attention._aligns_ends = lambda _: True  # as on a GPU that has values
    for words in map(str.split, sys.stdin) if sys.argv[1:] == ["-"] else [sys.argv[1:]]:
        print(json.dumps(of(words)), flush=True)


if __name__ == "__main__":
    main()
