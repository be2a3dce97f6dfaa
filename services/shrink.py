"""A model in small: the same class, flags and kinds of layers as a config says, and sizes so small
that it is made and run in a fraction of a second. What it shows of layouts holds for the large one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from services import layouts

# What a setting of this name is at most, wherever a family has it.
_SIZES = """
64: mamba_d_ssm vocab_size decoder_vocab_size vocab_size_per_layer_input max_target_positions
256: max_position_embeddings n_positions max_seq_len n_ctx context_length
    original_max_position_embeddings
32: hidden_size d_model n_embd embedding_size input_embedding_size output_embedding_size
    word_embed_proj_dim emb_dim lru_width embedding_dim dim_model_base
    query_pre_attn_scalar d_rel ple_embed_dim hidden_size_per_layer_input backbone_hidden_size
48: intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dim_ff dff
    intermediate_size_mlp dense_intermediate_size feed_forward_size d_inner
    shared_intermediate_size
16: moe_intermediate_size kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_headdim
    mamba_head_dim laurel_rank expert_ffn_hidden_size shared_expert_intermediate_size
    moe_shared_expert_intermediate_size adapter_rank index_block_size router_hidden_size
    gated_norm_rank hc_lowrank linear_head_dim time_step_rank mamba_dt_rank rel_extent
    index_n_heads index_head_dim chunk_size mamba_chunk_size block_size
8: head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state ssm_state_size state_size
    linear_key_head_dim linear_value_head_dim swa_head_dim kv_channels dim_head d_head
    attention_head_size block_multiple_of rotary_dim ffn_round_up_to_multiple_of
4: num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
    encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts
    n_routed_experts num_local_experts moe_num_experts linear_num_value_heads mamba_n_heads
    mamba_num_heads linear_num_heads swa_num_attention_heads zero_expert_num
2: num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_decoder_layers num_encoder_layers num_blocks num_experts_per_tok moe_topk moe_k
    num_experts_per_token linear_num_key_heads o_groups n_groups num_layers_per_stack
    swa_num_key_value_heads n_mamba_heads index_topk_blocks hc_mult num_hash_layers
1: n_group topk_group first_k_dense_replace num_dense_layers moe_layer_start_index
6: sliding_window sliding_window_size attention_window_size window_size local_attention
    attention_chunk_size index_topk
"""
_AT_MOST: dict[str, int] = {}
for _word in _SIZES.split():
    if _word.endswith(":"):
        _size = int(_word[:-1])
    else:
        _AT_MOST[_word] = _size
_DEPTHS = [name for name in _AT_MOST if name.endswith(("layers", "n_layer"))]
_KINDS = ("layer_types", "layers_block_type")  # lists of a kind for each layer
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_PER_FREQUENCY = {"short_factor", "long_factor"}  # of rotary embeddings, one for two dimensions
# What a config says of its file, which is not the small model's.
_OF_THE_FILE = {
    "architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype",
    "transformers_version",
}  # fmt: skip

# What a family needs that its config does not say or that cannot be made small by name.
_HYBRID = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _HYBRID,
    "lfm2_moe": {**_HYBRID, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "ple_layer_ids": [1], "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {**_ZAMBA, "n_mamba_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip

FAILURES = (*layouts.FAILURES, ImportError, OSError, StrictDataclassError)
"""What is raised of a config that makes no small model."""


def shrunken(config: PretrainedConfig, special: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config with a layer of every kind, and sizes as small as can be.

    Args:
        config: of any size.
        special: settings that a family needs to be small, by name; those of a config within the
            config stand under its name.

    Raises:
        FAILURES: its family's config does not take them.
    """
    kinds = _layer_kinds(config)
    for depth in (0, 4, 8, 16, 32):
        small = _smaller(config, special or {}, depth)
        if _layer_kinds(small) >= kinds:
            break
    return small


def _layer_kinds(config: PretrainedConfig) -> set[str]:
    text = config.get_text_config()
    return {str(kind) for name in _KINDS for kind in getattr(text, name, None) or ()}


def _smaller(config: PretrainedConfig, special: dict[str, Any], at_least: int) -> PretrainedConfig:
    """With `at_least` so many layers, where their kinds do not stand in a list but follow from
    their number."""
    usual = vars(config)
    changed: dict[str, Any] = {}
    depth_name = next((name for name in _DEPTHS if name in usual), "")
    depth = usual.get(depth_name) or max(len(usual.get(name) or ()) for name in _KINDS)
    per_layer = {
        name: value
        for name, value in usual.items()
        if isinstance(value, list | tuple) and depth > 2 and len(value) == depth
    }
    kinds = [str([value[i] for value in per_layer.values()]) for i in range(depth)]
    kept = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    kept = kept if len(kept) > 1 else [0, 1]
    kept = kept if len(kept) >= at_least else list(range(min(at_least, depth)))
    for name, value in usual.items():
        if name in _IDS and not isinstance(value, list):
            changed[name] = _IDS[name]
        elif isinstance(value, PretrainedConfig):
            changed[name] = _smaller(value, special.get(name, {}), at_least)
        elif name in per_layer:
            changed[name] = [_small(name, value[index], usual) for index in kept]
        elif isinstance(value, dict) and not _PER_FREQUENCY.isdisjoint(value):
            changed[name] = {"rope_type": "default", "rope_theta": value.get("rope_theta", 1e4)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            small = len(kept) if name == depth_name else _small(name, value, usual)
            if small != value:
                changed[name] = small
    plain = {
        name: value
        for name, value in special.items()
        if not isinstance(value, dict) or isinstance(usual.get(name), dict)
    }
    return type(config)(**{**_own(config), **changed, **plain})


def _own(config: PretrainedConfig) -> dict[str, Any]:
    """What was set of a config, without what follows from its other settings."""
    usual, family = vars(type(config)()), type(config)
    return {
        name: value
        for name, value in vars(config).items()
        if name in family.__dataclass_fields__
        and name not in _OF_THE_FILE
        and not isinstance(value, PretrainedConfig)
        and value != usual.get(name)
    }


def _small(name: str, value: Any, usual: dict[str, Any]) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    if name in ("num_key_value_heads", "num_kv_heads"):
        return 2 if value < usual.get("num_attention_heads", value + 1) else 4
    return min(value, _AT_MOST[name]) if name in _AT_MOST else value


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal model of a config that is small already, on the CPU in float32. Its weights are
    random, and spread wider than usual, or mistakes would hardly show.

    Raises:
        FAILURES: there is no such model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        factory: Any = AutoModelForCausalLM
        small = factory.from_config(copy.deepcopy(config), dtype=torch.float32)
        model: PreTrainedModel = small.float().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.2)
                else:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def needed_by(config: PretrainedConfig) -> dict[str, Any]:
    """What a family needs, for `shrunken`; nothing, of most."""
    text = config.get_text_config()
    needed = SPECIAL.get(text.model_type, {})
    return needed if text is config or not needed else {"text_config": needed}


def small_of(config: PretrainedConfig) -> PreTrainedModel:
    """A small model of a published config, which computes. Where the config alone makes none, with
    what `SPECIAL` says of its family.

    Raises:
        FAILURES: there is no such model.
    """
    try:
        return _computing(shrunken(config))
    except FAILURES:
        if not (needed := needed_by(config)):
            raise
        return _computing(shrunken(config, needed))


@torch.no_grad()
def _computing(config: PretrainedConfig) -> PreTrainedModel:
    model: Any = small_model(config)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    return model  # type: ignore[no-any-return]
