"""Trained tokens per second, against plain transformers and TRL.

    python -m benchmarks.learner [--model tiny | smollm] [--pairs N] [--json FILE] [--only PART …]

    learner      one frozen batch, the learner's work alone: student forward and backward, loss,
                 optimizer. The teacher's side is given to everyone. The tiny model has answers of
                 skewed lengths and of equal ones, SmolLM2 its own to stories of examples/smollm.
    sharing      forward and backward of answers that share their prompt, against each with its own
    end-to-end   generation, scoring and learning: a real `scope run` against TRL's trainers, in
                 pairs. With --json a run that was interrupted is gone on with.

`--model` is that of the parts `learner` and `end-to-end`. What the machine cannot run stands in the
table with the reason. TRL is in the extra `bench`, what reads SmolLM2 in `smollm`. What takes a GPU
is in `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.frozen import TINY, VOCAB, Lengths, Models, make_model, random_groups
from benchmarks.kept import say
from benchmarks.rows import Row, in_turn, machine, markdown, show, write
from services.packed import Pack, pack, prepare, token_logprobs
from services.trajectory import ScoredGroup

PARTS = ("learner", "sharing", "end-to-end")
ROUNDS, PAIRS = 3, 3
LR = 1e-6
SKEWED = Lengths()
EQUAL = Lengths(median=96, sigma=0.0, prompt=(24, 25))
TRL_MICRO = (4, 8)  # sequences in one of TRL's forwards
ROUNDING = 0.01  # of the size of hidden states: larger differences have another reason
UNIT = "trained tokens per CPU second, one thread"

Contestant = Callable[[], float]  # one optimizer step on the frozen batch; seconds that it took


@dataclass(frozen=True, slots=True)
class Work:
    """What all contestants are given. `directory` has the student's weights in `student`."""

    models: Models
    groups: list[ScoredGroup]
    directory: Path

    @property
    def tokens(self) -> int:
        return sum(len(t.token_ids) for g in self.groups for t in g.rollout.trajectories)


