"""One gradient step from one batch of scored groups. Knows torch, and nothing of Ray or Redis.

    student perplexity ─▶ coefficients ─▶ forward/backward ─▶ all-reduce ─▶ clip, AdamW
    (no grad, only where      (on the        (micro-batches,     (gradients
     the objective asks)       device)        each rank its own)   and sums)

Every denominator is that of the global batch, so gradients are sums: how the batch is cut into
micro-batches, or spread over ranks, cannot change them.

Axes: `N` trajectories of the global batch, `C` completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from services.models import probe_tokens
from services.packed import prepare, score, token_logprobs
from services.weights import Weights
from trainer.batch import Batch, MicroBatch, micro_batches, share
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.objectives import Coefficients, SequenceStats, objective
from trainer.scope import effective_sample_size

Metrics = dict[str, float]


class Learner:
    """The student, its optimizer, and the step.

    Args:
        model: the student; its parameters are trained in place.
        config: the trainer's settings.
        temperature: the one that rollouts are sampled at. ρ is computed at it; everything that
            is compared with the teacher is computed at 1.
        total_steps: where a cosine schedule ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        *,
        temperature: float,
        total_steps: int | None = None,
    ) -> None:
        self.model = prepare(model)
        # transformers recomputes activations in training mode only. Dropout stays off in both:
        # ρ and the log-ratio compare with models that have none (packed attention refuses it).
        self.model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.config = config
        self.objective = objective(config.objective)
        self.step_number = 0
        self._temperatures = [1.0] if temperature == 1.0 else [1.0, temperature]
        self._optimizer = _adamw(model, config.optimizer)
        self._schedule = LambdaLR(
            self._optimizer, _lr_factor(config.optimizer, total_steps or math.inf)
        )
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ------------------------------------------------------------------------------- the step

    def step(self, batch: Batch) -> Metrics:
        """One optimizer step on the global batch; every rank calls it with the same batch."""
        clock = _Clock()
        stats = self._stats(batch)
        coefficients = self.objective.coefficients(stats, self.config.objective)
        clock.lap("perplexity")
        sums = self.backward(batch, coefficients)
        clock.lap("forward_backward")
        self._reduce_gradients()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.max_grad_norm
        )
        if torch.isfinite(norm):  # a step into NaN could never be taken back
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        self.step_number += 1
        clock.lap("optimizer")
        return {
            **_loss_metrics(sums),
            **_path_metrics(stats, coefficients),
            "actor/grad_norm": float(norm),
            "actor/lr": float(self._schedule.get_last_lr()[0]),
            **clock.laps,
        }

    def backward(self, batch: Batch, coefficients: Coefficients) -> Tensor:
        """Accumulates this rank's gradients of the loss; returns the sums for the metrics,
        reduced over ranks."""
        trained = torch.nonzero(batch.correct | batch.incorrect).flatten().tolist()
        denominator = (
            len(batch.groups)
            if self.config.objective.aggregation == "group"
            else max(1, int(batch.lengths[trained].sum()))
        )
        sums = torch.zeros(len(_SUMS), device=self.device)
        for part in self._parts(batch, trained):
            micro = MicroBatch.of(batch, part, self.device)
            with self._precision():
                logprobs = token_logprobs(self.model, micro.pack, self._temperatures)
            loss, part_sums = self._loss(micro, logprobs, coefficients)
            (loss / denominator).backward()  # type: ignore[no-untyped-call]
            sums += part_sums
        return _all_reduce(sums)

    def _loss(
        self, micro: MicroBatch, logprobs: Tensor, coefficients: Coefficients
    ) -> tuple[Tensor, Tensor]:
        """−Σ ρ_t A_t over one micro-batch, and its share of the metrics.

        Truncating ρ caps the weight of a token, not its gradient's direction: the surrogate is
        min(ρ, cap) · A · (π / π detached), whose gradient is min(ρ, cap) · A · ∇ log π.
        """
        student, sampling = logprobs[0].detach(), logprobs[-1]  # [C] at 1, at the sampling one
        on_policy_data = self.objective.sampler == "student"
        behaviour = micro.behaviour if on_policy_data else sampling.detach()  # ρ = 1
        ratio = torch.exp(sampling.detach() - behaviour)
        capped = ratio.clamp(max=self.config.objective.is_ratio_cap)
        reinforce = coefficients.reinforce[micro.sequence]
        distil = coefficients.distil[micro.sequence]
        log_ratio = torch.where(distil != 0, micro.teacher - student, 0.0)
        bound = self.config.objective.log_ratio_bound
        advantage = reinforce + distil * (log_ratio.clamp(-bound, bound) if bound else log_ratio)
        on_policy = torch.exp(sampling - sampling.detach())
        loss = -(capped * advantage * on_policy).sum()
        with torch.no_grad():
            sums = torch.stack(
                [
                    torch.tensor(float(len(ratio)), device=ratio.device),
                    -(capped * reinforce).sum(),
                    -(capped * (advantage - reinforce)).sum(),
                    (reinforce != 0).sum(),
                    (distil != 0).sum(),
                    -log_ratio.sum(),
                    ratio.sum(),
                    (ratio > self.config.objective.is_ratio_cap).sum(),
                    (sampling - behaviour).abs().sum(),
                ]
            )
        return loss, sums

    # ---------------------------------------------------------------------- student perplexity

    def _stats(self, batch: Batch) -> SequenceStats:
        moved = [t.to(self.device) for t in (batch.group, batch.correct, batch.incorrect)]
        return SequenceStats(
            group=moved[0],
            correct=moved[1],
            incorrect=moved[2],
            student_nll=self._student_nll(batch),
            teacher_nll=batch.teacher_nll.to(self.device),
        )

    @torch.no_grad()
    def _student_nll(self, batch: Batch) -> Tensor:
        """[N] mean NLL at temperature 1 of the correct trajectories; 0 elsewhere.

        A forward of its own: the weights of a group must be known before the first backward,
        and a group may be spread over micro-batches and ranks. A group with one correct
        trajectory gives it weight 1 whatever its perplexity, and is left out.
        """
        nll = torch.zeros(len(batch.sequences), device=self.device)
        if not self.objective.student_perplexity:
            return nll
        correct_in_group = torch.bincount(batch.group, batch.correct.double())[batch.group]
        wanted = torch.nonzero(batch.correct & (correct_in_group > 1)).flatten().tolist()
        for part in self._parts(batch, wanted):
            micro = MicroBatch.of(batch, part, self.device)
            with self._precision():
                logprobs = token_logprobs(self.model, micro.pack, [1.0])[0]
            nll.index_add_(0, micro.sequence, -logprobs)
        return _all_reduce(nll) / batch.lengths.clamp_min(1).to(self.device)

    def _parts(self, batch: Batch, indices: Sequence[int]) -> list[list[int]]:
        mine = share(batch, indices, self._rank, self._ranks)
        return micro_batches(batch, mine, self.config.micro_batch_tokens)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        enabled = self.config.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield

    def _reduce_gradients(self) -> None:
        """Sums gradients over ranks as one flat message; a rank without data adds zeros."""
        if self._ranks == 1:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
        )
        for p, part in zip(
            parameters, torch.split(_all_reduce(flat), [p.numel() for p in parameters]), strict=True
        ):
            p.grad = part.view_as(p)

    # -------------------------------------------------------------------------- in and out

    def weights(self) -> Weights:
        """This version of the student, with the probe that engines check it by."""
        probe = probe_tokens(self.model.config.get_text_config().vocab_size)
        (logprobs,) = score(self.model, [probe], [1])
        return Weights.flatten(self.step_number, self.model.named_parameters(), probe, logprobs)

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on besides the model's own weights."""
        return {
            "step": self.step_number,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the model's weights are loaded before."""
        self.step_number = state["step"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])


