"""Small models of configs as they are published: what is tried on them holds for the large ones."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from services import layouts, packed
from services.shrink import shrunken, small_model

_QWEN3_5: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 3584,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    * 6,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "vocab_size": 248320, "tie_word_embeddings": True,
}  # fmt: skip
# Of each: the layout that is right, the kinds of layers, and what its config.json says.
PUBLISHED: dict[str, tuple[str, set[str], dict[str, Any]]] = {
    "qwen3": ("packed", {"full_attention"}, {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": 3072, "max_window_layers": 28,
        "rope_theta": 1000000, "vocab_size": 151936, "architectures": ["Qwen3ForCausalLM"],
    }),
    "gpt_oss": ("packed", {"sliding_attention", "full_attention"}, {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "head_dim": 64,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                         "original_max_position_embeddings": 4096, "truncate": False},
        "quantization_config": {"quant_method": "mxfp4"}, "vocab_size": 201088,
    }),
    "phi3": ("packed", set(), {
        "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064,
        "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    }),
    "jamba": ("rows", {"linear_attention", "full_attention"}, {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "attn_layer_period": 8,
        "attn_layer_offset": 4, "num_experts": 16, "mamba_dt_rank": 256, "vocab_size": 65536,
    }),
    "qwen3_5": ("rows", {"linear_attention", "full_attention"}, {
        "text_config": {"model_type": "qwen3_5_text", **_QWEN3_5},
        "vision_config": {"depth": 12, "hidden_size": 768, "num_heads": 12},
        "architectures": ["Qwen3_5ForConditionalGeneration"],
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_config_is_tried_in_small(family: str) -> None:
    layout, kinds, settings = PUBLISHED[family]
    config = CONFIG_MAPPING[family].from_dict(settings)
    small = shrunken(config)
    text = small.get_text_config()
    assert set(getattr(text, "layer_types", None) or ()) == kinds
    model = small_model(small)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert layouts.proven(packed.prepare(model)).layout == layout
    assert config.get_text_config().hidden_size > 1000  # the large one is left as it was
