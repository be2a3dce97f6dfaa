"""Datasets: verl's parquet columns, or JSONL with the same keys, as an order of prompts.

    file ──load_rows──▶ rows, tokenised once ──PromptSource──▶ prompt(0), prompt(1), …

`PromptSource.prompt` is a pure function of seed and order. So the feeder keeps no state: after a
crash it goes on at any order, and whoever samples that prompt draws the same numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
from jinja2 import TemplateError

from rollout.config import DataConfig, SamplingConfig
from services.config import DEFAULT_TEACHER
from services.trajectory import Prompt, Sampling, TokenIds

if TYPE_CHECKING:  # the file formats need no torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_COLUMNS = ("prompt", "data_source", "reward_model")
_TEACHER = "extra_info.teacher"
# Keys of the two kinds of random numbers that one seed gives; never to be changed, because a
# resumed run relies on them.
_SHUFFLE, _SAMPLE = 0, 1

Route: TypeAlias = Callable[[str | None, str], str]
"""The teacher of a row, by the one that it names and its data source; ValueError: there is none."""


def to_default(named: str | None, data_source: str) -> str:
    """The route of prompts that are not scored, or all by the one teacher."""
    return DEFAULT_TEACHER


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One prompt of a dataset, chat template applied."""

    token_ids: TokenIds  # [P]
    data_source: str
    reference: str
    teacher: str = DEFAULT_TEACHER


class PromptSource:
    """All prompts of a run in the order in which they are fed: every row once in each epoch.

    Args:
        rows: the dataset.
        sampling: how each prompt is sampled.
        seed: of the shuffling and of every group's samples.
        data: for the number of epochs and whether to shuffle.
    """

    def __init__(
        self, rows: Sequence[Row], sampling: SamplingConfig, *, seed: int, data: DataConfig
    ) -> None:
        self._rows = rows
        self._sampling = sampling
        self._seed = seed % 2**64  # NumPy takes no negative seed
        self._data = data
        self._epoch, self._places = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows) * self._data.epochs

    def prompt(self, order: int) -> Prompt:
        """The prompt at `order`, the same one whenever it is asked for.

        Raises:
            IndexError: there are not so many.
        """
        if not 0 <= order < len(self):
            raise IndexError(f"prompt {order} of {len(self)}")
        epoch, place = divmod(order, len(self._rows))
        number = self._row_number(epoch, place)
        row = self._rows[number]
        return Prompt(
            id=f"{epoch}-{number}",
            order=order,
            token_ids=row.token_ids,
            data_source=row.data_source,
            reference=row.reference,
            teacher=row.teacher,
            sampling=Sampling(
                n=self._sampling.n,
                max_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                # Two bits short, so that an engine whose seeds are signed may still add to it.
                seed=int(self._random(_SAMPLE, order, 1)[0]) >> 2,
            ),
        )

    def _row_number(self, epoch: int, place: int) -> int:
        if not self._data.shuffle:
            return place
        if epoch != self._epoch:
            keys = self._random(_SHUFFLE, epoch, len(self._rows))
            self._epoch, self._places = epoch, np.argsort(keys, kind="stable")
        return int(self._places[place])

    def _random(self, kind: int, index: int, count: int) -> npt.NDArray[np.uint64]:
        """Raw bits: NumPy promises them for all time, but not what its shuffles make of them."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(kind, index))
        return np.random.PCG64(sequence).random_raw(count)


def load_rows(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    route: Route = to_default,
) -> list[Row]:
    """Reads and tokenises every prompt; longer ones than `data.max_prompt_tokens` are left out.
    `route` says which teacher scores each.

    Raises:
        DataError: a file, row or column cannot be used, or nothing is left.
    """
    rows: list[Row] = []
    left_out = 0
    for file in data.files:
        found = 0
        for where, raw in _read(file):
            found += 1
            row = _row(where, raw, tokenizer, route)
            if len(row.token_ids) > data.max_prompt_tokens:
                left_out += 1
            else:
                rows.append(row)
        if not found:
            raise DataError(f"{file} is empty")
    names = ", ".join(map(str, data.files))
    if not rows:
        raise DataError(
            f"every prompt of {names} is longer than max_prompt_tokens ({data.max_prompt_tokens})"
        )
    if left_out:
        log.warning(
            "%s: %d of %d prompts are longer than %d tokens and are left out",
            names, left_out, left_out + len(rows), data.max_prompt_tokens,
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------- files


def _read(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with words for where it stands."""
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    if file.suffix == ".parquet":
        return _read_parquet(file)
    if file.suffix == ".jsonl":
        return _read_jsonl(file)
    raise DataError(f"{file} is neither .parquet nor .jsonl")


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            leaves = (table.schema.column(place).path for place in range(len(table.schema)))
            if _TEACHER in leaves:  # nothing else of `extra_info`: it may be long
                columns.append(_TEACHER)
            number = 0
            for batch in table.iter_batches(columns=columns):
                for raw in batch.to_pylist():
                    yield f"{file}, row {number}", raw
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no intact parquet file: {error}") from error


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                raw = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise DataError(f"{where} is not JSON: {error}") from error
            if not isinstance(raw, dict):
                raise DataError(f"{where} is not a JSON object")
            yield where, raw


# -------------------------------------------------------------------------------- rows


def _row(where: str, raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, route: Route) -> Row:
    for column in _COLUMNS:
        if raw.get(column) is None:
            raise DataError(f"{where}: column {column!r} is missing")
    if not isinstance(raw["data_source"], str):
        raise DataError(f"{where}: column 'data_source' is not text")
    return Row(
        token_ids=_tokens(where, _messages(where, raw["prompt"]), tokenizer),
        data_source=raw["data_source"],
        reference=_reference(where, raw["reward_model"]),
        teacher=_teacher(where, raw.get("extra_info"), raw["data_source"], route),
    )


def _teacher(where: str, extra: Any, data_source: str, route: Route) -> str:
    named = extra.get("teacher") if isinstance(extra, dict) else None
    if named is not None and not isinstance(named, str):
        raise DataError(f"{where}: {_TEACHER} is not text")
    try:
        return route(named, data_source)
    except ValueError as error:
        raise DataError(f"{where}: {_TEACHER}: {error}") from error


def _messages(where: str, prompt: Any) -> list[dict[str, str]]:
    ok = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not ok:
        raise DataError(
            f"{where}: column 'prompt' is not a list of chat messages "
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
        truth = str(truth)
    if not isinstance(truth, str) or not truth:
        raise DataError(f"{where}: column 'reward_model' has no ground_truth")
    return truth


def _tokens(
    where: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> TokenIds:
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:  # templates refuse roles or orders that they do not know
        raise DataError(
            f"{where}: column 'prompt': the chat template refuses the messages: {error}"
        ) from error
    if not len(ids):
        raise DataError(f"{where}: column 'prompt': the chat template makes nothing of it")
    return np.asarray(ids, np.int32)
