"""Trained tokens per second, against plain transformers and TRL.

    python -m benchmarks.learner [--json FILE] [--only PART …]  learner, sharing, end-to-end

    learner      one frozen batch of skewed lengths, the learner's work alone: student forward and
                 backward, loss, optimizer. The teacher's side is given to everyone.
    sharing      forward and backward of answers that share their prompt, against each with its own
    end-to-end   generation, scoring and learning: a real `scope run` against TRL's trainers

What the machine cannot run stands in the table with the reason. TRL is in the extra `bench`. What
takes a GPU is in `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.frozen import VOCAB, Lengths, make_groups, make_model, make_tokenizer
from benchmarks.rows import Row, machine, show, write
from services.packed import Pack, pack, prepare, token_logprobs
from services.trajectory import ScoredGroup

ROUNDS = 2
LR = 1e-6
SKEWED = Lengths()
EQUAL = Lengths(median=96, sigma=0.0, prompt=(24, 25))
TRL_MICRO = (4, 8)  # sequences in one of TRL's forwards: its best counts
UNIT = "trained tokens per CPU second, one thread"

Contestant = Callable[[], float]  # one optimizer step on the frozen batch; seconds that it took


def learner_rows(lengths: Lengths, label: str) -> list[Row]:
    """Everyone's steps alternate, so that a machine whose speed drifts is fair to all; the CPU's
    own clock is read, so that its other users do not count."""
    torch.set_num_threads(1)
    groups = make_groups(make_model(0), make_model(1), lengths)
    tokens = sum(len(t.token_ids) for g in groups for t in g.rollout.trajectories)
    with tempfile.TemporaryDirectory() as directory:
        rates = {
            name: tokens / seconds
            for name, seconds in _race(_contestants(groups, Path(directory))).items()
        }
    ours = rates["opd"]
    rows = [
        _row(f"learner, {label}: plain transformers loop", ours, rates["plain"]),
        _row(f"learner, {label}: SCOPE's two paths against our OPD", rates["scope"], ours),
    ]
    for name, trainer in (("iw-opd", "IWOPDTrainer"), ("distillation", "DistillationTrainer")):
        rated = {m: rates[f"{name} {m}"] for m in TRL_MICRO if f"{name} {m}" in rates}
        best = max(rated, key=lambda m: rated[m]) if rated else None
        rows.append(
            _row(
                f"learner, {label}: TRL {trainer}",
                ours,
                rated[best] if best else None,
                f"its best of {TRL_MICRO}: {best} sequences a forward" if best else _no_trl(),
            )
        )
    return rows


def _row(name: str, ours: float | None, peer: float | None, note: str = "") -> Row:
    return Row(name, ours, peer, UNIT, machine(), note=note)


def _no_trl() -> str:
    return "TRL is not installed: pip install -c constraints.txt -e '.[bench]'"


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def _race(contestants: Mapping[str, Contestant], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a step; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, step in contestants.items():
            seconds = step()
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _contestants(groups: list[ScoredGroup], directory: Path) -> dict[str, Contestant]:
    made = {"opd": _ours(groups, "opd"), "scope": _ours(groups, "scope"), "plain": _plain(groups)}
    if has_trl():
        for micro in TRL_MICRO:
            made |= _trl(groups, directory, micro)
    return made


def _ours(groups: list[ScoredGroup], kind: str) -> Contestant:
    """`opd` is what IWOPDTrainer does with gamma 0: the loss's mean over all tokens."""
    from trainer.batch import Batch
    from trainer.config import TrainerConfig
    from trainer.learner import Learner

    config = TrainerConfig.model_validate(
        {
            "objective": {"kind": kind, "normalization": "released", "aggregation": "token"},
            "optimizer": {"lr": LR},
            "micro_batch_tokens": 2048,
        }
    )
    learner = Learner(make_model(0), config, temperature=1.0)
    return lambda: _seconds(lambda: learner.step(*learner.plans(Batch.of(groups))))


def _plain(groups: list[ScoredGroup], micro: int = 8) -> Contestant:
    """What one writes first: padded rows, logits, log_softmax."""
    model = make_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rows = [
        (torch.tensor([*g.prompt.token_ids, *t.token_ids]), len(g.prompt.token_ids), scores)
        for g in groups
        for t, scores in zip(g.rollout.trajectories, g.teacher_logprobs.values(), strict=True)
    ]
    total = sum(len(ids) - start for ids, start, _ in rows)

    def step() -> None:
        for first in range(0, len(rows), micro):
            part = rows[first : first + micro]
            (_plain_loss(model, part) / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: _seconds(step)


def _plain_loss(model: PreTrainedModel, rows: list[tuple[Tensor, int, Tensor]]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _, _ in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _, _ in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    loss = torch.zeros(())
    for row, (sequence, start, scores) in zip(logprobs, rows, strict=True):
        student = row[start - 1 : len(sequence) - 1]
        loss = loss - (student * (torch.as_tensor(scores) - student.detach())).sum()
    return loss


def _trl(groups: list[ScoredGroup], directory: Path, micro: int) -> dict[str, Contestant]:
    from benchmarks import trl_peers

    tokenizer = make_tokenizer()
    settings = {"micro": micro, "steps": 1, "lr": LR}
    with trl_peers.quiet():
        made = {
            "iw-opd": trl_peers.frozen_iw_opd(
                make_model(0), tokenizer, groups, directory, **settings
            ),
            "distillation": trl_peers.frozen_distillation(
                make_model(0), make_model(1), tokenizer, groups, directory, **settings
            ),
        }

    def step(trainer: trl_peers.Trainer, watch: trl_peers.Stopwatch) -> float:
        with trl_peers.quiet():
            trainer.train()
        return watch.seconds[-1]  # not the set-up of `train`

    return {
        f"{name} {micro}": (lambda trainer=trainer, watch=watch: step(trainer, watch))
        for name, (trainer, watch) in made.items()
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def sharing_rows() -> list[Row]:
    """Both layouts alternate; the median of the CPU seconds of each."""
    torch.set_num_threads(1)
    model, rows = prepare(make_model(0)), []
    for prompt, answer in ((16, 128), (64, 64), (256, 64)):
        drawn = torch.randint(2, VOCAB, (8, prompt + answer))
        drawn[:, :prompt] = drawn[0, :prompt]
        ids, starts = drawn.tolist(), [prompt] * len(drawn)
        packs = {"shared": pack(ids, starts, families=[range(8)]), "apart": pack(ids, starts)}

        def step(packed: Pack) -> float:
            return _seconds(lambda: token_logprobs(model, packed, [1.0]).sum().backward())

        made = {name: partial(step, packed) for name, packed in packs.items()}
        rates = {n: 8 * answer / s for n, s in _race(made, rounds=7).items()}
        name = f"sharing a prompt of {prompt} tokens by 8 answers of {answer}"
        rows.append(_row(name, rates["shared"], rates["apart"], "peer: each with its own prompt"))
    return rows


def end_to_end_rows() -> list[Row]:
    from benchmarks import end_to_end

    return end_to_end.rows() if has_trl() else [_row("end to end", None, None, _no_trl())]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "learner": lambda: learner_rows(SKEWED, "skewed") + learner_rows(EQUAL, "equal lengths"),
    "sharing": sharing_rows,
    "end-to-end": end_to_end_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    rows: list[Row] = []
    for part in options.only:
        rows += PARTS[part]()
        if options.json:  # after each part: a later one may take long
            write(rows, options.json)
    print(show(rows))


if __name__ == "__main__":
    main()
