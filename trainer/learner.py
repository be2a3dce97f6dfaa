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
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from services.models import probe_tokens
from services.packed import can_share, pack, token_logprobs
from services.weights import Weights, on_the_wire
from trainer.batch import Batch, Family, MicroBatch
from trainer.checkpoint import RANK_PREFIX, State
from trainer.config import TrainerConfig
from trainer.divergence import divergence
from trainer.objectives.base import Coefficients, SequenceStats, Tokens
from trainer.objectives.kinds import objective
from trainer.optimizer import adamw, lr_factor, moments
from trainer.scope import effective_sample_size, relative_weights
from trainer.step_plan import StepPlan, plan_step
from trainer.student import Student

Metrics = dict[str, float]


class Learner:
    """The student, its optimizer, and the step.

    Args:
        model: the student; its parameters are trained in place.
        config: the trainer's settings.
        temperature: the one that rollouts are sampled at. ρ is computed at it; everything that
            is compared with the teacher is computed at 1.
        total_steps: where a cosine schedule ends.
        device: what computes; None takes where the model lies.
        probe: the tokens that engines check each version by; None spreads them.
        engine_dtype: what these compute in; `weights` gives matrices in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainerConfig,
        *,
        temperature: float,
        total_steps: int | None = None,
        device: torch.device | None = None,
        probe: Sequence[int] | None = None,
        engine_dtype: str = "float32",
    ) -> None:
        self.model = model
        self._pair_cost = _pair_cost(model)
        self.device = device or model.device
        self.student = Student(model, config, self.device)
        self._share = can_share(model, self.device, self.student.computes_in)
        self.config = config
        self.objective = objective(config.objective)
        self.step_number = 0
        self._probe = probe_tokens(self.vocabulary) if probe is None else list(probe)
        self._engine_dtype = engine_dtype
        self.coefficients: Coefficients  # of the last step
        self._temperatures = [1.0] if temperature == 1.0 else [1.0, temperature]
        self._optimizer = adamw(self.student.trained.values(), config.optimizer)
        self._lr_factor = lr_factor(config.optimizer, total_steps or math.inf)
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    @property
    def vocabulary(self) -> int:
        """How many tokens the student has rows for."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    # ------------------------------------------------------------------------------- the step

    def plans(self, batch: Batch) -> list[StepPlan]:
        """What each rank does in the step on this global batch; the same on every rank, so nothing
        but its plan need be communicated."""
        return plan_step(
            batch,
            self.objective,
            self.config,
            ranks=self.student.ranks,
            pair_cost=self._pair_cost,
            share=self._share,
        )

    def step(self, plan: StepPlan, clock: Clock | None = None) -> Metrics:
        """One optimizer step on the global batch, of which this rank does its `plan`. The phases
        that it went through are added to `clock`."""
        clock = clock or Clock()
        sums, stats, self.coefficients = self.backward(plan, clock)
        clock.lap("forward_backward")
        self.student.sum_gradients()
        norm = self.student.clip_gradients(self.config.optimizer.max_grad_norm)
        lr = self.config.optimizer.lr * self._lr_factor(self.step_number)
        if math.isfinite(norm):  # a step into NaN could never be taken back
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        clock.lap("optimizer")
        return {
            **_loss_metrics(sums.reduced()),
            **_path_metrics(stats, self.coefficients),
            "actor/grad_norm": norm,
            "actor/lr": lr,
        }

    def backward(
        self, plan: StepPlan, clock: Clock
    ) -> tuple[TokenSums, SequenceStats, Coefficients]:
        """Accumulates this rank's gradients of the loss. Returns the sums for the metrics, what
        the objective saw, and what it said."""
        batch, together = plan.batch, plan.together
        trained = batch.correct | batch.incorrect  # the denominator's, also where A is 0
        stats = self._stats(plan)
        coefficients = self.objective.coefficients(stats, self.config.objective)
        clock.lap("perplexity")
        denominator = (
            batch.group_count
            if self.config.objective.aggregation == "group"
            else max(1, int(batch.sampled[trained].sum()))
        )
        sums = TokenSums()
        # One at least: gradients are zeros then, as those of a loss of 0 are, and not absent.
        for micro, last in self._micro_batches(batch, plan.trained, at_least=1):
            self.student.sums_at(last=last)
            # At temperature 1 the sampled tokens are compared with the teacher, and no more.
            compared = len(self._temperatures) - 1 if micro.top_ids is None else 0
            logprobs = self._logprobs(micro, self._temperatures, micro.top_ids, compared)
            if together.any():
                own = self._mean_nll(batch, micro, _sampled(logprobs)[0].detach(), together)
                stats = stats._replace(student_nll=stats.student_nll + own)
                coefficients = self.objective.coefficients(stats, self.config.objective)
            loss, part_sums = self._loss(micro, logprobs, stats, coefficients)
            (loss / denominator).backward()  # type: ignore[no-untyped-call]
            sums.add(part_sums)
        return sums, stats, coefficients

    def _logprobs(
        self,
        micro: MicroBatch,
        temperatures: Sequence[float],
        top_ids: Tensor | None = None,
        detached: int = 0,
    ) -> Tensor:
        """[K, C] or [K, C, 1 + k] log-probs of the sampled tokens at each temperature, and behind
        them of `top_ids`. What the world said is read, and enters nothing."""
        every = self.student.forward(token_logprobs, micro.pack, temperatures, top_ids, detached)
        return every if micro.sampled is None else every.index_select(1, micro.sampled)

    def _loss(
        self,
        micro: MicroBatch,
        every_logprob: Tensor,
        stats: SequenceStats,
        coefficients: Coefficients,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ ρ_t A_t over one micro-batch, and its share of the metrics. A divergence over the
        most likely tokens is an expectation over the student's next token, and so needs
        no ρ.

        Truncating ρ caps the weight of a token, not its gradient's direction: the surrogate is
        min(ρ, cap) · A · (π / π detached), whose gradient is min(ρ, cap) · A · ∇ log π.
        """
        config = self.config.objective
        logprobs = _sampled(every_logprob)
        sampling = logprobs[-1]  # [C] at the sampling temperature
        on_policy_data = self.objective.sampler == "student"
        behaviour = micro.behaviour if on_policy_data else sampling.detach()  # ρ = 1
        ratio = torch.exp(sampling.detach() - behaviour)
        tokens = _tokens(micro, every_logprob.detach(), behaviour, stats, coefficients)
        weight = -ratio.clamp(max=config.is_ratio_cap) * torch.exp(sampling - sampling.detach())
        loss = weight * self.objective.advantage(tokens, config)
        gap = -tokens.share
        diverge = self.objective.divergence(tokens, config)
        if diverge is not None and config.pull != "sampled" and micro.top_logprobs is not None:
            gap = divergence(every_logprob[0, :, 1:], micro.top_logprobs, config.pull)
            gap = torch.where(tokens.distil != 0, gap, 0.0)
            loss = loss + diverge * gap
        with torch.no_grad():
            taught = tokens.distil != 0
            mle = torch.where(taught, weight * tokens.reinforce, loss)
            sums = {
                "tokens": ratio.new_full((), float(len(ratio))),
                "mle": mle.sum(),
                "opd": (loss - mle).sum(),
                "mle_tokens": (mle != 0).sum(),
                "opd_tokens": taught.sum(),
                "kl": gap.sum(),
                "ratio": ratio.sum(),
                "capped": (ratio > config.is_ratio_cap).sum(),
                "logp_difference": (sampling - behaviour).abs().sum(),
            }
        return loss.sum(), sums

    # ---------------------------------------------------------------------- student perplexity

    def _stats(self, plan: StepPlan) -> SequenceStats:
        batch = plan.batch
        moved = [t.to(self.device) for t in (batch.group, batch.correct, batch.incorrect)]
        return SequenceStats(
            group=moved[0],
            correct=moved[1],
            incorrect=moved[2],
            student_nll=self._student_nll(plan),
            teacher_nll=batch.teacher_nll.to(self.device),
        )

    @torch.no_grad()
    def _student_nll(self, plan: StepPlan) -> Tensor:
        """[N] mean NLL at temperature 1 of the correct trajectories that are not `together`; 0
        elsewhere."""
        batch = plan.batch
        nll = torch.zeros(len(batch.lengths), device=self.device)
        if not self.objective.student_perplexity:
            return nll
        for micro, _ in self._micro_batches(batch, plan.scored):
            logprobs = self._logprobs(micro, [1.0])[0]
            nll += self._mean_nll(batch, micro, logprobs, ~plan.together)
        return _all_reduce(nll)

    def _mean_nll(
        self, batch: Batch, micro: MicroBatch, logprobs: Tensor, member: Tensor
    ) -> Tensor:
        """[N] mean NLL of the correct members among the trajectories of a micro-batch."""
        nll = logprobs.new_zeros(len(batch.lengths)).index_add(0, micro.sequence, -logprobs)
        mean = nll / batch.sampled.clamp_min(1).to(self.device)
        return torch.where((batch.correct & member).to(self.device), mean, 0.0)

    def _micro_batches(
        self, batch: Batch, parts: Sequence[Sequence[Family]], *, at_least: int = 0
    ) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches on the device, and whether each is the last; filled up with
        idle ones when there are fewer than `at_least`, or when the ranks have to go together and
        another has more."""
        rounds = self.student.rounds(max(at_least, len(parts)))
        for number in range(rounds):
            made = (
                MicroBatch.of(batch, parts[number], self.device, vocabulary=self.vocabulary)
                if number < len(parts)
                else _idle(self.device)
            )
            yield made, number == rounds - 1

    # -------------------------------------------------------------------------- in and out

    def weights(self) -> Weights | None:
        """This version of the student, with the probe that engines check it by. Every rank calls
        it; the first gets the weights, the others None."""
        probe = self._probe
        with torch.no_grad():
            packed = pack([probe], [1]).to(self.device)
            logprobs = self.student.forward(token_logprobs, packed, [1.0])[0].cpu().tolist()
        tensors = (tensor for _, tensor in self.student.tensors())
        if self._rank == 0:
            sent = on_the_wire(self.student.manifest(), self._engine_dtype)
            pinned = self.device.type == "cuda"
            return Weights.gather(self.step_number, sent, tensors, probe, logprobs, pinned)
        deque(tensors, maxlen=0)  # takes its part in putting each together
        return None

    def state(self) -> State:
        """All that a step depends on: what a checkpoint holds, and is loaded into. The tensors
        are the learner's own; `load_state` tells it that they were filled."""
        state = {
            "step": torch.tensor(self.step_number),
            f"{RANK_PREFIX}{self._rank}.random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state[f"{RANK_PREFIX}{self._rank}.random_cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.student.trained.items():
            state[f"model.{name}"] = parameter.detach()
            for moment, value in moments(self._optimizer, parameter).items():
                state[f"optimizer.{name}.{moment}"] = value
        return state

    def load_state(self, state: State) -> None:
        """Continues from a `state` whose tensors were filled with a saved one's."""
        self.step_number = int(state["step"])
        torch.set_rng_state(state[f"{RANK_PREFIX}{self._rank}.random"])
        if self.device.type == "cuda":
            random = state[f"{RANK_PREFIX}{self._rank}.random_cuda"]
            torch.cuda.set_rng_state(random, self.device)


class TokenSums:
    """Sums over tokens, by name: of a rank's micro-batches, then of all ranks."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, Tensor]] = []

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's, which has the names that all of them have."""
        self._parts.append(part)

    def reduced(self) -> Metrics:
        """The sums over all ranks; each of them calls it, and has worked on one micro-batch."""
        parts = torch.stack([torch.stack([*part.values()]) for part in self._parts])
        return dict(zip(self._parts[0], _all_reduce(parts.sum(0)).tolist(), strict=True))


def _loss_metrics(s: Metrics) -> Metrics:
    tokens = s["tokens"] or math.nan  # of no tokens there is no mean
    mle, opd = (max(1.0, s[n]) for n in ("mle_tokens", "opd_tokens"))
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
    scored = stats.teacher_nll[stats.incorrect & (stats.teacher_nll != 0)]
    ess = effective_sample_size
    return {
        "scope/student_path_fraction": float(stats.correct.float().mean()),
        "scope/teacher_path_fraction": float(stats.incorrect.float().mean()),
        "scope/student_weight_ess": float(ess(coefficients.reinforce, stats.group, stats.correct)),
        "scope/teacher_weight_ess": float(ess(coefficients.distil, stats.group, stats.incorrect)),
        **_spread("student", coefficients.reinforce, stats.group, stats.correct),
        **_spread("teacher", coefficients.distil, stats.group, stats.incorrect),
        # Geometric means: one trajectory of mean NLL 50 must not be the whole average.
        "ppl/student": float(known.mean().exp()) if len(known) else math.nan,
        "ppl/teacher": float(scored.mean().exp()) if len(scored) else math.nan,
    }


def _spread(path: str, weight: Tensor, group: Tensor, member: Tensor) -> Metrics:
    """How uneven a path's weights are: quantiles of the weight over its group's mean weight."""
    member = member & (weight > 0)
    relative = relative_weights(weight, group, member)
    return {
        f"scope/{path}_weight_p{percent}": float(torch.quantile(relative, percent / 100))
        if len(relative)
        else math.nan
        for percent in (10, 50, 90)
    }


def _sampled(logprobs: Tensor) -> Tensor:
    """[K, C] the sampled tokens' own, where the teacher's most likely ones come behind them."""
    return logprobs if logprobs.ndim == 2 else logprobs[..., 0]


def _tokens(
    micro: MicroBatch,
    logprobs: Tensor,
    behaviour: Tensor,
    stats: SequenceStats,
    coefficients: Coefficients,
) -> Tokens:
    """What the objective sees of a micro-batch."""
    top = logprobs[0, :, 1:] if logprobs.ndim == 3 else None
    return Tokens(
        trajectory=micro.sequence,
        student=_sampled(logprobs)[0],
        teacher=micro.teacher,
        behaviour=behaviour,
        reinforce=coefficients.reinforce[micro.sequence],
        distil=coefficients.distil[micro.sequence],
        correct=stats.correct[micro.sequence],
        incorrect=stats.incorrect[micro.sequence],
        count=len(stats.group),
        student_top=top,
        teacher_top=micro.top_logprobs,
        chunk=micro.chunk,
        entropy=micro.entropy,
    )


def _all_reduce(tensor: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _pair_cost(model: PreTrainedModel) -> float:
    """Work of attention for two tokens over that of the linear layers for one: with L layers of
    width D and P parameters, a forward takes 2P operations a token and, causally, 2LD a pair."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(config.num_hidden_layers * width / model.num_parameters())


def _idle(device: torch.device) -> MicroBatch:
    """A forward that scores nothing, and whose gradients are zeros."""
    nothing = torch.zeros(0, device=device)
    return MicroBatch(pack([[0, 0]], [2]).to(device), nothing.long(), nothing, nothing)


class Clock:
    """Wall time of the phases of a step, in seconds. Every instant is in exactly one of them, so
    they add up to the time that has passed."""

    def __init__(self) -> None:
        self._laps: Metrics = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Puts the time since the last lap down to `name`."""
        now, key = time.perf_counter(), f"timing_s/{name}"
        self._laps[key] = self._laps.get(key, 0.0) + now - self._last
        self._last = now

    def take(self) -> Metrics:
        """The phases since this was last called."""
        laps, self._laps = self._laps, {}
        return laps
