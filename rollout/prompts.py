"""Datasets: verl's parquet columns, or JSONL with the same keys, as an order of prompts.

    files ──load_rows──▶ rows, tokenised once ──PromptSource──▶ prompt(0), prompt(1), …

`PromptSource.prompt` is a pure function of seed and order. So the feeder keeps no state: after a
crash it goes on at any order, and whoever samples that prompt draws the same numbers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
from jinja2 import TemplateError

from rollout.config import ONE_TURN, DataConfig, EnvironmentConfig, PromptsConfig, SamplingConfig
from rollout.sources import DataError, DataFile, find
from services.config import DEFAULT_TEACHER
from services.files import without_keys
from services.models import Unencodable, encoding
from services.trajectory import Message, Prompt, Sampling, TokenIds

if TYPE_CHECKING:  # the file formats need no torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_COLUMNS = ("prompt", "data_source", "reward_model")
_PROMPT = "column 'prompt'"
_TEACHER, _TEACHER_PROMPT = "teacher", "teacher_prompt"  # keys of `extra_info`
_KEY = re.compile(r"\{([A-Za-z_]\w*)\}")  # in a context; all other braces are text
# Keys of the two kinds of random numbers that one seed gives; never to be changed, because a
# resumed run relies on them.
_SHUFFLE, _SAMPLE = 0, 1

Route: TypeAlias = Callable[[str | None, str], str]
"""The teacher of a row, by the one that it names and its data source; ValueError: there is none."""


def to_default(named: str | None, data_source: str) -> str:
    """The route of prompts that are not scored, or all by the one teacher."""
    return DEFAULT_TEACHER


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One prompt of a dataset, chat template applied."""

    token_ids: TokenIds  # [P]
    data_source: str
    reference: str
    teacher: str = DEFAULT_TEACHER
    messages: tuple[Message, ...] = ()  # where it has an environment
    teacher_context: TokenIds | None = None  # [C] what the teacher reads instead


@dataclass(frozen=True, slots=True)
class Context:
    """A teacher's own prompt of each row, chat template applied.

    Args:
        messages: (role, text), where the text names the row's keys: `{prompt}`, `{reference}`, and
            those of `extra_info`; None takes the messages in `extra_info.teacher_prompt`, and no
            messages are those of the prompt itself.
        tokenizer: the teacher's.
        max_tokens: a row whose context is longer is left out.
    """

    messages: tuple[tuple[str, str], ...] | None
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    @property
    def keys(self) -> set[str]:
        """Of `extra_info` that it reads."""
        if self.messages is None:
            return {_TEACHER_PROMPT}
        return {key for _, text in self.messages for key in _keys(text)} - {"prompt", "reference"}

    def ids(
        self, where: str, row: Row, messages: list[dict[str, str]], extra: Mapping[str, Any]
    ) -> TokenIds:
        """[C] of one row, whose prompt these messages are.

        Raises:
            DataError: a key is missing or is no text, or the template refuses what comes out.
        """
        if self.messages is None:
            column = f"extra_info.{_TEACHER_PROMPT}"
            messages = _messages(where, extra.get(_TEACHER_PROMPT), column)
            return _tokens(where, messages, self.tokenizer, column)
        if not self.messages:
            return _tokens(where, messages, self.tokenizer, _PROMPT)
        prompt = "\n\n".join(message["content"] for message in messages)
        values = {**extra, "prompt": prompt, "reference": row.reference}
        for key in self.keys:
            if not isinstance(values.get(key), str | int | float):
                raise DataError(
                    f"{where}: the context of the teacher {row.teacher!r} names {key!r}, and the "
                    f"row's extra_info has no text or number of that name"
                )
        made = [{"role": role, "content": _KEY.sub(lambda key: str(values[key[1]]), text)}
                for role, text in self.messages]  # fmt: skip
        return _tokens(where, made, self.tokenizer, "the teacher's context")

    def text(self, row: Row) -> str:
        """What the teacher reads of `row`, to be shown."""
        ids = row.token_ids if row.teacher_context is None else row.teacher_context
        return str(self.tokenizer.decode(ids.tolist()))


