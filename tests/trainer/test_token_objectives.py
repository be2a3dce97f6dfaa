"""Objectives that see tokens: against their papers' formulas, by hand and by autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services import packed
from services.trajectory import TopTokens
from tests.builders import VOCAB, scored_group, tiny_model
from tests.trainer.token_objectives import KINDS, config_of, expected_gradients, groups
from trainer.batch import Batch
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Clock, Learner
from trainer.objectives.base import SequenceStats, Tokens
from trainer.objectives.config import (
    EopdConfig,
    ObjectiveConfig,
    ScopeConfig,
    SrpoConfig,
    TgopdConfig,
)
from trainer.objectives.kinds import objective
from trainer.objectives.rewards import tgopd

NOTHING = torch.zeros(0)


def tokens(*lengths: int, **given: Any) -> Tokens:
    """Of trajectories of these lengths, all pulled towards the teacher with a weight of 1."""
    places = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    zeros = torch.zeros(len(places))
    fields: dict[str, Any] = {
        "student": zeros, "teacher": zeros, "behaviour": zeros,
        "reinforce": zeros, "distil": zeros + 1,
        "correct": zeros.bool(), "incorrect": ~zeros.bool(),
    }  # fmt: skip
    fields |= {name: torch.as_tensor(value) for name, value in given.items()}
    return Tokens(trajectory=places, count=len(lengths), **fields)


def advantage(seen: Tokens, kind: str, **settings: Any) -> list[float]:
    config = ObjectiveConfig.model_validate({"kind": kind, **settings})
    made: Tensor = objective(config).advantage(seen, config)
    return made.tolist()


def gradients(learner: Learner, batch: Batch) -> list[Tensor]:
    learner.backward(*learner.plans(batch), Clock())
    return [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=2e-5)


# ------------------------------------------------------------------------------- the learner


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 25, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_papers_however_the_batch_is_cut(
    kind: str, micro_batch_tokens: int
) -> None:
    learner = Learner(tiny_model(), config_of(kind, micro_batch_tokens), temperature=0.6)
    assert_close(gradients(learner, Batch.of(groups(kind))), expected_gradients(kind, 0.6))


def _rank(rank: int, directory: str) -> None:
    """Leaves the gradients of two ranks, by kind."""
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for kind in KINDS:
        config = config_of(kind, 25, parallel="ddp")
        learner = Learner(tiny_model(), config, temperature=0.6)
        batch = Batch.of(groups(kind))
        learner.backward(learner.plans(batch)[rank], Clock())
        learner.student.sum_gradients()
        found = [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]
        torch.save(found, f"{directory}/{kind} {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradient_is_the_papers_on_two_ranks(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for kind in KINDS:
        expected = expected_gradients(kind, 0.6)
        for rank in (0, 1):
            assert_close(torch.load(tmp_path / f"{kind} {rank}.pt"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_excludes_a_token_breaks_no_weight(kind: str) -> None:
    """−inf is refused when a group is read; the most that float32 holds passes."""
    data = groups(kind)
    for group in data:
        for values in group.teacher_logprobs.values():
            values[:1] = -3e38
    learner = Learner(tiny_model(), config_of(kind), temperature=1.0)
    learner.step(*learner.plans(Batch.of(data)))
    assert all(bool(torch.isfinite(p).all()) for p in learner.model.parameters())


# ------------------------------------------------------------- what a trajectory's tokens are


@hypothesis.settings(deadline=None)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_sums_and_ranks_stay_within_a_trajectory(rows: list[list[int]]) -> None:
    seen = tokens(*map(len, rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    moved = [torch.full((len(rows[i]),), i) for i in order]  # as a micro-batch has them
    seen = Tokens(**{**{f: getattr(seen, f) for f in Tokens.__slots__},
                     "trajectory": torch.cat(moved)})  # fmt: skip
    values = torch.tensor([float(v) for i in order for v in rows[i]])
    expected: dict[str, list[float]] = {"position": [], "length": [], "total": [], "before": []}
    ranks: list[int] = []
    for row in (rows[i] for i in order):
        expected["position"] += range(len(row))
        expected["length"] += [len(row)] * len(row)
        expected["total"] += [sum(row)] * len(row)
        expected["before"] += [sum(row[:t]) for t in range(len(row))]
        by_value = sorted(range(len(row)), key=lambda t: (row[t], t))
        ranks += [by_value.index(t) for t in range(len(row))]
    assert seen.position.tolist() == expected["position"]
    assert seen.length.tolist() == expected["length"]
    assert seen.total(values).tolist() == expected["total"]
    assert seen.before(values).tolist() == expected["before"]
    assert seen.rank(values).tolist() == ranks


def test_of_no_tokens_there_is_nothing() -> None:
    seen = tokens(0, 0)
    for settings, _ in KINDS.values():
        assert advantage(seen, **settings) == []
    assert seen.rank(NOTHING).tolist() == seen.before(NOTHING).tolist() == []


# --------------------------------------------------------------------- each kind, by hand


def test_power_opd_by_hand() -> None:
    """π_T = 1/4, 0 and 1, π_S = 1/2, 1/2 and 1: the square is bounded where the log is not."""
    seen = tokens(3, teacher=[0.25, 0.0, 1.0], student=[0.5, 0.5, 1.0])
    seen = tokens(3, teacher=seen.teacher.log(), student=seen.student.log())
    assert advantage(seen, "power_opd", alpha=2) == pytest.approx([-3 / 16, -1 / 4, 0])


def test_power_opd_tends_to_the_log_ratio() -> None:
    seen = tokens(2, teacher=[-0.5, -4.0], student=[-1.5, -1.0])
    small = advantage(seen, "power_opd", alpha=1e-3)
    assert [a / 1e-3 for a in small] == pytest.approx([1.0, -3.0], rel=1e-2)


def test_iw_opd_is_that_of_trl() -> None:
    """What `IWOPDTrainer._compute_iw_opd_loss` of TRL 1.16.0 makes of these log-probs with a gamma
    of 0.5: its loss's gradient in each token's log-prob, times minus the number of tokens."""
    seen = tokens(
        4, 1,
        teacher=[-0.5, -2.0, -0.1, -3.0, -1.5],
        behaviour=[-1.0, -0.75, -0.25, -0.5, -0.5],
    )  # fmt: skip
    assert advantage(seen, "iw_opd") == pytest.approx(
        [0.75, -1.8039773, 0.1951705, -3.2102273, -1.5]
    )


def test_iw_opd_where_teacher_and_student_agree_is_nothing() -> None:
    assert advantage(tokens(3), "iw_opd") == [0, 0, 0]


def test_sg_opd_by_hand() -> None:
    """A correct trajectory, an incorrect one: each is encouraged once and discouraged once."""
    ratio = [1.0, -2.0, 1.0, -2.0]
    correct = [True, True, False, False]
    seen = tokens(2, 2, teacher=ratio, correct=correct, incorrect=[not c for c in correct])
    assert advantage(seen, "sg_opd") == pytest.approx([1.8, -2.0, 1.0, -3.6])
    assert advantage(seen, "sg_opd", agree=1, disagree=0) == pytest.approx([1, 0, 0, -2])


def test_vopd_averages_nothing_over_the_students_next_token() -> None:
    """Whatever token is sampled: Σ_v π_S(v) A(v) = 0 where k is the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, generator=generator).log_softmax(0) for _ in range(2))
    rows = {"student_top": student.expand(6, 6), "teacher_top": teacher.expand(6, 6)}
    made = advantage(tokens(6, student=student, teacher=teacher, **rows), "vopd")
    assert sum(p * a for p, a in zip(student.exp().tolist(), made, strict=True)) == (
        pytest.approx(0, abs=1e-6)
    )


