"""The step, against an independent derivation with plain transformers and autograd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from services import packed
from services.trajectory import LogProbs, ScoredGroup, TokenIds, TopTokens
from services.weights import check_probe, copy_weights
from tests.builders import VOCAB, scored_group, tiny_model
from trainer.batch import Batch, check
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Clock, Learner, Metrics
from trainer.objectives.config import ObjectiveConfig, ScopeConfig


def groups() -> list[ScoredGroup]:
    """Every case at once: mixed, all correct, all wrong, unknown, and skewed lengths."""
    return [
        scored_group(
            ["correct", "correct", "incorrect", "incorrect"],
            lengths=[4, 9, 3, 12],
            teacher_nll=[0, 0, 1.0, 2.5],
        ),
        scored_group(["correct", "correct", "correct"], order=1, lengths=[7, 2, 5]),
        scored_group(["incorrect", "unknown"], order=2, lengths=[6, 3], teacher_nll=[0.7, 0]),
    ]


def settings(micro_batch_tokens: int = 10_000, **objective: object) -> TrainerConfig:
    return TrainerConfig(
        objective=ObjectiveConfig.model_validate(objective),
        optimizer=OptimizerConfig(lr=1e-3),
        micro_batch_tokens=micro_batch_tokens,
    )


def with_tools(group: ScoredGroup) -> ScoredGroup:
    """The same group, in which the world wrote every third token."""
    own = [np.arange(len(t.token_ids)) % 3 != 1 for t in group.rollout.trajectories]
    trajectories = tuple(
        replace(t, mask=mask, logprobs=np.where(mask, t.logprobs, 0).astype(np.float32))
        for t, mask in zip(group.rollout.trajectories, own, strict=True)
    )
    rollout = replace(group.rollout, trajectories=trajectories)
    return replace(group, verified=replace(group.verified, rollout=rollout))


def with_chunks(group: ScoredGroup) -> ScoredGroup:
    """The same group under a teacher with another tokenizer: chunks of one to three tokens, whose
    sums stand with their first, and nothing said of the last tokens of the first trajectory."""
    scores, chunks = {}, {}
    for index, logprobs in group.teacher_logprobs.items():
        dice = np.random.default_rng(index)
        starts = np.cumsum(dice.integers(1, 4, len(logprobs))) - 1
        first = np.isin(np.arange(len(logprobs)), [0, *starts])
        chunk = np.cumsum(first, dtype=np.int32) - 1
        sums = np.where(first, np.bincount(chunk, logprobs)[chunk], 0.0).astype(np.float32)
        if index == 2:
            sums[chunk == chunk[-1]], chunk[chunk == chunk[-1]] = 0.0, -1
        scores[index], chunks[index] = sums, chunk
    return replace(group, teacher_logprobs=scores, chunks=chunks)


def gradients(
    config: TrainerConfig, temperature: float = 1.0, made: list[ScoredGroup] | None = None
) -> list[Tensor]:
    learner = Learner(tiny_model(), config, temperature=temperature)
    batch = Batch.of(made or groups())
    learner.backward(*learner.plans(batch), Clock())
    return [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]


def one_step(config: TrainerConfig, made: list[ScoredGroup]) -> Metrics:
    learner = Learner(tiny_model(), config, temperature=0.6)
    return learner.step(*learner.plans(Batch.of(made)))


def expected_gradients(
    model: Qwen3ForCausalLM,
    config: ScopeConfig,
    temperature: float,
    made: list[ScoredGroup] | None = None,
) -> list[Tensor]:
    """The paper's loss, one sequence at a time, in the words of the equations; over the tokens
    that the student sampled."""
    total = torch.zeros(())
    batch = made or groups()
    for group in batch:
        rows, owns = [], {}
        for index, t in enumerate(group.rollout.trajectories):
            ids = torch.tensor([*group.prompt.token_ids.tolist(), *t.token_ids.tolist()])
            logits = model(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1]
            chosen = torch.tensor(t.token_ids)[:, None].long()
            at_one = logits.log_softmax(-1).gather(1, chosen)[:, 0]
            sampled = (logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0]
            own = torch.tensor(t.sampled)
            if index in group.chunks:
                own &= torch.tensor(group.chunks[index] >= 0)
            at_one, sampled = at_one[own], sampled[own]
            ratio = (sampled - torch.tensor(t.logprobs)[own]).exp()
            capped = ratio * (config.is_ratio_cap / ratio.detach()).clamp(max=1.0)
            rows.append((index, at_one, capped))
            if group.verified.verdicts[index].outcome == "incorrect":
                owns[index] = own
        correct = [r for r in rows if group.verified.verdicts[r[0]].outcome == "correct"]
        wrong = [r for r in rows if group.verified.verdicts[r[0]].outcome == "incorrect"]
        ppl = [math.exp(-float(lp.detach().mean())) ** (1 / config.tau) for _, lp, _ in correct]
        for (_, _, ratio), p in zip(correct, ppl, strict=True):
            total = total + p / sum(ppl) * -ratio.sum()
        teacher = [torch.tensor(group.teacher_logprobs[i])[own] for i, own in owns.items()]
        inverse = [math.exp(-float(lp.mean())) ** (-1 / config.tau) for lp in teacher]
        for (index, lp, ratio), t_lp, p in zip(wrong, teacher, inverse, strict=True):
            gap = lp.detach() - t_lp
            if index in group.chunks:
                labels = group.chunks[index][group.chunks[index] >= 0].tolist()
                gap = torch.stack([gap[[c == own for c in labels]].sum() for own in labels])
            total = total + p / sum(inverse) * (ratio * gap).sum()
    model.zero_grad()
    (total / len(batch)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradient_is_the_papers(temperature: float, tau: float) -> None:
    expected = expected_gradients(tiny_model(), ScopeConfig(tau=tau), temperature)
    assert_close(gradients(settings(tau=tau), temperature), expected)


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 25, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_the_world_wrote_is_read_and_not_learned(
    temperature: float, micro_batch_tokens: int
) -> None:
    """Against the paper's loss over sampled tokens alone: perplexities, ρ, weights and sums."""
    made = [with_tools(group) for group in groups()]
    expected = expected_gradients(tiny_model(), ScopeConfig(), temperature, made)
    assert_close(gradients(settings(micro_batch_tokens), temperature, made), expected)
    everything = gradients(settings(), temperature)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, everything, strict=True))


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 25, 1])
def test_a_chunk_s_log_ratio_is_that_of_each_of_its_tokens(micro_batch_tokens: int) -> None:
    """Against the paper's loss whose log-ratios are sums over chunks, and whose perplexities are
    the teacher's sums over the student's tokens, where the teacher has a say."""
    made = [with_chunks(group) for group in groups()]
    for group in made:
        check(group, "incorrect", vocabulary=VOCAB)
    expected = expected_gradients(tiny_model(), ScopeConfig(), 0.6, made)
    assert_close(gradients(settings(micro_batch_tokens), 0.6, made), expected)
    by_token = gradients(settings(), 0.6)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, by_token, strict=True))