def _keys(text: str) -> list[str]:
    return _KEY.findall(text)


class PromptSource:
    """All prompts of a run in the order in which they are fed: every row once in each epoch.

    Args:
        rows: the dataset.
        sampling: how each prompt is sampled.
        seed: of the shuffling and of every group's samples.
        data: for the number of epochs and whether to shuffle.
        top: how many of the student's most likely tokens are recorded with each.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        sampling: SamplingConfig,
        *,
        seed: int,
        data: DataConfig,
        top: int = 0,
    ) -> None:
        self._rows = rows
        self._sampling = sampling
        self._top = top
        self._seed = seed % 2**64  # NumPy takes no negative seed
        self._data = data
        self._epoch, self._shuffled = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows) * self._data.epochs

    def prompt(self, order: int) -> Prompt:
        """The prompt at `order`, the same one whenever it is asked for.

        Raises:
            IndexError: there are not so many.
        """
        if not 0 <= order < len(self):
            raise IndexError(f"prompt {order} of {len(self)}")
        epoch, index = divmod(order, len(self._rows))
        number = self._row_number(epoch, index)
        row = self._rows[number]
        return Prompt(
            id=f"{epoch}-{number}",
            order=order,
            token_ids=row.token_ids,
            data_source=row.data_source,
            reference=row.reference,
            teacher=row.teacher,
            messages=row.messages,
            teacher_context=row.teacher_context,
            sampling=Sampling(
                n=self._sampling.n,
                max_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                # Two bits short, so that an engine whose seeds are signed may still add to it.
                seed=int(self._random(_SAMPLE, order, 1)[0]) >> 2,
                top=self._top,
            ),
        )

    def _row_number(self, epoch: int, index: int) -> int:
        if not self._data.shuffle:
            return index
        if epoch != self._epoch:
            keys = self._random(_SHUFFLE, epoch, len(self._rows))
            self._epoch, self._shuffled = epoch, np.argsort(keys, kind="stable")
        return int(self._shuffled[index])

    def _random(self, kind: int, index: int, count: int) -> npt.NDArray[np.uint64]:
        """Raw bits: NumPy promises them for all time, but not what its shuffles make of them."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(kind, index))
        return np.random.PCG64(sequence).random_raw(count)


def load_rows(
    data: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    route: Route = to_default,
    environment: EnvironmentConfig = ONE_TURN,
    contexts: Mapping[str, Context] | None = None,
) -> list[Row]:
    """Reads and tokenises every prompt; longer ones than `data.max_prompt_tokens` are left out, and
    so are those whose teacher's context is too long. `route` says which teacher scores each,
    `environment` whose messages are kept, and `contexts` has the teachers by name that read
    something else than the student.

    Raises:
        DataError: a file, row or column cannot be used, or nothing is left.
    """
    rows: list[Row] = []
    contexts = contexts or {}
    keys = {_TEACHER}.union(*(context.keys for context in contexts.values()))
    left_out: Counter[str] = Counter()
    for file in chain.from_iterable(map(find, data.files)):
        count = 0
        for where, raw in _read(file, keys):
            count += 1
            row = _row(where, raw, tokenizer, route, environment, contexts)
            context = row.teacher_context
            if len(row.token_ids) > data.max_prompt_tokens:
                left_out[
                    f"prompts are longer than {data.max_prompt_tokens} tokens (max_prompt_tokens)"
                ] += 1
            elif context is not None and len(context) > (most := contexts[row.teacher].max_tokens):
                who = f"contexts of the teacher {row.teacher!r}"
                left_out[
                    f"{who} are longer than the {most} tokens that leave room for an answer"
                ] += 1
            else:
                rows.append(row)
        if not count:
            raise DataError(f"{file.name} is empty")
    names = ", ".join(map(without_keys, data.files))
    total = len(rows) + left_out.total()
    if not rows:
        raise DataError(f"every prompt of {names} is left out: {', '.join(left_out)}")
    for what, count in left_out.items():
        log.warning("%s: %d of %d %s and are left out", names, count, total, what)
    return rows


