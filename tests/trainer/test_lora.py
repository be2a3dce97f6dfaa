"""Adapters, against peft's own model, gradients, merge and files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from services.models import write_model
from tests.builders import scored_group, tiny_model, tiny_tokenizer
from trainer.batch import Batch
from trainer.config import LoraConfig, OptimizerConfig, TrainerConfig
from trainer.learner import Clock, Learner
from trainer.lora import write_adapters

LORA = LoraConfig(rank=4, alpha=12)
IDS = torch.tensor([[2, 3, 4, 5, 6]])


def learner(lora: LoraConfig = LORA) -> Learner:
    """One whose adapters are past their start, where they change nothing."""
    torch.manual_seed(3)
    made = Learner(
        tiny_model(),
        TrainerConfig(lora=lora, optimizer=OptimizerConfig(lr=1e-2)),
        temperature=1.0,
    )
    with torch.no_grad():
        for p in made.student.trained.values():
            p.normal_(std=0.2)
    return made


def peft_model(ours: Learner) -> peft.PeftModel:
    """peft's own model with our adapters."""
    base: Qwen3ForCausalLM = tiny_model()
    made = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = dict(made.named_parameters())
    with torch.no_grad():
        for name, p in ours.student.trained.items():
            theirs[f"base_model.model.{name}"].copy_(p)
    return made


def batch() -> Batch:
    return Batch.of([scored_group(["correct", "incorrect"], lengths=[4, 6])])


def test_adapters_begin_as_the_model_itself() -> None:
    made = Learner(tiny_model(), TrainerConfig(lora=LORA), temperature=1.0)
    plain = tiny_model()
    for name, tensor in made.student.tensors():
        assert torch.equal(tensor, plain.get_parameter(name)), name


def test_gradients_are_pefts() -> None:
    ours = learner()
    data = batch()
    ours.backward(*ours.plans(data), Clock())
    theirs = peft_model(ours)
    (group,) = data.groups
    total: Tensor = torch.zeros(())
    for index, t in enumerate(group.rollout.trajectories):  # one of each path: weights are 1
        ids = torch.tensor([*group.prompt.token_ids.tolist(), *t.token_ids.tolist()])
        logits = theirs(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(t.token_ids)[:, None].long())[:, 0]
        ratio = (chosen - torch.tensor(t.logprobs)).exp()
        ratio = ratio * (2.0 / ratio.detach()).clamp(max=1.0)
        pull = 1.0 if index == 0 else torch.tensor(group.teacher_logprobs[1]) - chosen.detach()
        total = total - (ratio * pull).sum()
    total.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert expected.keys() == {f"base_model.model.{name}" for name in ours.student.trained}
    for name, p in ours.student.trained.items():
        torch.testing.assert_close(
            p.grad, expected[f"base_model.model.{name}"], rtol=1e-3, atol=2e-5
        )


def test_what_is_published_is_pefts_merge_and_training_is_not_disturbed() -> None:
    ours = learner()
    plan = ours.plans(batch())[0]
    before = ours.step(plan)
    merged = peft_model(ours).merge_and_unload()
    weights = ours.weights()
    assert weights is not None
    published = dict(weights.tensors())
    assert published.keys() == dict(merged.named_parameters()).keys()
    for name, p in merged.named_parameters():
        torch.testing.assert_close(published[name], p.detach(), rtol=1e-5, atol=1e-6)
    logits = merged(torch.tensor([weights.probe_ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(weights.probe_ids)[1:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(weights.probe_logprobs), expected.detach(), rtol=1e-4, atol=1e-4
    )
    again = learner()
    assert again.step(plan) == before
    assert again.step(plan) == ours.step(plan)  # which has published in between


def test_both_exports_load_and_agree(tmp_path: Path) -> None:
    ours = learner()
    config = ours.model.config
    write_model(tmp_path / "base", config, dict(tiny_model().named_parameters()), tiny_tokenizer())
    write_model(tmp_path / "merged", config, dict(ours.student.tensors()), tiny_tokenizer())
    base = str(tmp_path / "base")
    write_adapters(tmp_path / "adapter", ours.student.adapters(), LORA, base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        logits, plain = merged(IDS).logits, tiny_model()(IDS).logits
        torch.testing.assert_close(logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert float((logits - plain).abs().max()) > 0.1


def test_only_the_named_layers_are_adapted() -> None:
    made = learner(LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in made.student.trained}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_the_output_and_the_embedding_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=f"must not name {target}"):
        learner(LoraConfig(targets=("q_proj", target)))
