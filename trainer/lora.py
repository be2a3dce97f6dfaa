"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: only they are trained.

Whoever samples sees full weights all the same: they are merged tensor by tensor, W + s·BA, into
what is published, and the model that trains is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from trainer.config import LoraConfig

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_TIED = ("lm_head", "embed_tokens")


def attach(model: PreTrainedModel, config: LoraConfig) -> None:
    """Puts adapters into `model`, in place, and freezes all the rest. Their start depends on
    torch's seed, and changes nothing that the model computes.

    Raises:
        ValueError: a target is not in the model, or is its output or its embedding; or peft puts
            adapters around whole layers of experts, which nothing here merges.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    if refused := set(config.targets) & set(_TIED) if not isinstance(config.targets, str) else ():
        raise ValueError(f"trainer.lora.targets must not name {', '.join(sorted(refused))}")
    before = {name for name, _ in model.named_parameters()}
    peft.inject_adapter_in_model(_peft_config(config), model)
    after = {n.replace(_BASE, ".") for n, _ in model.named_parameters() if ".lora_" not in n}
    if before != after:
        raise ValueError(
            "trainer.lora.targets: adapters of experts cannot be merged; name the attention's "
            "layers, such as [q_proj, k_proj, v_proj, o_proj]"
        )
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast would only undo it: what comes in is in the precision that is computed in.
            module.cast_input_dtype_enabled = False


def merged(
    parameters: Mapping[str, Tensor], config: LoraConfig, full: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of each parameter of the model without adapters, one by one.

    Args:
        parameters: those of the model with adapters, in its order; they may be shards.
        full: a parameter as a whole tensor; called in the same order on every rank.
    """
    for name, parameter in parameters.items():
        if name.endswith((_A, _B)):
            continue
        weight = full(parameter)
        stem = name.removesuffix(f"{_BASE}weight")
        if stem + _A in parameters:
            a, b = full(parameters[stem + _A]), full(parameters[stem + _B])
            delta = config.alpha / config.rank * (b.float() @ a.float())
            weight = (weight.float() + delta).to(weight.dtype)
        yield name.replace(_BASE, "."), weight


def adapters(
    parameters: Mapping[str, Tensor], full: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The adapters alone, whole and on the CPU, under peft's names."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": full(p).cpu()
        for name, p in parameters.items()
        if name.endswith((_A, _B))
    }


def write_adapters(path: Path, tensors: dict[str, Tensor], config: LoraConfig, base: str) -> None:
    """Writes a directory that `PeftModel.from_pretrained(base model, path)` loads."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    made = _peft_config(config)
    made.base_model_name_or_path = base
    made.inference_mode = True
    made.save_pretrained(path)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(config: LoraConfig):  # type: ignore[no-untyped-def]
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else [*config.targets],
        task_type="CAUSAL_LM",
    )
