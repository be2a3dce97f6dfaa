"""An answer in the tokens of a teacher whose tokenizer is not the student's.

    the student's tokens ─▶ text ─▶ the teacher's tokens ─▶ their log-probs
              └─── chunks: cut where both have a boundary ───┘─▶ one sum a chunk

The text is what the student's tokens spell, also where its own tokenizer would have cut it in
another way. Boundaries are between characters: a token that ends within one has none there.

Axes: `L` tokens of the student, `T` of the teacher, `K` chunks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from services.models import Unencodable, encoding
from services.trajectory import TokenIds, Trajectory
from teacher.scores import Question, TokenScores

Places: TypeAlias = npt.NDArray[np.int64]


class Untranslatable(ValueError):
    """An answer that the teacher cannot be asked about; the message says why."""


class Retokenizer:
    """Makes the teacher's tokens of the student's.

    Args:
        student, teacher: their tokenizers, as `tokenizer.json` has them.
        ends: tokens with which the student ends an answer.
        end: the one with which the teacher does.
        longest: what the teacher reads at once, in its tokens; 0 is without limit.
    """

    def __init__(
        self, student: str, teacher: str, ends: Sequence[int], end: int, longest: int = 0
    ) -> None:
        self._made_of = (student, teacher, tuple(ends), end, longest)
        self._student, self._teacher = map(_plain, (student, teacher))
        self._ends, self._end, self._longest = frozenset(ends), end, longest
        vocabulary = self._student.get_vocab().values()
        special = self._student.get_added_tokens_decoder().items()
        self._texts = np.zeros(max(vocabulary) + 1, np.bool_)  # of ids: whether they are text
        self._texts[list(vocabulary)] = True
        self._texts[[i for i, one in special if one.special] + _unknown(student)] = False
        self._unknown = _unknown(teacher)

    def __reduce__(self) -> tuple[Any, ...]:
        return Retokenizer, self._made_of

    def asked(self, trajectory: Trajectory, before: int) -> Question:
        """What the teacher is asked about an answer of at least one token, of which it reads
        `before` tokens before it. Of the last chunk of an answer that was cut off it has no say:
        it might have gone on within a token of the teacher's.

        Raises:
            Untranslatable: the answer is not a text of which both have tokens.
        """
        count, ids = len(trajectory.token_ids), trajectory.token_ids
        cut_off = trajectory.finish == "length"
        if ended := not cut_off and int(ids[-1]) in self._ends:
            ids = ids[:-1]
        text, behind = self._spelled(ids, cut_off)
        tokens, spans = self._encoded(text)
        mine, theirs = _common(behind, spans, len(text))
        if len(mine):
            mine[-1] = len(ids)  # tokens that spell nothing belong to what they follow
        if ended:
            tokens = [*tokens, self._end]
            mine, theirs = np.append(mine, count), np.append(theirs, len(tokens))
        if len(mine) <= cut_off:
            raise Untranslatable("nothing in it is whole")
        if self._longest and before + len(tokens) > self._longest:
            raise Untranslatable(f"the teacher reads {self._longest} of its tokens at most")
        chunks = np.repeat(np.arange(len(mine), dtype=np.int32), np.diff(mine, prepend=0))
        if cut_off:
            chunks[chunks == chunks[-1]] = -1
        return Question(np.array(tokens, np.int32), partial(_summed, theirs, chunks))

    def _spelled(self, ids: TokenIds, cut_off: bool) -> tuple[str, Places]:
        """The text of the student's tokens, and [L] how many characters of it are complete behind
        each; −1 where one is not."""
        if len(ids) and (ids.max() >= len(self._texts) or not self._texts[ids].all()):
            raise Untranslatable("it has special tokens inside")
        stream, pieces, length = DecodeStream(skip_special_tokens=False), [], 0
        behind = np.full(len(ids), -1, np.int64)
        try:
            with encoding():
                for index, token in enumerate(ids.tolist()):
                    if piece := stream.step(self._student, token):
                        pieces.append(piece)
                        behind[index] = length = length + len(piece)
                whole = self._student.decode(ids.tolist(), skip_special_tokens=False)
        except Unencodable as error:
            raise Untranslatable(f"its tokens are no text: {error}") from error
        text = "".join(pieces)
        rest = whole[len(text) :]
        if not whole.startswith(text) or rest.strip("\ufffd") or (rest and not cut_off):
            raise Untranslatable("its tokens are no text")
        if "\ufffd" in text:
            raise Untranslatable("its bytes are no UTF-8")
        return text, behind

    def _encoded(self, text: str) -> tuple[list[int], Places]:
        """The teacher's tokens of a text, and [T, 2] the characters that each stands for."""
        try:
            with encoding():
                encoded = self._teacher.encode(text, add_special_tokens=False)
        except Unencodable as error:
            raise Untranslatable(f"the teacher has no tokens for it: {error}") from error
        if not set(self._unknown).isdisjoint(encoded.ids):
            raise Untranslatable("the teacher has no tokens for some of its characters")
        spans = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        ends, starts = np.append(0, spans[:, 1]), np.append(spans[:, 0], len(text))
        if any(text[ends[i] : starts[i]].strip() for i in np.flatnonzero(ends < starts)):
            raise Untranslatable("the teacher has no tokens for some of its characters")
        return encoded.ids, spans


