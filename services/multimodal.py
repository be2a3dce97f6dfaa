"""The text model inside a multimodal checkpoint: it is trained by itself, and put back with all
else as it was, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_EMBEDDING = "embed_tokens.weight"


def enclosing(config: PretrainedConfig) -> Path | None:
    """The directory of the multimodal model that a loaded text model, whose config this is, was
    taken from; None for one that stands by itself."""
    file = Path(config._name_or_path) / "config.json"
    if not config._name_or_path or not file.is_file():
        return None
    whole = json.loads(file.read_text(encoding="utf-8"))
    inside = (whole.get("text_config") or {}).get("model_type")
    is_part = inside == config.model_type != whole.get("model_type")
    return file.parent if is_part else None


def stored_names(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """What a multimodal checkpoint calls the parameters of its text model.

    Raises:
        ValueError: it does not hold all of them.
    """
    own, stored = list(names), {name for file in _files(directory) for name in _names(file)}
    missing: list[str] = []
    for embedding in sorted(name for name in stored if name.endswith(_EMBEDDING)):
        prefix = embedding.removesuffix(_EMBEDDING)
        mapping = {n: n if n in stored else prefix + n.removeprefix("model.") for n in own}
        missing = [name for name, there in mapping.items() if there not in stored]
        if not missing:
            return mapping
    raise ValueError(
        f"{directory} is a multimodal checkpoint, and the text model inside could not be put back: "
        f"it holds no tensor of {missing[0] if missing else _EMBEDDING}"
    )


def write_around(path: Path, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies a multimodal checkpoint, with these parameters of its text model in place of its own.

    Raises:
        ValueError: the checkpoint does not hold all of them, in these shapes.
    """
    from safetensors.torch import load_file, save_file

    names = {there: name for name, there in stored_names(directory, tensors).items()}
    path.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin"):
            shutil.copy2(file, path)
    for file in _files(directory):
        held = load_file(file)
        for there in names.keys() & held.keys():
            new = tensors[names[there]]
            if new.shape != held[there].shape:
                raise ValueError(f"{directory} holds {there} in another shape than {names[there]}")
            held[there] = new.contiguous()
        save_file(held, path / file.name, metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    settings["dtype"] = settings["text_config"]["dtype"] = dtype
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names: list[str] = opened.keys()
    return names
