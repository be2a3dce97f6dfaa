"""Divergences over the top k, against torch's own over the whole vocabulary."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.divergence import divergence
from trainer.objectives.config import Divergence


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    """[5, 40] logits of a student that is trained and log-probs of a teacher."""
    torch.manual_seed(seed)
    return (3 * torch.randn(5, 40)).requires_grad_(), (3 * torch.randn(5, 40)).log_softmax(1)


def exact(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind == "forward_kl":
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    if kind == "reverse_kl":
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(1)
    mixture = ((student.exp() + teacher.exp()) / 2).log()
    return (exact(mixture, student, "forward_kl") + exact(mixture, teacher, "forward_kl")) / 2


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_over_the_whole_vocabulary_it_is_exact_and_so_is_its_gradient(kind: Divergence) -> None:
    logits, teacher = distributions(0)
    expected = exact(logits.log_softmax(1), teacher, kind)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    order = torch.argsort(teacher, dim=1, descending=True)
    got = divergence(logits.log_softmax(1).gather(1, order), teacher.gather(1, order), kind)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_it_grows_with_k_towards_the_exact_value(kind: Divergence) -> None:
    """Putting outcomes together can only lose information (the data-processing inequality)."""
    logits, teacher = distributions(1)
    student = logits.detach().log_softmax(1)
    order = torch.argsort(teacher, dim=1, descending=True)
    values = [
        divergence(student.gather(1, order[:, :k]), teacher.gather(1, order[:, :k]), kind)
        for k in (1, 4, 16, 40)
    ]
    for fewer, more in pairwise(values):
        assert (more - fewer).min() > -1e-5


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_a_teacher_that_is_all_but_certain_is_learned_from(kind: Divergence, gap: float) -> None:
    """100 steps over its two most likely tokens: no gradient breaks, and its mass is taken over."""
    logits, _ = distributions(2)
    rows = torch.arange(len(logits))
    certain = torch.zeros_like(logits).index_put((rows, rows), torch.tensor(gap))
    teacher, tokens = certain.log_softmax(1).topk(2)
    optimizer = torch.optim.AdamW([logits], lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        divergence(logits.log_softmax(1).gather(1, tokens), teacher, kind).sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        optimizer.step()
    assert (logits.softmax(1)[rows, rows] > 0.99).all()


def test_two_outcomes_by_hand() -> None:
    student, teacher = torch.tensor([[math.log(0.25)]]), torch.tensor([[math.log(0.5)]])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(student, teacher, "forward_kl").item() == pytest.approx(forward, abs=1e-6)
    assert divergence(student, teacher, "reverse_kl").item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_a_sure_teacher_and_a_student_that_disagrees_stay_finite(kind: Divergence) -> None:
    student = torch.tensor([[-40.0, -50.0]], requires_grad=True)
    value = divergence(student, torch.tensor([[0.0, -60.0]]), kind)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_a_token_that_the_student_lacks_is_part_of_the_tail(kind: Divergence) -> None:
    student = torch.tensor([[0.3, 0.2, 0.4]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.2, 0.0]]).log()
    value = divergence(student, teacher, kind)
    alone = divergence(student[:, :2], teacher[:, :2], kind)
    assert value.item() == pytest.approx(alone.item(), abs=1e-6)
    got, wanted = (torch.autograd.grad(v.sum(), student)[0] for v in (value, alone))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("kind", "sure"), [("forward_kl", 30.0), ("reverse_kl", 14.0)])
@pytest.mark.parametrize("teacher_tail", [0.0, 1e-9, 0.1])
def test_a_hundred_steps_towards_two_tokens_end_at_the_teachers_mass(
    kind: Divergence, sure: float, teacher_tail: float
) -> None:
    """From a student that is sure of one of the two: at 30 it has no tail that float32 can see.
    Reverse KL weighs a token by the student's own probability, and cannot come back from there."""
    teacher = torch.tensor([[(1 - teacher_tail) * 0.999, (1 - teacher_tail) * 0.001]]).log()
    logits = torch.zeros(1, 40)
    logits[0, 0] = sure
    logits.requires_grad_()
    adam = torch.optim.Adam([logits], lr=1.0)
    for _ in range(100):
        adam.zero_grad()
        divergence(logits.log_softmax(1)[:, :2], teacher, kind).sum().backward()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()
        adam.step()
    reached = logits.detach().softmax(1)
    assert reached[0, 0].item() == pytest.approx(teacher[0, 0].exp().item(), abs=0.02)
    assert reached[0, 2:].sum().item() == pytest.approx(teacher_tail, abs=0.02)
