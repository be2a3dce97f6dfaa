"""Hugging Face directories: loading and writing them, telling them apart, and whether two fit
together."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # fingerprints must not cost an import of torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_EDGE = 1 << 20  # bytes hashed at each end of a weight file: whole files would take minutes


class ModelError(ValueError):
    """A model directory cannot be used; the message says which and why."""


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
        raise ModelError(f"{path} is no local directory, and the hub said: {error}") from error


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
    """Writes a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads."""
    import torch
    from transformers import AutoModelForCausalLM

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


def end_tokens(path: str) -> tuple[int, ...]:
    """Token ids that end a completion, from the generation config or else the config."""
    directory = locate(path)
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    raise ModelError(f"{path} names no end token (eos_token_id)")


def fingerprint(path: str) -> Fingerprint:
    """Identifies a model directory without loading its weights."""
    directory = locate(path)
    config = json.loads((directory / "config.json").read_text())
    config = config.get("text_config") or config
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


def differences(student: Fingerprint, teacher: Fingerprint) -> dict[str, str]:
    """What keeps `teacher` from scoring `student`'s tokens: aspect -> one sentence."""
    found: dict[str, str] = {}
    if student.tokenizer_size != teacher.tokenizer_size:
        found["tokenizer"] = (
            f"the tokenizers differ: the student's has {student.tokenizer_size} tokens, "
            f"the teacher's {teacher.tokenizer_size}"
        )
    elif student.tokenizer != teacher.tokenizer:
        found["tokenizer"] = (
            f"the tokenizers differ: {student.tokenizer_size} tokens each, but not the same ids"
        )
    if teacher.vocab_size < student.tokenizer_size:
        found["vocabulary"] = (
            f"the teacher predicts {teacher.vocab_size} tokens, fewer than the "
            f"{student.tokenizer_size} that the student's tokenizer has"
        )
    if set(student.end_tokens) != set(teacher.end_tokens):
        found["end_tokens"] = (
            f"the end tokens differ: student {list(student.end_tokens)}, "
            f"teacher {list(teacher.end_tokens)}"
        )
    if student.chat_template != teacher.chat_template:
        found["chat_template"] = (
            "the chat templates differ (the student's is used; the teacher sees token ids)"
        )
    return found


def probe_tokens(vocab_size: int, length: int = 32) -> list[int]:
    """A fixed sequence, spread over the whole vocabulary, that every weight update is checked
    on: the engine's log-probs of it must equal the learner's."""
    return [(7 + 7919 * i) % vocab_size for i in range(length)]


def probe_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest absolute difference between two sets of log-probs of the probe, in nats; NaN when
    one of them is no number."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan


def _weights_hash(directory: Path) -> str:
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    files = _weight_files(directory)
    if not files:
        raise ModelError(f"{directory} holds no weights (*.safetensors)")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()[:16]


def _weight_files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