def test_ta_opd_keeps_where_the_teacher_moves_mass_within_what_the_student_considers() -> None:
    """Of the student's two most likely tokens, at three places: agreement; the teacher prefers the
    second; the teacher wants what is not among them. Ratios of −1 all, so what is kept shows."""
    student = torch.tensor([[0.7, 0.3 - 1e-4]] * 3).log()
    mine = torch.tensor([[0.7, 0.3 - 1e-4], [0.1, 0.9 - 1e-4], [0.05, 0.05]]).log()
    seen = tokens(3, teacher=[-1.0] * 3, student_top=student, teacher_top=mine)
    assert advantage(seen, "ta_opd") == [0, -1, 0]


def test_opsa_presses_the_least_likely_tokens_of_each_trajectory() -> None:
    seen = tokens(4, 1, student=[-1, -3, -2, -4, -0.1], reinforce=[2.0] * 4 + [1.0])
    assert advantage(seen, "opsa", fraction=0.5) == [0, -1, 0, -1, -0.5]


@pytest.mark.parametrize(
    ("of_correct", "margin", "reliable"),
    [(1.0, 0.0, True), (2.0, 0.0, False), (3.0, 0.0, False), (1.0, 1.5, False)],
)
def test_tgopd_asks_a_teacher_that_can_tell(
    of_correct: float, margin: float, reliable: bool
) -> None:
    """Two correct answers and an incorrect one at 2 nats a token; then one group all correct."""
    stats = SequenceStats(
        group=torch.tensor([0, 0, 0, 1, 1]),
        correct=torch.tensor([True, True, False, True, True]),
        incorrect=torch.tensor([False, False, True, False, False]),
        student_nll=torch.zeros(5),
        teacher_nll=torch.tensor([of_correct, of_correct, 2.0, 0.0, 0.0]),
    )
    made = tgopd(stats, TgopdConfig(margin=margin))
    third = 1 / 3
    if reliable:
        assert made.distil.tolist() == pytest.approx([third] * 3 + [0, 0])
        assert not made.reinforce.any()
    else:
        assert made.reinforce.tolist() == pytest.approx([third / 3, third / 3, -2 / 9, 0, 0])
        assert not made.distil.any()


