"""Finds data files: on this machine, in an object store, or on the Hugging Face Hub.

data/*.parquet                                  a path; `*`, `?`, `[…]` and `**` as in a shell
s3://bucket/data/*.jsonl                        whatever pyarrow or fsspec knows
hf://datasets/OWNER/NAME@REVISION?split=test    a split, by the names of its files
"""

from __future__ import annotations

import glob
import io
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import parse_qs

from fsspec.utils import glob_translate
from pyarrow import fs

from services.files import resolve, without_keys

_HUB = "hf://datasets/"
_SUFFIXES = (".parquet", ".jsonl")
_SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of prompts. `name` is for people; `stream` reads its bytes, and can seek."""

    name: str
    stream: Callable[[], BinaryIO]


def find(where: str) -> list[DataFile]:
    """The files that a path, URL or pattern names, in the order of their names.

    Raises:
        DataError: there are none, or they cannot be reached.
    """
    if where.startswith(_HUB):
        return _on_the_hub(where)
    if "://" in where:
        return _in_a_store(where)
    paths = sorted(glob.glob(where, recursive=True)) if glob.has_magic(where) else [where]
    files = [DataFile(path, partial(_open_path, path)) for path in paths if Path(path).is_file()]
    if not files and Path(where).is_dir():
        raise DataError(
            f"{where} is a directory: name its files, as in {Path(where) / '*.parquet'}"
        )
    if not files:
        raise DataError(f"there is no file {where}")
    return files


def _open_path(path: str) -> BinaryIO:
    return open(path, "rb")


# ------------------------------------------------------------------------ object stores


def _in_a_store(where: str) -> list[DataFile]:
    name = without_keys(where)
    try:
        files, path = resolve(where)
        # Not the part behind it: a bucket may hold millions of other files.
        start = re.split(r"[*?\[]", path, maxsplit=1)[0]
        if start == path:
            infos = [files.get_file_info(path)]
        else:
            top = fs.FileSelector(posixpath.dirname(start), allow_not_found=True, recursive=True)
            infos = files.get_file_info(top)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    there = [info.path for info in infos if info.type == fs.FileType.File]
    paths = sorted(_matching(path, there))
    if not paths:
        raise DataError(f"there is no file {name}")
    scheme = where.partition("://")[0]
    return [DataFile(f"{scheme}://{p}", partial(_open_in_store, files, p)) for p in paths]


def _open_in_store(files: fs.FileSystem, path: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(files.open_input_file(path)))


def _matching(pattern: str, paths: Sequence[str]) -> Iterator[str]:
    try:
        accepted = re.compile(glob_translate(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: {error}") from error
    return (path for path in paths if path == pattern or accepted.match(path))


# ------------------------------------------------------------------ the Hugging Face Hub


def _on_the_hub(where: str) -> list[DataFile]:
    """Downloads what is not in the Hub's cache on this machine, with the user's own token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    repo, revision, pattern, split = _parse(where)
    api = HfApi()
    try:
        there = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        chosen = _of_split(where, _matching(pattern, there) if pattern else there, split)
        get = partial(api.hf_hub_download, repo, repo_type="dataset", revision=revision)
        return [DataFile(f"{_HUB}{repo}/{p}", partial(_open_path, get(filename=p))) for p in chosen]
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{where} cannot be read: {reason}") from error


def _parse(where: str) -> tuple[str, str | None, str, str | None]:
    """Repository, revision, pattern and split of `hf://datasets/OWNER/NAME@REVISION/PATH?split=…`"""
    address, _, query = where.removeprefix(_HUB).partition("?")
    asked = parse_qs(query)
    if asked.keys() - {"split"} or (query and not asked):
        raise DataError(f"{where}: only ?split=NAME may follow the path")
    parts = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", address)
    if not parts:
        raise DataError(f"{where} is not hf://datasets/OWNER/NAME[@REVISION][/PATH][?split=NAME]")
    return parts[1], parts[2], parts[3] or "", asked.get("split", [None])[0]


def _of_split(where: str, paths: Iterator[str] | Sequence[str], split: str | None) -> list[str]:
    """The data files of a split, which stands in a file's or a folder's name: `train.jsonl`,
    `data/train-00000-of-00002.parquet`, `main/train/0000.parquet`. Without one all of them, if no
    name tells splits apart."""
    data = sorted(path for path in paths if path.endswith(_SUFFIXES))
    if not data:
        raise DataError(f"there is no .parquet or .jsonl file in {where}")
    if split is None:
        splits = {
            name for path in data for name in ("train", "validation", "test") if _is(path, name)
        }
        if len(splits) > 1:
            raise DataError(f"{where} has the splits {', '.join(sorted(splits))}: add ?split=NAME")
        return data
    chosen = [path for path in data if _is(path, split)]
    if not chosen:
        raise DataError(f"no file of {where} is called after the split: {', '.join(data[:5])}")
    return chosen


def _is(path: str, split: str) -> bool:
    return re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", path) is not None
