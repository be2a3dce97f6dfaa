"""Teachers whose tokenizer is not the student's: whether a run can have them, and how they are
asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deploy.config import RunConfig
from services.models import Fingerprint, at_hand, load_tokenizer
from teacher.config import TeacherConfig
from teacher.retokenizer import Retokenizer
from trainer.objectives.base import Objective


def differs(teacher: TeacherConfig, student: Fingerprint, identity: Fingerprint | None) -> bool:
    """Whether answers are tokenised anew for a teacher: not where its tokenizer turns out to be the
    student's."""
    same = identity is not None and identity.tokenizer == student.tokenizer
    return teacher.tokenizer == "own" and not same


def problems(config: RunConfig, teacher: TeacherConfig, chosen: Objective[Any]) -> Iterator[str]:
    """What keeps such a teacher from teaching, one sentence each."""
    settings = config.trainer.objective
    if not chosen.reads_chunks(settings):
        yield (
            f"the objective {settings.kind!r} with divergence: {settings.pull} reads the "
            f"teacher's log-probs of single tokens, and tokenizer: own gives those of chunks: "
            f"choose one that reads log-ratios alone, such as scope or opd with divergence: sampled"
        )
    if config.environment.used_kinds - {"none"}:
        yield "tokenizer: own scores answers of one turn: leave out the environment"
    if not at_hand(teacher.model):
        yield f"tokenizer: own needs {teacher.model} on this machine, for its tokenizer"
        return
    tokenizer = load_tokenizer(teacher.model)
    if not tokenizer.is_fast:
        yield f"tokenizer: own needs the tokenizer of {teacher.model} as a tokenizer.json"
    if not tokenizer.chat_template:
        yield (
            f"tokenizer: own makes the teacher's prompts with its own chat template, and "
            f"{teacher.model} has none"
        )


def retokenizer(
    student: Fingerprint,
    students: PreTrainedTokenizerBase,
    teacher: TeacherConfig,
    identity: Fingerprint,
) -> Retokenizer:
    """What makes the teacher's tokens of the student's."""
    tokenizer = load_tokenizer(teacher.model)
    return Retokenizer(
        students.backend_tokenizer.to_str(),
        tokenizer.backend_tokenizer.to_str(),
        student.end_tokens,
        end_of_turn(tokenizer, identity.end_tokens),
        teacher.max_sequence_tokens or identity.context_length,
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """Which of a teacher's end tokens ends an answer, by its chat template: others may end a
    document, or a call of a tool. Its first where the template writes none."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    ids: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return next((token for token in reversed(ids) if token in ends), ends[0])
