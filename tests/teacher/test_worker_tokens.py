"""The stage where a teacher reads another prompt, or has other tokens than the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models

from services.config import EngineConfig
from services.stage import Connection
from services.streams import Streams
from services.trajectory import (
    Trajectory,
    encode,
)
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import Target
from teacher.config import TeacherConfig
from teacher.ends import Ends
from teacher.pool import Servers
from teacher.retokenizer import Retokenizer
from teacher.scorer import build_scorer, model_card
from teacher.worker import TeacherSettings, TeacherWorker
from tests.builders import post, tiny_tokenizer
from tests.teacher.conftest import Reference
from tests.teacher.fakes import FaultyTeacher, listening
from tests.teacher.test_worker import COMPLETIONS, group, put, running, scored, working
from tests.waiting import DEADLINE_S, until
from trainer.batch import check


async def test_a_teacher_with_a_context_scores_the_answer_after_it(
    connection: Connection, streams: Streams, model_dir: Path, reference: Reference
) -> None:
    context = [5, 6, 7, 8]
    original = group()
    prompt = replace(original.prompt, teacher_context=np.array(context, np.int32))
    original = replace(original, rollout=replace(original.rollout, prompt=prompt))
    await put(streams, encode(original))
    config = TeacherConfig(model=str(model_dir), engine=EngineConfig(kind="transformers"))
    served = Teacher(model_card(config), build_scorer(config))
    app = build_app(
        [served], KeyRing(()), max_body_bytes=1 << 20,
        admission=Admission(max_requests=10, max_tokens=1000),
    )  # fmt: skip
    with listening(app) as url:
        async with working(connection, url) as worker:
            (result,) = await until(lambda: scored(streams))
            assert worker.details()["context_tokens"] == 2 * len(context)
    await served.scorer.close()
    assert result.prompt.token_ids.tolist() == [1, 2]
    for place in (1, 4):
        expected = reference.score(context, COMPLETIONS[place])
        np.testing.assert_allclose(result.teacher_logprobs[place], expected, atol=1e-5)


async def test_the_student_s_end_is_scored_as_the_teacher_s_own(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    await put(streams, encode(group()))
    servers = {"default": Servers([Target(faulty_url, "key")], DEADLINE_S)}
    settings = TeacherSettings("incorrect", 0, servers, {"default": Ends((53,), 3)})
    async with running(TeacherWorker(post(connection, "teacher"), settings)):
        (result,) = await until(lambda: scored(streams))
    (sent,) = [request["sequences"] for request in faulty.requests]
    assert [one["completion"] for one in sent] == [[21, 22], [51, 52, 3]]
    np.testing.assert_allclose(result.teacher_logprobs[4], [-0.51, -0.52, -0.03], rtol=1e-6)
    assert result.rollout.trajectories[4].token_ids.tolist() == [51, 52, 53]


def pairs_tokenizer() -> Tokenizer:
    """The characters of `tiny_tokenizer` in another order, and one pair of them: `ef`."""
    plain = [token for token in tiny_tokenizer(64).get_vocab() if len(token) == 1]
    vocabulary = {token: index for index, token in enumerate([*sorted(plain), "ef", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("e", "f")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


async def test_a_teacher_with_another_tokenizer_is_asked_in_its_own_tokens(
    connection: Connection, streams: Streams, faulty: FaultyTeacher, faulty_url: str
) -> None:
    """`e` and `f` of the student are one token of the teacher's; token 53 ends an answer, and one
    that it has inside is refused without a word about the others."""
    original, other = group(), pairs_tokenizer()
    prompt = replace(original.prompt, teacher_context=np.array([5, 6, 7], np.int32))
    ids, logprobs = np.array([53, 11], np.int32), np.full(2, -0.5, np.float32)
    spoilt = Trajectory(ids, logprobs, "stop", "")
    trajectories = (spoilt, *original.rollout.trajectories[1:])
    rollout = replace(original.rollout, prompt=prompt, trajectories=trajectories)
    await put(streams, encode(replace(original, rollout=rollout)))
    own = tiny_tokenizer(64).backend_tokenizer
    own.add_special_tokens([own.id_to_token(53)])
    end = other.token_to_id("<end>")
    one = Retokenizer(own.to_str(), other.to_str(), [53], end)
    servers = {"default": Servers([Target(faulty_url, "key")], DEADLINE_S)}
    settings = TeacherSettings("all", 0, servers, {"default": one})
    async with running(TeacherWorker(post(connection, "teacher"), settings)) as worker:
        (result,) = await until(lambda: scored(streams))
        assert worker.details()["refused"] == 1
    check(result, "all", vocabulary=64)
    (sent,) = [request["sequences"] for request in faulty.requests]
    pair = other.token_to_id("ef")
    last = [other.token_to_id(own.id_to_token(i)) for i in (51, 52)]
    assert [(s["prompt"], s["completion"]) for s in sent] == [
        ([5, 6, 7], [pair]), ([5, 6, 7], [*last, end]),
    ]  # fmt: skip
    chunks = {index: found.tolist() for index, found in result.chunks.items()}
    assert chunks == {0: [-1, -1], 1: [0, 0], 3: [], 4: [0, 1, 2]}
    np.testing.assert_allclose(result.teacher_logprobs[1], [-pair / 100, 0.0], rtol=1e-6)
    expected = -np.array([*last, end]) / 100
    np.testing.assert_allclose(result.teacher_logprobs[4], expected, rtol=1e-6)
