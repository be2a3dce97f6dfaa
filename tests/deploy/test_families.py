"""What is said of a run's models by their configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.config import RunConfig
from deploy.families import Look, looks
from tests.builders import VOCAB


def of_family(directory: Path, family: str, **settings: Any) -> str:
    """A directory with nothing but the config of a model of this family."""
    directory.mkdir()
    own = {"model_type": family, "vocab_size": VOCAB, "eos_token_id": 1, "pad_token_id": 0}
    (directory / "config.json").write_text(json.dumps(own | settings), encoding="utf-8")
    return str(directory)


def looked_at(student: str, teacher: str | None = None, **sections: Any) -> list[Look]:
    """Of a run with prompts of up to 16 tokens and answers of up to 8."""
    engine = {"kind": "transformers"}
    config = RunConfig.model_validate(
        {
            "name": "test",
            "student": student,
            "data": {"path": "rows.jsonl", "max_prompt_tokens": 16},
            "sampling": {"n": 2, "max_tokens": 8},
            "rollout": {"engine": engine},
            "verifier": {"kind": "exact"},
            "teachers": {"default": {"model": teacher, "engine": engine}} if teacher else {},
            "trainer": {"objective": {"kind": "opd" if teacher else "grpo"}},
            **sections,
        }
    )
    return looks(config, config.served)


def test_lengths_that_would_turn_a_rotary_embedding_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi = of_family(
        tmp_path / "phi", "phi3", rope_scaling=rope, hidden_size=3072, num_attention_heads=32,
        max_position_embeddings=131072, original_max_position_embeddings=24,
    )  # fmt: skip
    for look in looked_at(phi, phi):
        assert look.said.startswith("phi3; layout packed") and not look.wrong
    for look in looked_at(phi, phi, sampling={"n": 2, "max_tokens": 9}):
        assert look.said.startswith("phi3: 25 tokens are more than 24, where") and look.wrong
    (student,) = looked_at(phi, rollout={"engine": {"kind": "vllm"}})
    assert student.said.startswith("phi3: set rollout.engine.args.max_model_len to 24 or less")
    args = {"max_model_len": 24}
    (student,) = looked_at(phi, rollout={"engine": {"kind": "vllm", "args": args}})
    assert student.said.endswith("sampled from by vllm")


def test_a_family_that_its_config_alone_does_not_make_small_is_tried_too(tmp_path: Path) -> None:
    attention = {"model_type": "", "kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000}
    experts = {"model_type": "", "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}
    dbrx = of_family(
        tmp_path / "dbrx", "dbrx", d_model=6144, n_heads=48, n_layers=40, max_seq_len=32768,
        attn_config=attention, ffn_config=experts,
    )  # fmt: skip
    (teacher,) = looked_at(dbrx, dbrx)[1:]  # a student's weights would be wanted
    assert teacher.said.startswith("dbrx; layout packed; ")


def test_what_cannot_be_tried_in_small_is_said_with_the_reason(tmp_path: Path) -> None:
    odd = of_family(tmp_path / "odd", "qwen3", hidden_act="cubic")
    for look in looked_at(odd, odd):
        said = "its layout is proven when it is loaded: it cannot be made small ('cubic')"
        assert look.said == f"qwen3; {said}" and not look.wrong