def test_scope_from_the_first_error_on() -> None:
    """Of a nat or more. The second trajectory has no error, the third is correct."""
    seen = tokens(
        4, 2, 2,
        teacher=[0.5, -0.9, -2.0, 0.5, -0.5, -0.5, 0.0, 0.0],
        distil=[2.0] * 4 + [1.0] * 2 + [0.0] * 2,
        reinforce=[0.0] * 6 + [1.0] * 2,
    )  # fmt: skip
    assert advantage(seen, "scope", first_error=1.0) == [0, 0, -4, 1, 0, 0, 1, 1]
    config = ScopeConfig(first_error=1.0, divergence="jsd")
    weights = objective(config).divergence(seen, config)
    assert weights is not None
    assert weights.tolist() == [0, 0, 2, 2, 0, 0, 0, 0]
    assert objective(config).advantage(seen, config).tolist() == [0] * 6 + [1, 1]


def test_eopd_adds_the_forward_kl_where_the_teacher_is_uncertain() -> None:
    """Of two tokens and the tail: entropies of 0.69, of ln 2 + a half of it, and of a sure one."""
    tops = torch.tensor([[0.5, 0.5 - 1e-6], [0.5, 0.25], [0.999, 0.0005]]).log()
    seen = tokens(3, teacher=[-1.0, -1.0, 0.5], teacher_top=tops, student_top=tops)
    config = EopdConfig(top_k=2)
    assert seen.teacher_entropy[:2].tolist() == pytest.approx(
        [math.log(2), 1.5 * math.log(2)], abs=1e-4
    )
    weights = objective(config).divergence(seen, config)
    assert weights is not None
    assert weights.tolist() == [0, 1, 0]
    assert objective(config).advantage(seen, config).tolist() == [-1, -1, 0.5]
    seen = replace(seen, entropy=torch.tensor([0.8 + math.log(3), 0.7, 0.8]))  # the vocabulary's
    assert objective(config).divergence(seen, config).tolist() == [1, 0, 0]  # type: ignore[union-attr]
    gated = objective(config).divergence(seen, EopdConfig(top_k=2, entropy_width=1.0))
    assert gated is not None
    assert gated.tolist() == pytest.approx([3 / 4, 0.475021, 1 / 2])


