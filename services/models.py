"""Hugging Face directories: loading and writing them, telling them apart, and whether two fit
together."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from services import multimodal

if TYPE_CHECKING:  # fingerprints must not cost an import of torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_READERS = 4  # files read at once for a fingerprint
_PROBE_TEXT = (
    "A train leaves at 9:40 and travels 150 km in 2.5 hours. Its speed is 150 / 2.5 = 60 km/h, so "
    "it arrives at 12:10. Let x + 3 = 8; then x = 5.\n\ndef area(r):\n    return 3.14 * r ** 2\n"
)


class ModelError(ValueError):
    """A model directory cannot be used; the message says which and why."""


class Unencodable(ValueError):
    """A text that a tokenizer has no tokens for."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must agree for a teacher to score a student's tokens, and what identifies a model."""

    model: str  # weights and architecture
    tokenizer: str  # the token of every id
    tokenizer_size: int
    vocab_size: int  # rows of the output matrix; may be padded past the tokenizer
    context_length: int
    end_tokens: tuple[int, ...]
    chat_template: str


def locate(path: str) -> Path:
    """The local directory of `path`: itself, or the hub snapshot that is cached or fetched.

    Raises:
        ModelError: there is no such directory and no such model can be had.
    """
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{path} is not a local directory, and the Hub said: {error}") from error


def at_hand(path: str) -> bool:
    """Whether the model is on this machine, weights and all, so that nothing has to be fetched."""
    directory = Path(path).expanduser()
    if not directory.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(path, local_files_only=True))
        except LocalEntryNotFoundError:
            return False
    return (directory / "config.json").is_file() and bool(_weight_files(directory))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(path))


