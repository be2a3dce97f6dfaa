"""What `scope check` says of the GPU memory that roles need. tests/gpu_emulation compares the
learner's with what is counted; here are hand-computed numbers, refusals and the docs' table."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config

from deploy.config import RunConfig, load
from deploy.memory import Need, Shape, learner, needs
from tests.deploy.conftest import ROOT
from tests.gpu_emulation.step import qwen_1_5b
from trainer.config import LoraConfig, OptimizerConfig, TrainerConfig

SKYWORK_OR1_7B = Qwen2Config(
    vocab_size=152_064, hidden_size=3_584, intermediate_size=18_944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    max_position_embeddings=131_072,
)  # fmt: skip
QWEN3_1_7B = Qwen3Config(
    vocab_size=151_936, hidden_size=2_048, intermediate_size=6_144, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_8B = Qwen3Config(
    vocab_size=151_936, hidden_size=4_096, intermediate_size=12_288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen_1_5b(28),
    "Skywork/Skywork-OR1-7B": SKYWORK_OR1_7B,
    "Qwen/Qwen3-1.7B-Base": QWEN3_1_7B,
    "Qwen/Qwen3-8B": QWEN3_8B,
}


SHIPPED = ("one-gpu", "deepseek-r1-distill-1.5b", "qwen3-1.7b", "eight-24gb")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories with the config.json of each, by its name."""
    made = {}
    for name, config in MODELS.items():
        directory = tmp_path_factory.mktemp("model")
        config.save_pretrained(directory)
        made[name] = str(directory)
    return made


def run(models: dict[str, str], name: str, *overrides: str) -> RunConfig:
    """A shipped config, with models that are on this machine."""
    config = load(ROOT / f"deploy/runs/{name}.yaml", overrides)
    teachers = {
        key: one.model_copy(update={"model": models[one.model]})
        for key, one in config.teachers.items()
    }
    return config.model_copy(update={"student": models[config.student], "teachers": teachers})


def by_role(config: RunConfig) -> dict[str, Need]:
    return {need.who: need for need in needs(config, config.served)}


def test_a_shape_is_what_config_json_says(models: dict[str, str]) -> None:
    shape = Shape.of(models["Skywork/Skywork-OR1-7B"])
    assert shape.parameters == 7_615_616_512  # as its model card's files have
    assert shape.cached == 2 * 28 * 4 * 128
    matrices = 2 * (3_584 + 3_584) + 2 * (3_584 + 512) + 3 * (3_584 + 18_944)
    assert shape.lora == 28 * matrices
    assert (
        Shape.of(models["Qwen/Qwen3-1.7B-Base"]).parameters == 1_720_574_976
    )  # tied, counted once


@pytest.mark.parametrize("name", SHIPPED)
def test_everything_fits_as_shipped(models: dict[str, str], name: str) -> None:
    roles = by_role(run(models, name))
    assert set(roles) == {"learner", "rollout", "teacher"}
    assert all(need.fits and need.has is not None for need in roles.values())


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, 1_800 if name == "one-gpu" else 3_000) for name in SHIPPED]
)
def test_a_sampler_begins_no_more_than_its_cache_holds(
    models: dict[str, str], name: str, tokens: int
) -> None:
    """Answers of so many tokens on average; and it is offered as many as it begins."""
    config = run(models, name)
    need, places = by_role(config)["rollout"], config.rollout.engine.args["max_num_seqs"]
    assert places == config.rollout.capacity * config.sampling.n
    one = need.parts["cache of one sequence"] / config.longest  # bytes of a token
    room = (need.has or 0) - sum(need.parts.values()) + one * config.longest
    assert places * tokens * one < room


def test_parts_of_one_gpu_of_80_gb(models: dict[str, str]) -> None:
    roles = by_role(run(models, "one-gpu"))
    weights, cache = 2 * 7_615_616_512, 6_145 * 2 * 2 * 28 * 4 * 128
    assert roles["teacher"].parts == {
        "weights": weights, "cache of one sequence": cache, "vLLM": 3e9,
    }  # fmt: skip
    assert roles["teacher"].has == pytest.approx(80e9 * 0.92 * 0.37, rel=1e-2)