# ------------------------------------------------------------------------------- files


def _read(file: DataFile, extra: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with words for where it stands; of `extra_info` these keys, if there are any."""
    if file.name.endswith(".parquet"):
        return _read_parquet(file, extra)
    if file.name.endswith(".jsonl"):
        return _read_jsonl(file)
    raise DataError(f"{file.name} is neither .parquet nor .jsonl")


def _read_parquet(file: DataFile, extra: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with file.stream() as source, pyarrow.parquet.ParquetFile(source) as table:
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            leaves = {
                ".".join(table.schema.column(column).path.split(".")[:2])
                for column in range(len(table.schema))
            }
            # Nothing else of `extra_info`: it may be long.
            columns += sorted(leaves & {f"extra_info.{key}" for key in extra})
            number = 0
            for batch in table.iter_batches(columns=columns):
                for raw in batch.to_pylist():
                    yield f"{file.name}, row {number}", raw
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not an intact parquet file: {error}") from error


def _read_jsonl(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.stream() as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            try:
                raw = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise DataError(f"{where} is not JSON: {error}") from error
            if not isinstance(raw, dict):
                raise DataError(f"{where} is not a JSON object")
            yield where, raw


# -------------------------------------------------------------------------------- rows


def _row(
    where: str,
    raw: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    route: Route,
    environment: EnvironmentConfig,
    contexts: Mapping[str, Context],
) -> Row:
    for column in _COLUMNS:
        if raw.get(column) is None:
            raise DataError(f"{where}: column {column!r} is missing")
    if not isinstance(raw["data_source"], str):
        raise DataError(f"{where}: column 'data_source' is not text")
    kept = environment.kind_of(raw["data_source"]) != "none"
    messages = _messages(where, raw["prompt"], _PROMPT)
    extra = raw.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    row = Row(
        token_ids=_tokens(where, messages, tokenizer, _PROMPT),
        data_source=raw["data_source"],
        reference=_reference(where, raw["reward_model"]),
        teacher=_teacher(where, extra.get(_TEACHER), raw["data_source"], route),
        messages=tuple(messages) if kept else (),
    )
    if row.teacher not in contexts:
        return row
    return replace(row, teacher_context=contexts[row.teacher].ids(where, row, messages, extra))


def _teacher(where: str, named: Any, data_source: str, route: Route) -> str:
    if named is not None and not isinstance(named, str):
        raise DataError(f"{where}: extra_info.{_TEACHER} is not text")
    try:
        return route(named, data_source)
    except ValueError as error:
        raise DataError(f"{where}: extra_info.{_TEACHER}: {error}") from error


def _messages(where: str, prompt: Any, column: str) -> list[dict[str, str]]:
    if isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}]
    ok = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not ok:
        raise DataError(
            f"{where}: {column} is neither text nor a list of chat messages "
            f'[{{"role": …, "content": …}}] with text in them'
        )
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _reference(where: str, reward_model: Any) -> str:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        if isinstance(truth, float) and not math.isfinite(
            truth
        ):  # pandas writes NaN for what is missing
            raise DataError(f"{where}: column 'reward_model': ground_truth is {truth}, no number")
        truth = str(truth)
    if not isinstance(truth, str) or not truth:
        raise DataError(f"{where}: column 'reward_model' has no ground_truth")
    return truth


def _tokens(
    where: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, column: str
) -> TokenIds:
    try:
        "".join(m["content"] for m in messages).encode()
        with encoding():
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise DataError(
            f"{where}: {column}: {bad!r} is half a character, which no text may hold"
        ) from error
    except TemplateError as error:  # templates refuse roles or orders that they do not know
        raise DataError(
            f"{where}: {column}: the chat template refuses the messages: {error}"
        ) from error
    except Unencodable as error:
        raise DataError(
            f"{where}: {column}: the tokenizer cannot encode the messages: {error}"
        ) from error
    if not len(ids):
        raise DataError(f"{where}: {column}: the chat template makes nothing of it")
    return np.asarray(ids, np.int32)
