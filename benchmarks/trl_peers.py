"""TRL's on-policy distillation trainers on the same models and the same tokens as ours.

`IWOPDTrainer` with gamma 0 is the sampled reverse KL that our objective `opd` is;
`DistillationTrainer` with beta 1 is the reverse KL over the whole vocabulary, and
`AsyncDistillationTrainer` with beta 1 that of the sampled token and of all others as one. Nothing
of TRL is changed but where a batch comes from: the frozen ones below take their rollouts and the
teacher's side from the batch, so that only the learner's work is timed.
"""

from __future__ import annotations

import io
import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.async_distillation import (
    AsyncDistillationConfig,
    AsyncDistillationTrainer,
    async_distillation_trainer,
)
from trl.experimental.async_distillation.async_rollout_worker import RolloutSample
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.trainer.utils import pad

from services.trajectory import ScoredGroup


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds of every optimizer step: of this process on a CPU or, if `wall`, of the clock."""

    def __init__(self, *, wall: bool = False) -> None:
        self.seconds: list[float] = []
        self._now = time.perf_counter if wall else time.process_time

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._started)


def common(directory: Path, *, sequences: int, micro: int, steps: int, lr: float) -> dict[str, Any]:
    """Settings of both trainers; everything that costs time and trains nothing is off."""
    return {
        "output_dir": str(directory), "max_steps": steps, "learning_rate": lr,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": sequences // micro,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.01,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


Trainer = IWOPDTrainer | DistillationTrainer | AsyncDistillationTrainer


class FrozenBatch:
    """The groups as TRL lays rollouts out: prompts padded on the left, completions on the right,
    both to the longest of the whole step."""

    def __init__(self, groups: Sequence[ScoredGroup], pad_id: int) -> None:
        rows = [
            (g.prompt.token_ids, t.token_ids, g.teacher_logprobs[index])
            for g in groups
            for index, t in enumerate(g.rollout.trajectories)
        ]
        prompts = [torch.tensor(p, dtype=torch.int64) for p, _, _ in rows]
        completions = [torch.tensor(c, dtype=torch.int64) for _, c, _ in rows]
        self.prompt_ids = pad(prompts, padding_value=pad_id, padding_side="left")
        self.prompt_mask = pad([torch.ones_like(p) for p in prompts], 0, padding_side="left")
        self.completion_ids = pad(completions, padding_value=pad_id)
        self.completion_mask = pad([torch.ones_like(c) for c in completions], 0)
        self.teacher = pad([torch.tensor(t) for _, _, t in rows])

    def for_iw_opd(self) -> dict[str, torch.Tensor]:
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        labels = torch.where(self.completion_mask.bool(), self.completion_ids, -100)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([self.prompt_mask, self.completion_mask], 1),
            "labels": torch.cat([torch.full_like(self.prompt_ids, -100), labels], 1),
            "prompts": self.prompt_ids,
            "prompt_attention_mask": self.prompt_mask,
            "teacher": torch.cat([torch.zeros(self.prompt_ids.shape), self.teacher], 1),
        }

    def for_distillation(self) -> dict[str, torch.Tensor]:
        return {
            "prompt_ids": self.prompt_ids,
            "prompt_mask": self.prompt_mask,
            "completion_ids": self.completion_ids,
            "completion_mask": self.completion_mask,
            "num_items_in_batch": self.completion_mask.sum(),
        }


class FrozenIWOPD(IWOPDTrainer):  # type: ignore[misc]
    """Its rollouts, and its teacher's log-probs as a teacher server would give them, come with the
    batch."""

    def _generate_student_completions(self, slices: Any, on_policy_indices: list[int]) -> None:
        for index in on_policy_indices:
            self._buffered_inputs[index] = slices[index]

    def _get_teacher_token_logprobs_from_server(
        self, inputs: dict[str, torch.Tensor], aligned_prompt_length: int
    ) -> dict[str, torch.Tensor]:
        return {"actual_logprobs": inputs["teacher"][:, aligned_prompt_length:]}


class FrozenDistillation(DistillationTrainer):  # type: ignore[misc]
    """Its rollouts, and the final hidden states of its teacher, come with the batch."""

    frozen: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return dict(self.frozen)

    def _compute_loss(self, student: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        self._hidden = inputs.get("teacher_hidden")
        return super()._compute_loss(student, inputs, num_items_in_batch)

    def _get_last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if model is self.teacher_model and self._hidden is not None:
            return self._hidden
        hidden: torch.Tensor = super()._get_last_hidden_state(model, *args, **kwargs)
        return hidden


class FrozenQueue(queue.Queue[RolloutSample]):
    """The batch's answers, over and over: the trainer's loader asks for one pack more than a step
    trains on."""

    def __init__(self, groups: Sequence[ScoredGroup]) -> None:
        super().__init__()
        self._endless = cycle(
            _sample(g.prompt.token_ids, t.token_ids, g.teacher_logprobs[index])
            for g in groups
            for index, t in enumerate(g.rollout.trajectories)
        )

    def get(self, block: bool = True, timeout: float | None = None) -> RolloutSample:
        return next(self._endless)


def _sample(prompt: Any, completion: Any, teacher: Any) -> RolloutSample:
    """An answer with the teacher's log-probs of its own tokens: all that beta 1 reads."""
    ids = np.concatenate([prompt, completion])
    trained = np.arange(len(ids)) >= len(prompt)
    logprobs = np.full(len(ids), -np.inf, np.float32)
    logprobs[trained] = teacher
    return RolloutSample(
        prompt=[], completion=[], input_ids=ids, completion_mask=trained.astype(np.int64),
        teacher_topk_ids=np.where(trained, ids, -1)[:, None],
        teacher_topk_logprobs=logprobs[:, None],
        model_version=0, metrics={}, teacher_id="default", prompt_id=0,
    )  # fmt: skip