@pytest.mark.parametrize(
    ("override", "knob"),
    [
        ("trainer.micro_batch_tokens=32768", "set trainer.micro_batch_tokens to 6144"),
        ("trainer.gradient_checkpointing=false", "set trainer.gradient_checkpointing to true"),
        ("trainer.resources.gpus=0.4", "raise trainer.resources.gpus to 0.42"),
        ("teacher.resources.gpus=0.2", "raise teacher.resources.gpus"),
        ("rollout.resources.gpus=0.04", "raise rollout.resources.gpus"),
        ("ray.gpu_memory_gb=24 trainer.resources.gpus=1", "set trainer.optimizer.offload to true"),
        ("ray.gpu_memory_gb=16 trainer.resources.gpus=1", "set trainer.offload to true"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_knob(
    models: dict[str, str], override: str, knob: str
) -> None:
    refused = [str(need) for need in by_role(run(models, "one-gpu", *override.split())).values()
               if not need.fits]  # fmt: skip
    assert any(knob in sentence for sentence in refused), refused


L4 = ("teacher.max_sequence_tokens=null",)


def test_a_teachers_whole_context_does_not_start_on_an_l4(models: dict[str, str]) -> None:
    """22.1 GB are vLLM's: 15.2 GB of weights and 3 of its own leave room for 67,000 tokens."""
    own_prompt = ("teacher.context=Solve {prompt}", *L4)
    need = by_role(run(models, "eight-24gb", *own_prompt))["teacher"]
    assert need.parts["cache of one sequence"] == 131_073 * 2 * 2 * 28 * 4 * 128
    assert not need.fits and "lower teacher.max_sequence_tokens" in str(need)
    told = "teacher.context=Solve {prompt}"
    assert by_role(run(models, "eight-24gb", told))["teacher"].fits  # 14,336, as it says


def test_a_teacher_that_reads_what_the_student_read_gets_the_runs_longest(
    models: dict[str, str],
) -> None:
    need = by_role(run(models, "eight-24gb", *L4))["teacher"]
    assert need.fits
    assert need.parts["cache of one sequence"] == (2_048 + 12_288 + 1) * 57_344


@pytest.mark.parametrize(
    ("overrides", "knob"),
    [
        (
            ("rollout.engine.args.max_model_len=700000",),
            "lower rollout.engine.args.max_model_len",
        ),
        (
            (
                "evaluation.data={path: x, max_prompt_tokens: 2048}",
                "evaluation.sampling={max_tokens: 700000}",
            ),
            "lower evaluation.sampling.max_tokens",
        ),
    ],
)
def test_a_sequence_for_which_vllm_has_no_room_is_refused(
    models: dict[str, str], overrides: tuple[str, ...], knob: str
) -> None:
    need = by_role(run(models, "eight-24gb", *overrides))["rollout"]
    assert not need.fits and knob in str(need)


def test_a_gpu_that_nobody_knows_refuses_nothing(models: dict[str, str]) -> None:
    config = run(models, "one-gpu", "ray={}", "trainer.gradient_checkpointing=false")
    need = by_role(config)["learner"]
    assert need.fits and "needs 50.1 GB" in str(need) and "has" not in str(need)


def test_rays_accelerator_type_tells_the_memory(models: dict[str, str]) -> None:
    custom = "rollout.resources.custom={'accelerator_type:L4': 0.001}"
    assert by_role(run(models, "one-gpu", "ray={}", custom))["rollout"].has == pytest.approx(
        24e9 * 0.92 * 0.18, rel=1e-2
    )


def test_ranks_offload_and_adapters_hold_less(models: dict[str, str]) -> None:
    shape = Shape.of(models["Qwen/Qwen3-8B"])
    held = {
        name: sum(list(learner(shape, TrainerConfig(**settings), 4_096).values())[:3])
        for name, settings in {
            "one": {}, "four": {"ranks": 4}, "ddp": {"ranks": 4, "parallel": "ddp"},
            "offload": {"offload": True}, "lora": {"lora": LoraConfig(rank=8)},
            "moments": {"optimizer": OptimizerConfig(offload=True)},
        }.items()
    }  # fmt: skip
    assert held["one"] == held["ddp"] == 16 * shape.parameters == 4 * held["four"]
    assert held["offload"] == 0 and held["moments"] == held["one"] / 2
    assert held["lora"] == 4 * shape.parameters + 16 * 8 * shape.lora


@pytest.mark.parametrize(
    ("settings", "compute"),
    [({"autocast": "bfloat16"}, 2), ({"dtype": "bfloat16"}, 2), ({}, 4),
     ({"autocast": "bfloat16", "offload": True, "ranks": 1}, 2)],
)  # fmt: skip
def test_shards_hold_whole_gradients_in_float32_until_they_travel(
    models: dict[str, str], settings: dict[str, Any], compute: int
) -> None:
    """4 bytes of each parameter, as tests/trainer/test_student.py finds them; and, gathered in
    the precision of the computation, both ends of the model and two of its layers."""
    shape = Shape.of(models["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"])
    end = 151_936 * 1_536
    layer = (1_777_088_000 - end) / 28
    parts = learner(shape, TrainerConfig(**{"ranks": 4, **settings}), 4_096)
    assert parts["unsharded"] == 4 * 1_777_088_000 + compute * (2 * end + 2 * layer)
    assert learner(shape, TrainerConfig(ranks=4, parallel="ddp"), 4_096)["unsharded"] == 0


def test_what_is_sent_from_the_learners_gpu_lies_there(models: dict[str, str]) -> None:
    """Two versions in the engines' bfloat16, and vLLM's two buffers of 1 GiB."""
    stored, sent = (
        by_role(run(models, "one-gpu", f"rollout.engine.weight_transfer={way}"))["learner"]
        for way in ("store", "ipc")
    )
    more = sum(sent.parts.values()) - sum(stored.parts.values())
    assert more == pytest.approx(2 * 2 * 1_777_088_000 + 2 * 2**30)
    assert stored.fits and not sent.fits


def test_the_page_on_sizing_says_the_same(models: dict[str, str]) -> None:
    page = (ROOT / "docs/sizing.md").read_text(encoding="utf-8")
    for name in SHIPPED:
        for who, need in by_role(run(models, name)).items():
            needed = sum(need.parts.values()) / 1e9
            row = next(
                line for line in page.splitlines() if line.startswith(f"| `{name}` | {who} ")
            )
            assert f"| {needed:.1f} GB |" in row, f"{row}: {needed:.1f}"
