"""The one form in which arrays travel or are kept: a safetensors file with text beside them.

Records in the streams, the teacher's binary requests and answers, and its cache are all made and
read here. Nothing is ever pickled, and whatever is not such a file raises `WireError`.

The weights alone travel otherwise (`services.weights`): as one flat buffer in Ray's object store,
which every worker of a machine reads where it lies, without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.errors import WireError

Array: TypeAlias = npt.NDArray[Any]

_HEADER_BYTES = 8  # the length of safetensors' own header, little endian


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What `pack` was given."""

    arrays: Mapping[str, Array]
    text: Mapping[str, str]

    def array(self, name: str, dtype: type[np.generic], axes: int) -> Array:
        """The array of that name.

        Raises:
            WireError: it is missing, or of another type or number of axes.
        """
        if name not in self.arrays:
            raise WireError(f"the tensor {name!r} is missing")
        array = self.arrays[name]
        if array.dtype != dtype or array.ndim != axes:
            raise WireError(
                f"{name!r} is {array.dtype} of {array.ndim} axes, not {np.dtype(dtype)} of {axes}"
            )
        return array

    def ragged(
        self, name: str, dtype: type[np.generic], lengths: Sequence[int], axes: int = 1
    ) -> list[Array]:
        """What `joined` made of arrays of these lengths.

        Raises:
            WireError: as `array`; or the lengths do not add up.
        """
        flat = self.array(name, dtype, axes)
        if sum(lengths) != len(flat):
            raise WireError(f"{len(flat)} of {name} for lengths that sum to {sum(lengths)}")
        return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def pack(arrays: Mapping[str, Array], text: Mapping[str, str]) -> bytes:
    """Arrays and text as one safetensors file."""
    return save(dict(arrays), dict(text))


def unpack(body: bytes) -> Unpacked:
    """What `pack` was given.

    Raises:
        WireError: the bytes are no safetensors file.
    """
    try:
        arrays = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WireError(f"not safetensors: {error}") from error
    return Unpacked(arrays, _header(body).get("__metadata__") or {})


def peek(body: bytes) -> Mapping[str, str]:
    """The text alone, without reading the arrays; empty where there is none."""
    try:
        text = _header(body)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return text if isinstance(text, dict) else {}


def joined(parts: Sequence[Array], dtype: type[np.generic]) -> Array:
    """Arrays of unlike lengths, one after another."""
    whole: Array = np.concatenate([*parts, np.empty(0, dtype)])
    return whole.astype(dtype, copy=False)


def _header(body: bytes) -> Any:
    length = int.from_bytes(body[:_HEADER_BYTES], "little")
    return json.loads(body[_HEADER_BYTES : _HEADER_BYTES + length])