def test_chunks_of_one_token_change_nothing() -> None:
    def alone(scores: Mapping[int, LogProbs]) -> dict[int, TokenIds]:
        return {index: np.arange(len(of), dtype=np.int32) for index, of in scores.items()}

    made = [replace(group, chunks=alone(group.teacher_logprobs)) for group in groups()]
    expected = gradients(settings(), 0.6)
    for got, wanted in zip(gradients(settings(), 0.6, made), expected, strict=True):
        assert torch.equal(got, wanted)


def test_an_answer_of_which_the_teacher_says_nothing_enters_no_path() -> None:
    """The others weigh as if it had not been sampled, in a group that is no smaller."""
    group = with_chunks(groups()[0])
    scores = {**group.teacher_logprobs, 3: np.zeros(12, np.float32)}
    chunks = {**group.chunks, 3: np.full(12, -1, np.int32)}
    refused = replace(group, teacher_logprobs=scores, chunks=chunks)
    check(refused, "incorrect", vocabulary=VOCAB)
    verdicts = (
        *group.verified.verdicts[:3],
        replace(group.verified.verdicts[3], outcome="unknown"),
    )
    unknown = replace(group, verified=replace(group.verified, verdicts=verdicts))
    assert_close(gradients(settings(), 0.6, [refused]), gradients(settings(), 0.6, [unknown]))


