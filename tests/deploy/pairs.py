"""The demo's teacher under another tokenizer, two digits a token, served for a run.

    python -m tests.deploy.pairs DIRECTORY PORT

The log-prob of a token is the sum over its characters under the present teacher, so it is the same
function of the text.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import uvicorn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.arithmetic.task import ALPHABET, CHAT_TEMPLATE, EOS, HERE, PAD
from services.config import EngineConfig
from services.models import load_tokenizer
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.config import TeacherConfig
from teacher.scorer import Scorer, build_scorer, model_card
from teacher.scores import NO_MORE, More, TokenScores

TEACHER = HERE / "teacher"
PAIRS = [f"{number:02}" for number in range(100)]


def write(directory: Path) -> Path:
    """A model directory of the teacher's weights, with the other tokenizer beside them."""
    shutil.copytree(TEACHER, directory)
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([PAD, EOS, *ALPHABET, *PAIRS])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]{2}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = tokenizer.get_vocab_size()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


class ByPairs:
    """A scorer of characters that is asked in pairs; there are no alternatives to tell."""

    def __init__(self, characters: Scorer, directory: Path) -> None:
        self._characters = characters
        plain = load_tokenizer(str(TEACHER)).backend_tokenizer
        own = load_tokenizer(str(directory)).get_vocab()
        specials = {own[token]: [plain.token_to_id(token)] for token in (PAD, EOS)}
        self._spelled = {i: plain.encode(token).ids for token, i in own.items()} | specials

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        assert not top
        spelled = [[self._spelled[token] for token in ids] for ids in sequences]
        before = [sum(map(len, one[:start])) for one, start in zip(spelled, starts, strict=True)]
        flat = [[*chain.from_iterable(one)] for one in spelled]
        scored = await self._characters.score(flat, before)
        return [
            replace(TokenScores.empty(0), logprobs=_sums(score, one[start:]))
            for score, one, start in zip(scored, spelled, starts, strict=True)
        ]

    async def check(self) -> None:
        await self._characters.check()

    async def close(self) -> None:
        await self._characters.close()


def _sums(score: TokenScores, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    ends = accumulate(map(len, tokens), initial=0)
    return np.array([score.logprobs[a:b].sum() for a, b in pairwise(ends)], np.float32)


def main() -> None:
    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    config = TeacherConfig(model=str(TEACHER), engine=EngineConfig(kind="transformers"))
    card = model_card(TeacherConfig(model=str(directory)))
    app = build_app(
        [Teacher(card, ByPairs(build_scorer(config), directory))],
        KeyRing(()),
        max_body_bytes=1 << 24,
        admission=Admission(max_requests=256, max_tokens=1 << 20),
    )
    uvicorn.run(app, host="127.0.0.1", port=port, lifespan="off", log_level="warning")


if __name__ == "__main__":
    main()