def learner_rows(models: Models, groups: list[ScoredGroup], label: str) -> list[Row]:
    """Everyone's steps alternate, so that a machine whose speed drifts is fair to all; the CPU's
    own clock is read, so that its other users do not count."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Work(models, groups, Path(name))
        peers = _best_peers(work)
        made = {"opd": _ours(work, "opd"), "scope": _ours(work, "scope"), "plain": _plain(work)}
        for own in made.values():
            own()  # warms up, as choosing did the peers
        raced = _race(made | {name: step for name, (step, _) in peers.items()})
    rates = {name: [work.tokens / s for s in seconds] for name, seconds in raced.items()}
    row = partial(in_turn, unit=UNIT)
    ours, start = rates["opd"], f"learner, {label}"
    return [
        row(f"{start}: plain transformers loop", ours, rates["plain"]),
        row(f"{start}: SCOPE's two paths against our OPD", rates["scope"], ours),
        *(row(f"{start}: TRL {n}", ours, rates[n], note=note) for n, (_, note) in peers.items()),
        *([] if peers else [_row(f"{start}: TRL", None, None, _no_trl())]),
    ]


def _best_peers(work: Work) -> dict[str, tuple[Contestant, str]]:
    """TRL's trainers, each with the count of sequences in a forward that makes it faster, found
    once, and what is to be said of it."""
    if not has_trl():
        return {}
    work.models.student().save_pretrained(work.directory / "student")
    best: dict[str, tuple[Contestant, str]] = {}
    for name, build in PEERS.items():
        fastest = float("inf")
        for micro in TRL_MICRO:
            step, note = build(work, micro)
            seconds = step()
            say(f"TRL {name}, {micro} sequences a forward: {seconds:.1f} s")
            if seconds < fastest:
                fastest, chosen = seconds, f"its best of {TRL_MICRO} sequences a forward: {micro}"
                best[name] = step, "; ".join(filter(None, (chosen, note)))
            del step
            gc.collect()  # trainers hold themselves, and as much memory as several models
    return best


def _row(name: str, ours: float | None, peer: float | None, note: str = "") -> Row:
    return Row(name, ours, peer, UNIT, machine(), note=note)


def _no_trl() -> str:
    return "TRL is not installed: pip install -c constraints.txt -e '.[bench]'"


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def _race(contestants: Mapping[str, Contestant], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of everyone's step in each round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            times[name].append(step())
            say(f"{name}: {times[name][-1]:.3g} s")
    return times


def _ours(work: Work, kind: str) -> Contestant:
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
    learner = Learner(work.models.student(), config, temperature=1.0)
    return lambda: _seconds(lambda: learner.step(*learner.plans(Batch.of(work.groups))))


def _plain(work: Work, micro: int = 8) -> Contestant:
    """What one writes first: padded rows, logits, log_softmax."""
    model = work.models.student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rows = [
        (torch.tensor([*g.prompt.token_ids, *t.token_ids]), len(g.prompt.token_ids), scores)
        for g in work.groups
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


def _iw_opd(work: Work, micro: int) -> tuple[Contestant, str]:
    from benchmarks.trl_peers import frozen_iw_opd, quiet

    with quiet():
        trainer, watch = frozen_iw_opd(
            work.models.student(), work.models.tokenizer(), work.groups, work.directory,
            micro=micro, steps=1, lr=LR,
        )  # fmt: skip
    return partial(_train, trainer, watch), ""


def _distillation(work: Work, micro: int) -> tuple[Contestant, str]:
    from benchmarks.trl_peers import frozen_distillation, quiet

    with quiet():
        trainer, watch = frozen_distillation(
            work.models.student(), work.models.teacher(), work.models.tokenizer(), work.groups,
            work.directory, micro=micro, steps=1, lr=LR,
        )  # fmt: skip
    return partial(_train, trainer, watch), ""


def _async_distillation(work: Work, micro: int) -> tuple[Contestant, str]:
    from benchmarks.trl_peers import frozen_async, leak, quiet

    with quiet():
        trainer, watch = frozen_async(
            work.directory / "student", work.models.tokenizer(), work.groups, work.directory,
            micro=micro, steps=1, lr=LR,
        )  # fmt: skip
        leaked = leak(trainer)
    kept = "keep answers apart" if leaked < ROUNDING else "LET ANSWERS SEE EACH OTHER"
    return partial(_train, trainer, watch), f"its packs {kept} ({leaked:.0e})"


PEERS: dict[str, Callable[[Work, int], tuple[Contestant, str]]] = {
    "IWOPDTrainer": _iw_opd,
    "DistillationTrainer": _distillation,
    "AsyncDistillationTrainer": _async_distillation,
}


def _train(trainer: Any, watch: Any) -> float:
    """Seconds of the step, not of the set-up of `train`."""
    from benchmarks.trl_peers import quiet

    with quiet():
        trainer.train()
    return float(watch.seconds[-1])


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def sharing_rows() -> list[Row]:
    """Both layouts alternate; CPU seconds."""
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
        for warm_up in made.values():
            warm_up()
        rates = {n: [8 * answer / s for s in took] for n, took in _race(made, rounds=7).items()}
        name = f"sharing a prompt of {prompt} tokens by 8 answers of {answer}"
        note = "peer: each with its own prompt"
        rows.append(in_turn(name, rates["shared"], rates["apart"], UNIT, note))
    return rows


def batch_rows(model: str) -> list[Row]:
    """`learner_rows` of all batches of a model."""
    if model == "smollm":
        from benchmarks.smollm import SMOLLM, sampled_groups

        return learner_rows(SMOLLM, sampled_groups(), "SmolLM2")
    batches = {"skewed": SKEWED, "equal lengths": EQUAL}
    return [
        row
        for label, lengths in batches.items()
        for row in learner_rows(TINY, random_groups(lengths), label)
    ]


def end_to_end_rows(model: str, pairs: int, kept: Path | None) -> list[Row]:
    if not has_trl():
        return [_row("end to end", None, None, _no_trl())]
    from benchmarks import end_to_end

    return end_to_end.rows(model, pairs, kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "smollm"), default="tiny")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of the part end-to-end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    kept = options.json and options.json.with_suffix(".measured.jsonl")
    parts: dict[str, Callable[[], list[Row]]] = {
        "learner": partial(batch_rows, options.model),
        "sharing": sharing_rows,
        "end-to-end": partial(end_to_end_rows, options.model, options.pairs, kept),
    }
    rows: list[Row] = []
    for part in options.only:
        rows += parts[part]()
        if options.json:  # after each part: a later one may take long
            write(rows, options.json)
    if kept and "end-to-end" in options.only:
        kept.unlink(missing_ok=True)  # all of it is in the rows
    print(show(rows), markdown(rows), sep="\n\n")


if __name__ == "__main__":
    main()
