"""One run whose teacher is the student itself, which reads more than the student does, on real Ray,
Serve and Redis, as a user starts it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from services.models import load_model, load_tokenizer
from tests.deploy.conftest import ROOT, SCOPE, scope, short_run
from tests.deploy.test_two_teachers import GROUPS, MODELS, collect, logprobs
from tests.waiting import DEADLINE_S

STEPS = 3


@pytest.mark.slow
def test_a_student_teaches_itself_what_it_was_shown(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [
            SCOPE, *short_run(tmp_path), f"trainer.max_steps={STEPS}", "evaluation=null",
            "trainer.objective.kind=opd", "trainer.checkpoint.every_steps=100",
            "teacher.model=examples/arithmetic/student", "teacher.weights=student",
            "teacher.context='{reference};{prompt}'",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    found = collect(run, tmp_path, STEPS * GROUPS)
    output, _ = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0, output
    assert sorted(found) == list(range(STEPS * GROUPS))
    tokenizer = load_tokenizer(str(MODELS["student"]))
    first = load_model(str(MODELS["student"]))
    versions = {group.teacher_version for group in found.values()}
    assert versions <= {*range(STEPS + 1)}
    assert max(versions - {None}, default=0) > 0  # it followed
    for group in found.values():
        shown = tokenizer.decode(group.prompt.token_ids.tolist())
        before = np.array(tokenizer(f"{group.prompt.reference};{shown}")["input_ids"], np.int32)
        np.testing.assert_array_equal(group.prompt.teacher_ids, before)
        for place, scores in group.teacher_logprobs.items():
            completion = group.rollout.trajectories[place].token_ids
            table = logprobs(first, before, completion).numpy()
            expected = table[np.arange(len(completion)), completion]
            same = np.allclose(scores, expected, atol=1e-4)
            assert same == (group.teacher_version == 0)
    status = json.loads(scope("status", tmp_path / "demo", "--json").stdout)
    assert (status["trained"], status["dead"], status["in_flight"]) == (STEPS * GROUPS, 0, 0)
