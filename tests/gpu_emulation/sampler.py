"""What rollout and teacher ask of vLLM, by the kernels of its GPU runner (V2), which CPU builds
never run: under Triton's interpreter (TRITON_INTERPRET=1), the largest differences from a plain
log_softmax. Prints JSON.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
import vllm.triton_utils
from torch import Tensor

# vLLM puts stand-ins there where it finds no GPU.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

from vllm.v1.worker.gpu.sample import gumbel, logprob, prompt_logprob  # noqa: E402

VOCABULARY, TEMPERATURE = 1_500, 0.6


def drawn(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[N] tokens sampled from each row of [N, V] logits at `TEMPERATURE`, by seeds of their own,
    and the logits as they were processed for it."""
    rows = len(logits)
    indices, temperatures = torch.arange(rows, dtype=torch.int32), torch.full((rows,), TEMPERATURE)
    processed = logits.clone()
    gumbel.apply_temperature(processed, indices, temperatures)
    tokens = gumbel.gumbel_sample(
        processed,
        indices,
        temperatures,
        torch.arange(rows) + 7,
        torch.full((rows,), 5),
        apply_temperature=False,
        is_drafting=False,
    )
    return tokens, processed


def sampling() -> dict[str, float]:
    """Of `logprobs_mode: processed_logprobs`, which rollout asks for."""
    logits = torch.randn(6, VOCABULARY) * 3
    tokens, processed = drawn(logits)
    expected = torch.log_softmax(logits.double() / TEMPERATURE, 1).gather(1, tokens[:, None])
    found = logprob.compute_topk_scores(processed, 0, tokens, None)
    assert found.logprobs.shape == (6, 1)
    return {
        "temperature": worst(processed, logits / TEMPERATURE),
        "of the sampled": worst(found.logprobs, expected),
    }


def frequencies() -> float:
    """The largest deviation of sampled frequencies from the softmax, in standard errors."""
    row, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.2, -3.0, 1.5]), 600
    tokens, _ = drawn(row.expand(draws, -1))
    chance = torch.softmax(row / TEMPERATURE, 0)
    seen = torch.bincount(tokens, minlength=len(row)) / draws
    return float(((seen - chance) / (chance * (1 - chance) / draws).sqrt()).abs().max())


def scoring() -> dict[str, float]:
    """Of a prompt's tokens, of the most likely ones, and of tokens that were named."""
    ids, logits = torch.randint(VOCABULARY, (10,)), torch.randn(10, VOCABULARY) * 3
    table = torch.log_softmax(logits.double(), 1)
    tokens, scores, _ = prompt_logprob.compute_prompt_logprobs_with_chunking(
        ids, logits, lambda hidden: hidden, 3
    )
    best = table.topk(3, 1)
    named = torch.randint(VOCABULARY, (10, 4))
    return {
        "of the prompt": worst(scores[:, :1], table.gather(1, ids[:, None])),
        "of the most likely": worst(scores[:, 1:], best.values),
        "other tokens": float((tokens[:, 1:] != best.indices).sum()),
        "of named ones": worst(
            logprob.compute_token_logprobs(logits, named), table.gather(1, named)
        ),
    }


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return float((got.double() - expected).abs().max())


def main() -> None:
    """Prints what was found."""
    torch.manual_seed(0)
    print(json.dumps({"sampling": sampling(), "scoring": scoring(), "frequencies": frequencies()}))


if __name__ == "__main__":
    main()