def load_model(path: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The causal language model of a directory, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(locate(path), dtype=getattr(torch, dtype))
    return model.to(device).eval()  # type: ignore[no-any-return]


def write_model(
    path: Path,
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads. Of a text
    model that came out of a multimodal checkpoint, that whole checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    if (directory := multimodal.enclosing(config)) is not None:
        multimodal.write_around(path, directory, tensors)
        tokenizer.save_pretrained(path)
        return
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # ours has no meaning outside this project
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):  # for its class and its file format; it holds nothing
        model = factory.from_config(config, dtype=next(iter(tensors.values())).dtype)
    model.save_pretrained(path, state_dict=dict(tensors))
    tokenizer.save_pretrained(path)


def parameter_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that `load_model` would give, without reading them.
    Tied parameters are listed once, under the name that the learner publishes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(AutoConfig.from_pretrained(locate(path)))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stored_names(path: str, names: Iterable[str]) -> dict[str, str]:
    """What a directory calls the parameters that `load_model` gives, where that is something else.

    Raises:
        ModelError: it is a multimodal checkpoint that the text model could not be put back into.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(locate(path)).get_text_config()
    config._name_or_path = str(locate(path))
    if (directory := multimodal.enclosing(config)) is None:
        return {}
    try:
        return multimodal.stored_names(directory, names)
    except ValueError as error:
        raise ModelError(str(error)) from None


def end_tokens(path: str) -> tuple[int, ...]:
    """Token ids that end a completion, from the generation config or else the config."""
    directory = locate(path)
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = settings.get("eos_token_id")
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    raise ModelError(f"{path} has no end token (eos_token_id)")


def fingerprint(path: str) -> Fingerprint:
    """Identifies a model directory without loading its weights."""
    directory = locate(path)
    config = text_config(path)
    tokenizer = load_tokenizer(path)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return Fingerprint(
        model=_weights_hash(directory),
        tokenizer=_hash(json.dumps(vocabulary).encode()),
        tokenizer_size=len(tokenizer),
        vocab_size=int(config["vocab_size"]),
        context_length=int(config.get("max_position_embeddings") or 0),
        end_tokens=end_tokens(path),
        chat_template=_hash(str(tokenizer.chat_template).encode()),
    )


def text_config(path: str) -> dict[str, Any]:
    """What config.json says; of a multimodal model, of the text model inside."""
    config = json.loads((locate(path) / "config.json").read_text(encoding="utf-8"))
    text: dict[str, Any] = config.get("text_config") or config
    return text


def steady_tokens(config: Mapping[str, Any]) -> int | None:
    """Up to how many tokens transformers rotates a model's keys and queries in one way, whatever
    the sequence's length is; None where it always does. `config`: as in `text_config`.

    The frequencies of `longrope` and `dynamic` follow from the longest sequence of a forward, for
    all of its tokens. So one long answer would change short ones beside it, and keys in a cache
    would keep the rotation that they had. Even alone, a token's log-prob would depend on how long
    the answer gets: what was sampled could never be scored.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, limits = "original_max_position_embeddings", []
    by_layer_type = [value for value in given.values() if isinstance(value, dict)]
    for rope in by_layer_type or [given]:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("longrope", "su") and rope["short_factor"] != rope["long_factor"]:
            limits.append(int(config.get(original) or rope[original]))
        elif "dynamic" in kind:
            limits.append(int(config["max_position_embeddings"]))
    return min(limits, default=None)


def differences(student: Fingerprint, teacher: Fingerprint) -> dict[str, str]:
    """What keeps `teacher` from scoring `student`'s tokens: aspect -> one sentence."""
    differences: dict[str, str] = {}
    if student.tokenizer_size != teacher.tokenizer_size:
        differences["tokenizer"] = (
            f"the tokenizers differ: the student's has {student.tokenizer_size} tokens, "
            f"the teacher's {teacher.tokenizer_size}"
        )
    elif student.tokenizer != teacher.tokenizer:
        differences["tokenizer"] = (
            f"the tokenizers differ: {student.tokenizer_size} tokens each, but not the same ids"
        )
    if teacher.vocab_size < student.tokenizer_size:
        differences["vocabulary"] = (
            f"the teacher predicts {teacher.vocab_size} tokens, fewer than the "
            f"{student.tokenizer_size} that the student's tokenizer has"
        )
    if set(student.end_tokens) != set(teacher.end_tokens):
        differences["end_tokens"] = (
            f"the end tokens differ: student {list(student.end_tokens)}, "
            f"teacher {list(teacher.end_tokens)}"
        )
    if student.chat_template != teacher.chat_template:
        differences["chat_template"] = (
            "the chat templates differ (the student's is used; the teacher sees token ids)"
        )
    return differences


PROBE_TOKENS = 64
"""Of the sequence that weight updates are checked on."""


def probe_tokens(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """A fixed sequence that every weight update is checked on: the engine's log-probs of it must
    equal the learner's. Natural text, where a tokenizer knows its characters: the log-probs of
    improbable tokens are what rounding changes most. Else tokens from all over the vocabulary."""
    if tokenizer is not None:
        ids: list[int] = []
        with suppress(Unencodable), encoding():
            ids = tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)[:PROBE_TOKENS]
        if len(set(ids)) >= 16 and max(ids) < vocab_size:
            return ids
    return [(7 + 7919 * i) % vocab_size for i in range(PROBE_TOKENS)]


@contextmanager
def encoding() -> Iterator[None]:
    """Around what tokenises text.

    Raises:
        Unencodable: the tokenizer has no token for something in it.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # all that the core of `tokenizers` raises is this type
            raise
        raise Unencodable(str(error)) from error


def probe_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean and 90th percentile of the absolute differences between two sets of log-probs of the
    probe, in nats."""
    apart = sorted(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return sum(apart) / len(apart), apart[9 * (len(apart) - 1) // 10]


def _weights_hash(directory: Path) -> str:
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    files = _weight_files(directory)
    if not files:
        raise ModelError(f"{directory} holds no weights (*.safetensors)")
    with ThreadPoolExecutor(_READERS) as readers:
        for file, file_digest in zip(files, readers.map(_file_hash, files), strict=True):
            digest.update(f"{file.name}:{file_digest}".encode())
    return digest.hexdigest()[:16]


def _file_hash(file: Path) -> str:
    """Of all its bytes: about 1 GB/s, so once for each state of the file."""
    known = file.stat()
    return _read_hash(file, known.st_size, known.st_mtime_ns)


@functools.cache
def _read_hash(file: Path, size: int, changed_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def memory_for(path: str) -> bool:
    """Whether this machine has room for the weights of a directory in float32 now."""
    # They are stored in 16 bits or more.
    return 2 * weight_bytes(path) < psutil.virtual_memory().available


def weight_bytes(path: str) -> int:
    """What the weights of a directory take on disk."""
    return sum(file.stat().st_size for file in _weight_files(locate(path)))


def _weight_files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