# Sums over tokens that every rank collects, in this order.
_SUMS = (
    "tokens", "mle", "opd", "mle_tokens", "opd_tokens", "kl", "ratio", "capped", "logp_difference",
)  # fmt: skip


def _loss_metrics(sums: Tensor) -> Metrics:
    s = dict(zip(_SUMS, sums.tolist(), strict=True))
    tokens, mle, opd = (max(1.0, s[n]) for n in ("tokens", "mle_tokens", "opd_tokens"))
    return {
        "loss/mle": s["mle"] / mle,
        "loss/opd": s["opd"] / opd,
        "kl/student_teacher": s["kl"] / opd,
        "is_ratio/mean": s["ratio"] / tokens,
        "is_ratio/capped_fraction": s["capped"] / tokens,
        "sampling/logp_difference": s["logp_difference"] / tokens,
        "tokens/trained": s["tokens"],
    }


def _path_metrics(stats: SequenceStats, coefficients: Coefficients) -> Metrics:
    known = stats.student_nll[stats.correct & (stats.student_nll != 0)]
    scored = stats.teacher_nll[stats.incorrect]
    ess = effective_sample_size
    return {
        "scope/student_path_fraction": float(stats.correct.float().mean()),
        "scope/teacher_path_fraction": float(stats.incorrect.float().mean()),
        "scope/student_weight_ess": float(ess(coefficients.reinforce, stats.group, stats.correct)),
        "scope/teacher_weight_ess": float(ess(coefficients.distil, stats.group, stats.incorrect)),
        # Geometric means: one trajectory of mean NLL 50 must not be the whole average.
        "ppl/student": float(known.mean().exp()) if len(known) else math.nan,
        "ppl/teacher": float(scored.mean().exp()) if len(scored) else math.nan,
    }


def _all_reduce(tensor: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _adamw(model: PreTrainedModel, config: OptimizerConfig) -> AdamW:
    """AdamW that decays matrices only: decaying norms and biases has no meaning."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def _lr_factor(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant" or total_steps == math.inf:
            return 1.0
        span = max(1.0, total_steps - config.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))

    return factor


class _Clock:
    """Wall time of the phases of a step, in seconds."""

    def __init__(self) -> None:
        self.laps: Metrics = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"timing_s/{name}"] = now - self._last
        self._last = now
