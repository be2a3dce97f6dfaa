"""Where checkpoints lie: a directory of this machine or the network, or an object store by URL.

Resolved by `services.files` as Ray Train resolves `RunConfig.storage_path`.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pyarrow import fs
from torch.distributed.checkpoint.filesystem import FileSystemBase

from services.files import resolve, without_keys

_CHUNK = 64 << 20


class Storage:
    """A directory to keep checkpoints in. Paths are relative to it, with `/`.

    Args:
        where: a path or a URL.
        below: a directory in it to stay in.

    Raises:
        OSError: an object store does not answer, or has no such bucket.
    """

    def __init__(self, where: str | Path, below: str = "") -> None:
        self._files, self._root = resolve(str(where))
        self.where = without_keys(str(where))
        """For people: without what a URL says of keys and endpoints."""
        if below:
            self._root, self.where = f"{self._root}/{below}", f"{self.where}/{below}"
        self.renames = isinstance(self._files, fs.LocalFileSystem)
        """Whether a directory gets its name in one atomic step: no object store can do that."""

    def names(self) -> list[str]:
        """The files and directories at the top. Found by all that lies below them, because a
        directory in an object store may be nothing but the files in it."""
        return sorted({path.partition("/")[0] for path in self._below("")})

    def sizes(self, directory: str) -> dict[str, int]:
        """Path below `directory` -> bytes, of every file in it."""
        files = self._below(directory)
        return {path: i.size for path, i in files.items() if i.type == fs.FileType.File}

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        exists: bool = self._files.get_file_info(self._at(path)).type != fs.FileType.NotFound
        return exists

    def read(self, path: str) -> bytes:
        """A whole file."""
        with self._files.open_input_stream(self._at(path)) as stream:
            data: bytes = stream.read()
        return data

    def write(self, path: str, data: bytes) -> None:
        """A whole file; when it returns, the file is durable."""
        with self.adapter().create_stream(path, "wb") as stream:
            stream.write(data)

    def fill(self, directory: str, make: Callable[[Path], None]) -> None:
        """Lets `make` write into `directory`, by way of a local one if it lies elsewhere."""
        if self.renames:
            target = Path(self._at(directory))
            target.mkdir(parents=True, exist_ok=True)
            make(target)
            return
        with tempfile.TemporaryDirectory() as local:
            make(Path(local))
            fs.copy_files(
                local, self._at(directory),
                destination_filesystem=self._files, chunk_size=_CHUNK, use_threads=False,
            )  # fmt: skip

    def delete(self, path: str) -> None:
        """Takes away a directory and all in it; harmless when there is none."""
        if self.exists(path):
            self._files.delete_dir(self._at(path))

    def rename(self, source: str, target: str) -> None:
        """Gives a directory its final name: durable with all that is in it, or not there."""
        assert self.renames, "an object store cannot rename in one step"
        top = Path(self._at(source))
        for path in [*top.rglob("*"), top]:
            _sync(path)
        top.rename(self._at(target))
        _sync(Path(self._root))

    def adapter(self) -> FileSystemBase:
        """The same files as torch.distributed.checkpoint wants them."""
        return _Files(self._files, self._at, durable=self.renames)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _below(self, directory: str) -> dict[str, Any]:
        """Path below `directory` -> pyarrow's FileInfo, of everything in it."""
        start = len(self._at(directory).rstrip("/")) + 1
        where = fs.FileSelector(self._at(directory), allow_not_found=True, recursive=True)
        return {info.path[start:]: info for info in self._files.get_file_info(where)}


class _Files(FileSystemBase):
    """pyarrow's file system behind torch's interface."""

    def __init__(self, files: fs.FileSystem, at: Callable[[str], str], *, durable: bool) -> None:
        self._files, self._at, self._durable = files, at, durable

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        target = self._at(str(path))
        if mode == "rb":
            with self._files.open_input_file(target) as stream:
                yield cast(io.IOBase, stream)
            return
        with self._files.open_output_stream(target) as stream:
            try:
                yield cast(io.IOBase, stream)
            except RuntimeError as error:  # torch's zip writer, which hides what the disk said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
        if self._durable:
            _sync(Path(target))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._files.move(self._at(str(path)), self._at(str(new_path)))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._files.create_dir(self._at(str(path)), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        exists: bool = self._files.get_file_info(self._at(str(path))).type != fs.FileType.NotFound
        return exists

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._files.delete_file(self._at(str(path)))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