def _common(behind: Places, spans: Places, length: int) -> tuple[Places, Places]:
    """[K] twice: how many tokens of the student and of the teacher lie before each boundary that
    both have, the text's end included.

    Args:
        behind: [L] characters before the student's boundary behind each token, or −1.
        spans: [T, 2] of the teacher's. Between two may be space, which is no token of the
            teacher's: a boundary anywhere in it is common.
        length: of the text, in characters.
    """
    ends = np.maximum.accumulate(spans[:, 1])
    next_start = np.append(np.minimum.accumulate(spans[::-1, 0])[::-1], length)[1:]
    own = np.flatnonzero(behind >= 0)
    last = np.searchsorted(behind[own], next_start, side="right") - 1
    meet = (last >= 0) & (ends <= next_start)
    meet[meet] = behind[own[last[meet]]] >= ends[meet]
    mine, theirs = own[last[meet]] + 1, np.flatnonzero(meet) + 1
    kept = np.append(np.diff(mine) > 0, True)[: len(mine)]
    return mine[kept], theirs[kept]


def unsaid(count: int) -> TokenScores:
    """Of an answer of so many tokens about which the teacher cannot be asked."""
    nothing = TokenScores.empty(0)
    logprobs, chunks = np.zeros(count, np.float32), np.full(count, -1, np.int32)
    return replace(nothing, logprobs=logprobs, chunks=chunks)


def _summed(ends: Places, chunks: TokenIds, scores: TokenScores) -> TokenScores:
    """The scores of the teacher's tokens as those of the student's: each chunk's sum with its
    first token.

    Args:
        ends: [K] how many of the teacher's tokens lie before the end of each chunk.
        chunks: [L] the chunk of each of the student's.
    """
    sums = np.add.reduceat(scores.logprobs.astype(np.float64), np.append(0, ends[:-1]))
    first = np.diff(chunks, prepend=-1) > 0
    values = np.zeros(len(chunks), np.float32)
    values[first] = sums[chunks[first]]
    return replace(scores, logprobs=values, chunks=chunks)


def _plain(saved: str) -> Tokenizer:
    """A tokenizer whose special tokens are text like any other, and whose spans are whole: some
    leave out the space before a word."""
    tokenizer = Tokenizer.from_str(saved)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _unknown(saved: str) -> list[int]:
    """The id that stands for whatever a tokenizer does not know, if there is one."""
    model = json.loads(saved)["model"]
    if model.get("unk_id") is not None:
        return [int(model["unk_id"])]
    unknown = model.get("unk_token")
    index = model["vocab"].get(unknown) if isinstance(model["vocab"], dict) else None
    return [] if index is None else [int(index)]