def test_micro_batches_do_not_change_the_gradient() -> None:
    whole = gradients(settings())
    one_by_one = gradients(settings(micro_batch_tokens=1))
    some = gradients(settings(micro_batch_tokens=25))
    assert_close(one_by_one, whole)
    assert_close(some, whole)


def test_perplexities_come_from_the_forward_that_is_trained_on_where_a_group_has_room() -> None:
    """The first group has two correct ones; in a micro-batch of 40 tokens it is whole."""
    learner = Learner(tiny_model(), settings(micro_batch_tokens=40), temperature=0.6)
    batch = Batch.of(groups())
    (plan,) = learner.plans(batch)
    assert plan.together.tolist() == [True] * 4 + [True] * 3 + [False] * 2
    assert plan.scored == []
    _, stats, _ = learner.backward(plan, Clock())
    apart = Learner(tiny_model(), settings(micro_batch_tokens=1), temperature=0.6)
    (alone,) = apart.plans(batch)
    assert not alone.together.any()
    assert sorted(alone.scored) == [[[i]] for i in (0, 1, 4, 5, 6)]
    _, expected, _ = apart.backward(alone, Clock())
    torch.testing.assert_close(stats.student_nll, expected.student_nll)
    assert_close(
        [p.grad for p in learner.model.parameters() if p.grad is not None],
        [p.grad for p in apart.model.parameters() if p.grad is not None],
    )


@hypothesis.settings(max_examples=25, deadline=None)
@given(st.data())
def test_sharing_a_prompt_changes_no_gradient_and_no_perplexity(data: st.DataObject) -> None:
    """Against learners that compute each prompt as often as it has answers, which are the
    paper's. Groups of any size are whole, cut or spread as the budget has it."""
    outcome = st.sampled_from(["correct", "incorrect", "unknown"])
    made = []
    for order in range(data.draw(st.integers(1, 3))):
        outcomes = data.draw(st.lists(outcome, min_size=1, max_size=5))
        sizes = st.lists(st.integers(0, 20), min_size=len(outcomes), max_size=len(outcomes))
        length = data.draw(st.integers(1, 40))
        made.append(
            scored_group(
                outcomes, order=order, lengths=data.draw(sizes), prompt_length=length,
                score=("correct", "incorrect"),
            )
        )  # fmt: skip
    budget = data.draw(st.integers(1, 60) | st.just(10_000))
    kind = data.draw(st.sampled_from(["scope", "opd", "rft"]))
    found = []
    for share in (True, False):
        config = settings(budget, kind=kind)
        learner = Learner(tiny_model(), config, temperature=0.6)
        learner._share = share
        sums, stats, _ = learner.backward(*learner.plans(Batch.of(made)), Clock())
        gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
        found.append((gradients, sums.reduced(), stats.student_nll))
    assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-3, atol=1e-4)


def test_each_prompt_is_computed_once_a_micro_batch() -> None:
    group = scored_group(["correct"] * 3, lengths=[7, 2, 5], prompt_length=20)
    learner = Learner(tiny_model(), settings(kind="rft"), temperature=1.0)
    seen, _ = forward_tokens(learner, Batch.of([group]))
    assert seen == [20 + 6 + 1 + 4]  # the last token of an answer predicts nothing


def top_groups(k: int) -> list[ScoredGroup]:
    """With the `k` most likely tokens of a teacher that is another random model."""
    teacher, made = tiny_model(seed=1), []
    for group in groups():
        top = {}
        for index in group.teacher_logprobs:
            table = _table(teacher, group, index, 1.0)
            best = table.detach().topk(k)
            top[index] = TopTokens(best.indices.numpy().astype(np.int32), best.values.numpy())
        made.append(dataclasses.replace(group, teacher_top=top))
    return made


