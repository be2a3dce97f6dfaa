"""Files by path or URL: what pyarrow knows (`s3://`, `gs://`, `abfs://`, `hdfs://`, `file://`), or
else what fsspec knows. Credentials come from where those libraries look for them, never from a
config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pyarrow import fs


def resolve(where: str) -> tuple[Any, str]:
    """pyarrow's file system for a path or URL, and the path in it.

    Raises:
        OSError: an object store does not answer.
        ImportError: the package for this kind of URL is not installed.
        ValueError: nobody knows this kind of URL.
    """
    if "://" not in where:
        return fs.LocalFileSystem(), str(Path(where).expanduser().absolute())
    try:
        files, root = fs.FileSystem.from_uri(where)
    except ValueError:  # a scheme that only fsspec knows
        import fsspec

        made, root = fsspec.core.url_to_fs(where)
        files = fs.PyFileSystem(fs.FSSpecHandler(made))
    return files, root.rstrip("/")


def without_keys(where: str) -> str:
    """A path or URL for people: without what a URL says of keys and endpoints."""
    return re.sub("//[^/]*@", "//", where.partition("?")[0]).rstrip("/")
