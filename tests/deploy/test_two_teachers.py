"""In one run, rows of two data sources are scored by two models: each group's scores against the
plain forward of the right one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from services.models import fingerprint, load_model, load_tokenizer
from services.trajectory import TokenIds
from tests.deploy.extended import FILTERED, MODELS, NAMED, PROMPTS, Extended

ROUTES = {"arithmetic": "default", "chains": "other"}


@torch.no_grad()
def logprobs(model: Any, prompt: TokenIds, completion: TokenIds) -> torch.Tensor:
    """[L, V] of the whole vocabulary in each place of the completion."""
    ids = torch.tensor([*prompt.tolist(), *completion.tolist()])
    table: torch.Tensor = model(ids[None]).logits[0].float().log_softmax(-1)
    return table[len(prompt) - 1 : -1]


@pytest.mark.slow
def test_rows_of_two_data_sources_are_scored_by_two_teachers(extended_run: Extended) -> None:
    assert "teacher other: loading" in extended_run.said
    assert sorted(extended_run.scored) == sorted({*range(PROMPTS)} - {*FILTERED})
    models = {"default": MODELS["teacher"], "other": MODELS["student"]}
    loaded = {name: load_model(str(path)) for name, path in models.items()}
    tokenizer = load_tokenizer(str(MODELS["teacher"]))
    prints = {name: fingerprint(str(path)).model for name, path in models.items()}
    for order, group in extended_run.scored.items():
        name = "other" if order == NAMED else ROUTES[group.prompt.data_source]
        assert (group.prompt.teacher, group.teacher) == (name, prints[name])
        assert len(group.teacher_logprobs) == len(group.rollout.trajectories)
        shown = tokenizer.decode(group.prompt.token_ids.tolist())
        assert shown == extended_run.asked[order]  # and no more
        read = f"{group.prompt.reference};{shown}" if name == "other" else shown
        before = np.array(tokenizer(read)["input_ids"], np.int32)
        for index, scores in group.teacher_logprobs.items():
            sampled, top = group.rollout.trajectories[index], group.teacher_top[index]
            assert sampled.top is not None and sampled.top.shape == (len(scores), 4)
            np.testing.assert_array_equal(top.ids, sampled.top)
            table = logprobs(loaded[name], before, sampled.token_ids)
            chosen = table.gather(1, torch.tensor(sampled.token_ids)[:, None].long())[:, 0]
            named = table.gather(1, torch.tensor(top.ids).long())
            spread = -(table.exp() * table).sum(1)
            np.testing.assert_allclose(scores, chosen, atol=1e-4)
            np.testing.assert_allclose(top.logprobs, named, atol=1e-4)
            np.testing.assert_allclose(group.teacher_entropy[index], spread, atol=1e-4)