def test_a_place_where_the_teacher_is_asked_about_two_of_the_students_tokens_by_hand() -> None:
    """The student gives them 0.6 and 0.3 and all others 0.1, the teacher 0.2, 0.2 and 0.6. vOPD
    adds KL(π_S ‖ π_T) to the log-ratio of the sampled token, the first."""
    tops = [torch.tensor([row]).log() for row in ([0.6, 0.3], [0.2, 0.2])]
    seen = tokens(1, student=[math.log(0.6)], teacher=[math.log(0.2)], student_top=tops[0],
                  teacher_top=tops[1])  # fmt: skip
    kl = 0.6 * math.log(3) + 0.3 * math.log(1.5) + 0.1 * math.log(1 / 6)
    assert advantage(seen, "vopd", top_k=2) == pytest.approx([-math.log(3) + kl], abs=1e-6)


def test_srpo_weighs_tokens_by_how_sure_the_teacher_is_and_keeps_their_sum() -> None:
    """Entropies of 0 and ln 2 with β = 1: weights of 1 and 1/2, over their mean."""
    tops = torch.tensor([[1 - 1e-7, 1e-9], [0.5, 0.5 - 1e-7], [0.5, 0.5 - 1e-7]]).log()
    seen = tokens(2, 1, teacher_top=tops, student_top=tops)
    config = SrpoConfig(top_k=2)
    weights = objective(config).divergence(seen, config)
    assert weights is not None
    assert weights.tolist() == pytest.approx([4 / 3, 2 / 3, 1], abs=1e-3)


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_hundred_steps_of_reverse_kl_over_two_tokens_keep_the_teachers_mass(whose: str) -> None:
    """A whole model: a teacher that is almost sure of one token at each place, `top_k: 2`."""
    data = scored_group(["incorrect"], lengths=[12])
    config = TrainerConfig(
        objective=ObjectiveConfig.model_validate(
            {"kind": "opd", "divergence": "reverse_kl", "top_k": 2, "top_k_of": whose}
        ),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    learner = Learner(tiny_model(), config, temperature=1.0)
    prompt = data.prompt.token_ids.tolist()
    whole = [[*prompt, *data.rollout.trajectories[0].token_ids.tolist()]]

    def two_of_the_student() -> np.ndarray[Any, Any]:
        (now,) = packed.score_top(learner.model, whole, [len(prompt)], 2)
        return now.top_ids.numpy().astype(np.int32)

    wanted = two_of_the_student()[:, ::-1]  # the teacher is sure of the student's second
    theirs = np.full((12, VOCAB), 0.0005 / (VOCAB - 2))
    np.put_along_axis(theirs, wanted, [[0.998, 0.0015]], 1)
    steps = []
    for _ in range(100):
        ids = np.ascontiguousarray(wanted if whose == "teacher" else two_of_the_student())
        values = np.log(np.take_along_axis(theirs, ids, 1)).astype(np.float32)
        batch = Batch.of([replace(data, teacher_top={0: TopTokens(ids, values)})])
        steps.append(learner.step(*learner.plans(batch)))
    assert all(math.isfinite(step["actor/grad_norm"]) for step in steps)
    assert steps[-1]["kl/student_teacher"] < 0.01 * steps[0]["kl/student_teacher"]
    (now,) = packed.score_top(learner.model, whole, [len(prompt)], 2)
    assert now.top_ids[:, 0].tolist() == wanted[:, 0].tolist()
    assert now.top_logprobs[:, 0].exp().min() > 0.97  # the teacher's is 0.998
    assert now.top_logprobs.exp().sum(1).min() > 0.98  # and the mass of both