def _table(model: PreTrainedModel, group: ScoredGroup, index: int, t: float) -> Tensor:
    """[T, V] log-probs at temperature `t` at each token of a completion."""
    trajectory = group.rollout.trajectories[index]
    ids = torch.tensor([*group.prompt.token_ids.tolist(), *trajectory.token_ids.tolist()])
    return (model(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1] / t).log_softmax(-1)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_divergence_over_the_whole_vocabulary_is_the_full_one(kind: str) -> None:
    """OPD with k the vocabulary, against KL by autograd; the sampling temperature changes
    nothing, as there is no ρ in it."""
    config = settings(kind="opd", divergence=kind, top_k=VOCAB)
    learner = Learner(tiny_model(), config, temperature=0.6)
    data = [scored_group(["correct", "incorrect"], lengths=[4, 6], score=("correct", "incorrect"))]
    teacher, model, total = tiny_model(seed=1), tiny_model(), torch.zeros(())
    top = {}
    for index in (0, 1):
        theirs, mine = (
            _table(m, data[0], index, 1.0) for m in (teacher.requires_grad_(False), model)
        )
        order = theirs.argsort(descending=True)
        top[index] = TopTokens(order.numpy().astype(np.int32), theirs.gather(1, order).numpy())
        pair = (theirs, mine) if kind == "forward_kl" else (mine, theirs)
        total = total + 0.5 * (pair[0].exp() * (pair[0] - pair[1])).sum()
    total.backward()
    learner.backward(
        *learner.plans(Batch.of([dataclasses.replace(data[0], teacher_top=top)])), Clock()
    )
    assert_close(
        [p.grad for p in learner.model.parameters() if p.grad is not None],
        [p.grad for p in model.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize("k", [2, 5])
def test_a_padded_row_that_wins_counts_to_the_tail_of_both(k: int) -> None:
    """A teacher with more rows than the student, whose likeliest token is one that the student
    lacks: the reverse KL is that over the tokens that both have and, as one, all others."""
    config = settings(kind="opd", divergence="reverse_kl", top_k=k)
    learner, model = Learner(tiny_model(), config, temperature=0.6), tiny_model()
    teacher = tiny_model(seed=1, vocab=VOCAB + 8, tied=False)
    with torch.no_grad():
        rows = teacher.get_output_embeddings().weight
        rows[VOCAB + 3] = 0
        hidden = teacher.model(torch.arange(VOCAB)[None]).last_hidden_state[0]
        rows[VOCAB + 3] = 3 * hidden.mean(0) / hidden.mean(0).norm()
    data, total = scored_group(["incorrect"], lengths=[6]), torch.zeros(())
    theirs, mine = _table(teacher, data, 0, 1.0).detach(), _table(model, data, 0, 1.0)
    best = theirs.topk(k)
    assert (best.indices[:, 0] == VOCAB + 3).float().mean() > 0.5  # it wins
    for ids, q, p in zip(best.indices.tolist(), theirs.exp(), mine.exp(), strict=True):
        shared = [token for token in ids if token < VOCAB]
        pairs = [(p[token], q[token]) for token in shared]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        total = total + sum(a * (a.log() - b.log()) for a, b in pairs if shared)
    total.backward()
    top = TopTokens(best.indices.numpy().astype(np.int32), best.values.numpy())
    learner.backward(
        *learner.plans(Batch.of([dataclasses.replace(data, teacher_top={0: top})])), Clock()
    )
    assert_close(
        [p.grad for p in learner.model.parameters() if p.grad is not None],
        [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()],
    )


def test_scope_with_a_divergence_makes_a_finite_step() -> None:
    """Correct trajectories, which nobody scored, share micro-batches with incorrect ones."""
    config = settings(divergence="jsd", top_k=4)
    metrics = one_step(config, top_groups(4))
    assert metrics["kl/student_teacher"] > 0
    assert all(math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_tokens_that_only_the_teacher_has_count_to_the_tail(kind: str) -> None:
    """As if the teacher had never named them: the tail is what the rest leaves."""
    config = settings(divergence=kind, top_k=8)
    named, nameless = top_groups(8), top_groups(6)
    for group in named:
        for top in group.teacher_top.values():
            top.ids[:, 6:] = [VOCAB + 39, VOCAB + 63]
    both = []
    for data in (named, nameless):
        learner = Learner(tiny_model(), config, temperature=0.6)
        for group in data:
            check(group, "none", vocabulary=VOCAB)
        learner.backward(*learner.plans(Batch.of(data)), Clock())
        both.append([p.grad for p in learner.model.parameters() if p.grad is not None])
    assert_close(*both)


def test_aggregation_by_tokens_divides_by_the_trained_tokens() -> None:
    by_group, by_token = gradients(settings()), gradients(settings(aggregation="token"))
    tokens = sum([4, 9, 3, 12, 7, 2, 5, 6])  # the unknown one's 3 are not trained
    assert_close([g * 3 / tokens for g in by_group], by_token)


def test_log_ratio_bound_limits_the_pull_of_one_token() -> None:
    free, bounded = gradients(settings()), gradients(settings(log_ratio_bound=1e-6))
    only_mle = gradients(settings(teacher_path_ppl_positive=False, log_ratio_bound=1e-9))
    assert_close(bounded, only_mle)
    assert max(float((f - b).abs().max()) for f, b in zip(free, bounded, strict=True)) > 1e-3


def test_ratio_cap_scales_a_stale_token_down_and_keeps_its_direction() -> None:
    model = tiny_model()
    group = scored_group(["correct"], lengths=[1])
    token = group.rollout.trajectories[0]
    ids = torch.tensor([[*group.prompt.token_ids.tolist(), *token.token_ids.tolist()]])
    current = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
    token.logprobs[:] = current.item() - math.log(8.0)  # ρ = 8, cap 2
    learner = Learner(model, settings(), temperature=1.0)
    metrics = learner.step(*learner.plans(Batch.of([group])))
    assert metrics["is_ratio/mean"] == pytest.approx(8.0, rel=1e-4)
    assert metrics["is_ratio/capped_fraction"] == 1.0
    assert metrics["loss/mle"] == pytest.approx(-2.0, rel=1e-4)


def test_what_the_teacher_sampled_is_trained_on_as_it_is() -> None:
    group = scored_group(["correct", "incorrect"], lengths=[4, 6])
    group.rollout.trajectories[0].logprobs[:] = -9.0  # of the teacher: no ρ is made of them
    metrics = one_step(settings(kind="kd"), [group])
    assert metrics["is_ratio/mean"] == 1.0
    assert metrics["is_ratio/capped_fraction"] == 0.0
    assert metrics["loss/mle"] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "outcomes", [["unknown", "unknown"], ["correct", "correct"], ["incorrect"], ["correct"]]
)
def test_every_mixture_of_verdicts_makes_a_finite_step(outcomes: list[str]) -> None:
    learner = Learner(tiny_model(), settings(), temperature=1.0)
    metrics = learner.step(*learner.plans(Batch.of([scored_group(outcomes)])))  # type: ignore[arg-type]
    assert all(bool(torch.isfinite(p).all()) for p in learner.model.parameters())
    assert math.isfinite(metrics["actor/grad_norm"])


def forward_tokens(learner: Learner, batch: Batch) -> tuple[list[int], list[Tensor]]:
    """Tokens of each forward of one backward, and the gradients that it leaves."""
    seen: list[int] = []
    embedding = learner.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    learner.backward(*learner.plans(batch), Clock())
    hook.remove()
    return seen, [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("kind", "computed"),
    [
        ("scope", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("opd", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("rft", [0, 1, 4, 5, 6]),  # the correct ones
        ("grpo", [0, 1, 2, 3]),  # of groups with a difference
    ],
)
def test_what_enters_no_loss_is_not_computed_and_changes_no_gradient(
    kind: str, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward, the whole batch having room; counted in the tokens that it is given, each
    prompt as often as it has answers."""
    monkeypatch.setattr("trainer.learner.can_share", lambda *_: False)
    batch = Batch.of(groups())
    made = Learner(tiny_model(), settings(kind=kind), temperature=0.6)
    seen, gradients = forward_tokens(made, batch)
    assert seen == [int(batch.tokens[computed].sum())]
    assert [list(plan.batch.sequences) for plan in made.plans(batch)] == [computed]
    monkeypatch.setattr(
        "trainer.step_plan.entering", lambda _, stats, config: torch.ones_like(stats.correct)
    )
    everything = Learner(tiny_model(), settings(kind=kind), temperature=0.6)
    seen, expected = forward_tokens(everything, batch)
    assert seen == [int(batch.tokens.sum())]
    assert_close(gradients, expected)


def test_a_step_that_nothing_enters_is_one_with_gradients_of_zero() -> None:
    """AdamW goes on by its momentum, as it does after a loss of 0."""
    batch = Batch.of([scored_group(["correct"] * 3), scored_group(["incorrect"] * 2, order=1)])
    learner = Learner(tiny_model(), settings(kind="grpo"), temperature=1.0)
    seen, gradients = forward_tokens(learner, batch)
    assert seen == [2]
    assert len(gradients) == len(list(learner.model.parameters()))
    assert all(not g.any() for g in gradients)
    metrics = learner.step(*learner.plans(batch))
    assert metrics["tokens/trained"] == 0
    assert metrics["loss/mle"] == 0
    assert math.isnan(metrics["is_ratio/mean"])  # of nothing


def test_unknown_trajectories_leave_no_trace_in_the_gradient() -> None:
    with_unknown = Batch.of([scored_group(["correct", "unknown", "incorrect"])])
    learner = Learner(tiny_model(), settings(), temperature=1.0)
    sums, _, _ = learner.backward(*learner.plans(with_unknown), Clock())
    assert sums.reduced()["tokens"] == 10  # tokens trained: two of the three trajectories of 5


def test_an_empty_completion_is_on_neither_path() -> None:
    batch = Batch.of([scored_group(["correct", "correct", "incorrect"], lengths=[0, 4, 0])])
    assert batch.correct.tolist() == [False, True, False]
    assert batch.incorrect.tolist() == [False, False, False]
    learner = Learner(tiny_model(), settings(), temperature=1.0)
    metrics = learner.step(*learner.plans(batch))
    assert math.isfinite(metrics["loss/mle"])


def test_weights_carry_the_probe_and_all_parameters() -> None:
    learner = Learner(tiny_model(), settings(), temperature=1.0)
    weights = learner.weights()
    assert weights is not None
    plain = tiny_model()
    for name, tensor in weights.tensors():
        torch.testing.assert_close(tensor, plain.get_parameter(name), rtol=0, atol=0)
    ids = torch.tensor([weights.probe_ids])
    expected = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(weights.probe_logprobs, expected.detach(), atol=1e-5)


def test_engines_in_bfloat16_are_sent_half_and_pass_the_probe_of_the_masters() -> None:
    learner = Learner(tiny_model(), settings(), temperature=1.0, engine_dtype="bfloat16")
    whole = Learner(tiny_model(), settings(), temperature=1.0).weights()
    weights = learner.weights()
    assert weights is not None and whole is not None
    vectors = sum(p.numel() for p in tiny_model().parameters() if p.ndim == 1)
    assert weights.buffer.nbytes == whole.buffer.nbytes // 2 + 2 * vectors
    assert weights.probe_logprobs == whole.probe_logprobs
    engine, cast = tiny_model(seed=1).bfloat16(), tiny_model().bfloat16()
    copy_weights(engine, weights)
    for name, parameter in engine.named_parameters():
        assert torch.equal(parameter, cast.get_parameter(name)), name
    (logprobs,) = packed.score(packed.prepare(engine), [weights.probe_ids], [1])
    assert check_probe(weights, logprobs, tolerance=0.05) > 0
    assert learner.model.dtype == torch.float32