class FrozenRollouts:
    """In the place of the processes that ask vLLM: gives the batch, and does nothing."""

    def __init__(self, groups: Sequence[ScoredGroup]) -> None:
        self.rollout_buffer = FrozenQueue(groups)
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None: ...


class NoTransfer:
    """In the place of the weights' way to vLLM: sends nothing."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


class CountingIWOPD(IWOPDTrainer):  # type: ignore[misc]
    """Counts the tokens that each step trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained_tokens: Counter[int] = Counter()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.trained_tokens[self.state.global_step] += int((inputs["labels"] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


class CountingDistillation(DistillationTrainer):  # type: ignore[misc]
    """Counts the tokens that each step trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained_tokens: Counter[int] = Counter()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.trained_tokens[self.state.global_step] += int(inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def frozen_iw_opd(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[ScoredGroup],
    directory: Path,
    *,
    micro: int,
    steps: int,
    lr: float,
) -> tuple[FrozenIWOPD, Stopwatch]:
    """A trainer for `steps` optimizer steps, each on all groups."""
    batch = FrozenBatch(groups, tokenizer.pad_token_id).for_iw_opd()
    sequences = len(batch["input_ids"])
    watch = Stopwatch()
    trainer = FrozenIWOPD(
        model=student,
        args=IWOPDConfig(
            **common(directory, sequences=sequences, micro=micro, steps=steps, lr=lr),
            lmbda=1.0, distillation_objective="iw_opd", iw_opd_gamma=0.0,
        ),
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_dict({"row": list(range(sequences * steps))}),
        processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    trainer.use_teacher_server = True
    return trainer, watch


def frozen_distillation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[ScoredGroup],
    directory: Path,
    *,
    micro: int,
    steps: int,
    lr: float,
) -> tuple[FrozenDistillation, Stopwatch]:
    """A trainer for `steps` optimizer steps, each on all groups."""
    batch = FrozenBatch(groups, tokenizer.pad_token_id).for_distillation()
    sequences = len(batch["prompt_ids"])
    watch = Stopwatch()
    trainer = FrozenDistillation(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            **common(directory, sequences=sequences, micro=micro, steps=steps, lr=lr), beta=1.0
        ),
        train_dataset=Dataset.from_dict({"prompt": ["0"] * (sequences * steps)}),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer._hidden = None
    with torch.no_grad():
        batch["teacher_hidden"] = trainer._get_last_hidden_state(
            teacher,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
        )
    trainer.frozen = batch
    return trainer, watch


def frozen_async(
    student: Path,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[ScoredGroup],
    directory: Path,
    *,
    micro: int,
    steps: int,
    lr: float,
) -> tuple[AsyncDistillationTrainer, Stopwatch]:
    """A trainer for `steps` optimizer steps, each on all groups, in packs of `micro` answers.

    Args:
        student: a model's directory: this trainer takes nothing else.
    """
    sequences = sum(len(g.rollout.trajectories) for g in groups)
    watch = Stopwatch()
    # It asks for the GPU's name, to report the share of its rate, where there may be none.
    with patch.object(async_distillation_trainer, "get_peak_flops_per_device", return_value=None):
        trainer = AsyncDistillationTrainer(
            model=str(student),
            args=AsyncDistillationConfig(
                **common(directory, sequences=sequences, micro=micro, steps=steps, lr=lr),
                beta=1.0,
                token_budget=0,  # packs of so many answers: every step is the batch, once
                max_staleness=1_000_000,  # whatever version the weights have
                # Its own choice, flash attention, is for GPUs.
                model_init_kwargs={"attn_implementation": "sdpa"},
            ),
            train_dataset=Dataset.from_dict({"prompt": ["0"]}),
            processing_class=tokenizer,
            callbacks=[watch],
            rollout_worker=FrozenRollouts(groups),
            weight_transfer=NoTransfer(),
        )
    return trainer, watch


@torch.no_grad()
def leak(trainer: AsyncDistillationTrainer) -> float:
    """By how much a pack changes what its sequences are alone: the largest difference of a hidden
    state that the trainer's loss sees, by the states' own size. More than rounding means that
    sequences of a pack see each other."""
    (batch, seen), body = (next(iter(trainer.get_train_dataloader())), []), trainer.model.base_model
    hook = body.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state[0]))
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch)
    hook.remove()
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    alone = torch.cat(
        [
            body(input_ids=batch["input_ids"][:, start:end]).last_hidden_state[0]
            for start, end in zip(starts, ends, strict=True)
        ]
    )
    return float((seen[0] - alone).abs().max() / alone.abs().max())


@contextmanager
def quiet() -> Iterator[None]:
    """Without the trainers' own messages."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(before)
