"""What is said before anything starts, of models on this machine and of those on servers."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from deploy.config import ConfigError, RunConfig
from deploy.endpoints import lacks
from deploy.other_tokenizers import end_of_turn
from deploy.preflight import Preflight, check, in_own_process
from services.models import fingerprint, load_tokenizer
from services.redis_server import EmbeddedRedis
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.config import TeacherConfig
from teacher.retokenizer import Retokenizer
from teacher.scorer import model_card
from tests.builders import VOCAB, save_tiny, tiny_model, tiny_tokenizer
from tests.teacher.fakes import FakeScorer, listening
from tests.waiting import DEADLINE_S
from trainer.objectives.config import ObjectiveConfig

ROWS = ("sums", "code", "sums")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, two teachers for it, and one with another tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    made = {
        name: save_tiny(directory / name, seed) for seed, name in enumerate(("student", "a", "b"))
    }
    return made | {"odd": save_tiny(directory / "odd", 3, vocab=VOCAB - 1)}


Checked = Callable[..., Preflight]


@pytest.fixture
def checked(models: dict[str, Path], tmp_path: Path) -> Checked:
    """Checks a run of three rows, with these teachers."""

    def run(
        teachers: Any,
        *,
        kind: str = "opd",
        named: str | None = None,
        objective: Any = None,
        **sections: Any,
    ) -> Preflight:
        rows = [
            {
                "prompt": [{"role": "user", "content": "1+2="}],
                "data_source": source,
                "reward_model": {"ground_truth": "3"},
                "extra_info": {"teacher": named} if source == "code" else {},
            }
            for source in ROWS
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check(
            RunConfig.model_validate(
                {
                    "name": "test",
                    "student": str(models["student"]),
                    "data": {"path": file, "max_prompt_tokens": 16, "shuffle": False},
                    "sampling": {"n": 2, "max_tokens": 8},
                    "rollout": {"engine": {"kind": "transformers"}},
                    "verifier": {"kind": "exact"},
                    "teachers": teachers or {},
                    "trainer": {"objective": {"kind": kind, **(objective or {})}},
                    **sections,
                }
            )
        )

    return run


def of(model: Path, **others: Path) -> dict[str, Any]:
    """Teachers by name."""
    engine = {"kind": "transformers"}
    named = {"default": model, **others}
    return {name: {"model": str(one), "engine": engine} for name, one in named.items()}


def test_every_teacher_is_compared_with_the_student(
    models: dict[str, Path], checked: Checked
) -> None:
    found = checked(of(models["a"], code=models["b"]))
    assert found.fingerprints == {
        "default": fingerprint(str(models["a"])).model, "code": fingerprint(str(models["b"])).model,
    }  # fmt: skip
    assert [found.train.prompt(order).teacher for order in range(3)] == [
        "default",
        "code",
        "default",
    ]
    with pytest.raises(ConfigError, match=r"^teacher code: the tokenizers differ: .* 24 .* 23"):
        checked(of(models["a"], code=models["odd"]))
    with pytest.raises(ConfigError, match=r"^the tokenizers differ"):
        checked(of(models["odd"]))
    with pytest.raises(ConfigError, match=r"/nowhere is not a model directory"):
        checked(of(models["a"], code=Path("/nowhere")))


def test_what_the_objective_asks_and_the_teacher_does_not_give_is_said(
    models: dict[str, Path], checked: Checked
) -> None:
    found = checked(of(models["a"]), kind="vopd", objective={"top_k": VOCAB})
    assert found.train.prompt(0).sampling.top == VOCAB  # the rollout records them
    with pytest.raises(ConfigError, match=rf"^the teacher gives at most {VOCAB} tokens at each"):
        checked(of(models["a"]), kind="vopd", objective={"top_k": VOCAB + 1})
    engine = {"model": str(models["a"]), "engine": {"kind": "vllm"}}
    on_cpu, on_gpu = (
        model_card(TeacherConfig.model_validate({**engine, "resources": {"gpus": n}})).limits
        for n in (0, 1)
    )
    asked = ObjectiveConfig.model_validate({"kind": "vopd", "top_k": 4})
    assert lacks("it", asked, on_gpu) == []
    (problem,) = lacks("it", asked, on_cpu)
    assert problem.startswith("it does not score the tokens that the student finds most likely")
    (problem,) = lacks("it", ObjectiveConfig.model_validate({"kind": "eopd", "top_k": 4}), on_gpu)
    assert problem.startswith("it tells no entropy over the vocabulary")


def test_a_student_that_predicts_more_tokens_may_name_some_that_the_teacher_lacks(
    models: dict[str, Path], checked: Checked, tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "wide")
    wide = tiny_model(vocab=VOCAB + 8)
    wide.save_pretrained(student)
    with pytest.raises(ConfigError, match=rf"^the teacher predicts {VOCAB} tokens, the student"):
        checked(of(models["a"]), kind="vopd", objective={"top_k": 4}, student=str(student))
    teachers = {"top_k": 4, "top_k_of": "teacher"}
    checked(of(models["a"]), kind="vopd", objective=teachers, student=str(student))


def test_one_context_of_each_source_is_shown(models: dict[str, Path], checked: Checked) -> None:
    teachers = of(models["a"], code=models["b"])
    teachers["code"]["context"] = "{reference};{prompt}"
    found = checked(teachers)
    assert found.contexts == {"code": "3;1+2="}
    assert [found.train.prompt(order).teacher_context is None for order in range(3)] == [
        True, False, True,
    ]  # fmt: skip
    teachers["code"] |= {"max_sequence_tokens": 13, "model": str(models["b"])}
    assert len(checked(teachers).train) == 2  # 6 tokens of context and 8 of an answer
    with pytest.raises(
        ConfigError, match=r"'kd' samples from the teacher.*leave out its context, weights and"
    ):
        checked({"default": {**teachers["code"], "max_sequence_tokens": None}}, kind="kd")


def test_a_teacher_with_another_tokenizer_reads_prompts_of_its_own(
    models: dict[str, Path], checked: Checked
) -> None:
    teachers = of(models["odd"], code=models["b"])
    for one in teachers.values():
        one["tokenizer"] = "own"
    found = checked(teachers)
    assert {*found.translators} == {"default"}  # the other's is the student's
    assert isinstance(found.translators["default"], Retokenizer)
    theirs = [found.train.prompt(order).teacher_context for order in range(3)]
    expected = load_tokenizer(str(models["odd"]))("1+2=")["input_ids"]
    assert theirs[1] is None
    for ids in (theirs[0], theirs[2]):
        assert ids is not None and ids.tolist() == expected
    teachers["default"]["context"] = "{reference};{prompt}"
    assert checked(teachers).contexts["sums"] == "3;1+2="


@pytest.mark.parametrize("kind", ["scope", "opd", "kdrl", "sg_opd", "tgopd"])
def test_objectives_that_read_log_ratios_take_any_tokenizer(
    models: dict[str, Path], checked: Checked, kind: str
) -> None:
    teachers = of(models["odd"])
    teachers["default"]["tokenizer"] = "own"
    assert checked(teachers, kind=kind).translators
    first_error = {"objective": {"kind": "scope", "first_error": 1.0}}
    assert checked(teachers, trainer=first_error).translators


@pytest.mark.parametrize(
    "objective",
    [
        *({"kind": kind} for kind in ("power_opd", "iw_opd", "vopd", "ta_opd", "eopd", "srpo")),
        {"kind": "scope", "divergence": "jsd"},
    ],
    ids=str,
)
def test_the_others_refuse_another_tokenizer(
    models: dict[str, Path], checked: Checked, objective: dict[str, Any]
) -> None:
    teachers = of(models["odd"])
    teachers["default"]["tokenizer"] = "own"
    with pytest.raises(ConfigError, match=rf"^the objective '{objective['kind']}' with divergence"):
        checked(teachers, trainer={"objective": objective})


def test_what_another_tokenizer_needs_is_one_sentence(
    models: dict[str, Path], checked: Checked, tmp_path: Path
) -> None:
    plain = save_tiny(tmp_path / "plain", 3, vocab=VOCAB - 1)
    (plain / "chat_template.jinja").unlink()
    for model, message in ((plain, "has none"), (models["odd"], "answers of one turn: leave out")):
        teachers = of(model)
        teachers["default"]["tokenizer"] = "own"
        world = {} if model == plain else {"environment": {"kind": "python"}}
        with pytest.raises(ConfigError, match=message):
            checked(teachers, **world)
    teachers = of(models["odd"])
    teachers["default"]["tokenizer"] = "own"
    with pytest.raises(ConfigError, match=r"'kd' samples from the teacher.* and tokenizer$"):
        checked(teachers, kind="kd")


@pytest.mark.parametrize(
    ("turn", "expected"), [("{{ m['content'] }}<turn>", "<turn>"), ("{{ m['content'] }}", "<doc>")]
)
def test_the_end_of_an_answer_is_that_of_the_chat_template(turn: str, expected: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<doc>", "<call>", "<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}" + turn + "\n{% endfor %}"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<doc>", "<call>", "<turn>")]
    found = end_of_turn(tokenizer, ends)
    assert tokenizer.convert_ids_to_tokens(found) == expected


def test_a_row_that_names_no_teacher_of_the_run_is_one_sentence(
    models: dict[str, Path], checked: Checked
) -> None:
    teachers = of(models["a"], coding=models["b"])
    assert checked(teachers, named="coding").train.prompt(1).teacher == "coding"
    with pytest.raises(ConfigError) as caught:
        checked(teachers, named="codin")
    assert str(caught.value).endswith(
        "rows.jsonl, line 2: extra_info.teacher: this run has no teacher 'codin'; "
        "did you mean 'coding'?"
    )
    assert checked(teachers, named="codin", kind="grpo")  # asks none


def test_an_environment_that_the_student_cannot_answer_is_one_sentence(
    models: dict[str, Path], checked: Checked
) -> None:
    with pytest.raises(ConfigError, match=r"^environment: the chat template does not end a turn"):
        checked(of(models["a"]), environment={"kinds": {"code": "python"}})
    with pytest.raises(ConfigError, match=r"^environment: 'nowhere:world': No module named"):
        checked(of(models["a"]), environment={"kind": "nowhere:world"})


def test_a_score_cache_that_evicts_nothing_is_warned_of(
    models: dict[str, Path], checked: Checked, redis_server: EmbeddedRedis
) -> None:
    teachers = of(models["student"])
    teachers["default"]["cache"] = {"url": redis_server.url}
    (said,) = [w for w in checked(teachers).warnings if "score cache" in w]
    assert "never evicts a score (maxmemory 0, maxmemory-policy noeviction)" in said


@pytest.mark.parametrize("kind", ["grpo", "rft"])
def test_an_objective_that_asks_no_teacher_needs_none(checked: Checked, kind: str) -> None:
    for teacher in (None, of(Path("/nowhere"))):
        assert checked(teacher, kind=kind).fingerprints == {}


@pytest.mark.parametrize("kind", ["scope", "opd", "kdrl", "kd"])
def test_the_others_need_one(checked: Checked, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^the objective '{kind}' needs a teacher: set teacher"):
        checked(None, kind=kind)


def test_kd_samples_from_one_teacher_that_is_here(
    models: dict[str, Path], checked: Checked
) -> None:
    assert checked(of(models["a"]), kind="kd").fingerprints == {}
    with pytest.raises(ConfigError, match=r"'kd' samples from one teacher: leave out the others"):
        checked(of(models["a"], code=models["b"]), kind="kd")
    with pytest.raises(ConfigError, match=r"^the tokenizers differ"):
        checked(of(models["odd"]), kind="kd")
    with pytest.raises(ConfigError, match=r"/nowhere is not a model directory"):
        served = {"model": "/nowhere", "endpoints": ["http://127.0.0.1:1"]}
        checked({"default": served}, kind="kd")


# -------------------------------------------------- a model that only its servers have


Serve = Callable[[FastAPI], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(listening(app))


def ours(model: Path) -> FastAPI:
    """A server of this project, as it describes itself."""
    card = model_card(TeacherConfig(model=str(model)))
    return build_app(
        [Teacher(card, FakeScorer())],
        KeyRing(["the-key"]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=1000),
    )


def vllms() -> FastAPI:
    """What `vllm serve` tells of its models."""
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [{"id": "x"}]})
    return app


def elsewhere(*urls: str) -> dict[str, Any]:
    ends = [{"url": url, "key_env": "TEACHER_KEY"} for url in urls]
    return {"default": {"model": "/not/here", "endpoints": ends}}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "the-key")


def test_a_server_of_ours_tells_all_that_is_compared(
    models: dict[str, Path], checked: Checked, serve: Serve
) -> None:
    a, b, odd = (serve(ours(models[name])) for name in ("a", "b", "odd"))
    found = checked(elsewhere(a, serve(vllms())))
    assert found.fingerprints == {"default": fingerprint(str(models["a"])).model}
    assert found.warnings == []
    with pytest.raises(ConfigError, match=r"^the tokenizers differ: the student's has 24 tokens"):
        checked(elsewhere(odd))
    with pytest.raises(ConfigError, match=r"^the endpoints of /not/here serve different models; "):
        checked(elsewhere(a, b))


def test_what_a_server_does_not_tell_is_said_and_not_compared(
    checked: Checked, serve: Serve
) -> None:
    found = checked(elsewhere(serve(vllms())))
    assert found.fingerprints == {"default": None}
    assert found.warnings == [
        "the teacher is not on this machine and its servers do not tell: its tokenizer, "
        "vocabulary, end tokens and chat template could not be compared with the student's"
    ]


def test_without_directory_and_server_nothing_can_be_said(checked: Checked) -> None:
    with pytest.raises(ConfigError, match=r"^/not/here is not on this machine, and .* reached"):
        checked(elsewhere("http://127.0.0.1:1"))


def test_a_directory_at_hand_needs_no_server(models: dict[str, Path], checked: Checked) -> None:
    (teacher,) = elsewhere("http://127.0.0.1:1").values()
    found = checked({"default": {**teacher, "model": str(models["a"])}})
    assert found.fingerprints == {"default": fingerprint(str(models["a"])).model}
    assert "127.0.0.1:1" in found.warnings[0]


def test_a_missing_key_is_one_sentence(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY, which is not set"):
        checked(elsewhere("http://127.0.0.1:1"))


def test_who_does_not_answer_in_time_is_killed() -> None:
    with pytest.raises(TimeoutError):
        in_own_process(3.0, time.sleep, 3600)
    assert not multiprocessing.active_children()


def test_what_another_process_says_comes_back() -> None:
    assert in_own_process(DEADLINE_S, os.getppid) == os.getpid()


# ---------------------------------------------------------------- what the models are


def of_family(directory: Path, student: Path, **settings: Any) -> Path:
    """A copy of a model directory whose config.json says that it is of another family."""
    shutil.copytree(student, directory)
    own = {"vocab_size": VOCAB, "eos_token_id": 1, "pad_token_id": 0, **settings}
    (directory / "config.json").write_text(json.dumps(own), encoding="utf-8")
    return directory


def test_family_layout_and_what_is_fused_are_said(
    models: dict[str, Path], checked: Checked
) -> None:
    student, teacher = checked(of(models["a"])).models
    assert student.startswith("student: qwen3; layout packed; attention: PyTorch's fused one")
    assert student.endswith("sampled from by transformers (padded prompts)")
    assert teacher.startswith("teacher: qwen3; layout packed; ")
    assert len(checked(elsewhere("http://127.0.0.1:1") | of(models["a"])).models) == 2


def test_rows_and_a_soft_cap_are_said(
    models: dict[str, Path], checked: Checked, tmp_path: Path
) -> None:
    published = {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26}
    gemma = of_family(tmp_path / "gemma", models["student"], **published)
    (said,) = checked(None, kind="grpo", student=str(gemma)).models
    assert "gemma2; layout rows; attention: transformers' own" in said
    assert "chunks of logits (scale 1, soft cap 30)" in said


def test_a_model_that_is_right_in_no_layout_is_refused_by_name(
    models: dict[str, Path], checked: Checked, tmp_path: Path
) -> None:
    wrong = of_family(tmp_path / "wrong", models["student"], model_type="prophetnet")
    with pytest.raises(ConfigError, match=r"^student: prophetnet models are not supported: "):
        checked(None, kind="grpo", student=str(wrong))


def test_adapters_that_cannot_be_merged_are_refused(
    models: dict[str, Path], checked: Checked, tmp_path: Path
) -> None:
    experts = of_family(tmp_path / "experts", models["student"], model_type="qwen3_moe")
    trainer = {"objective": {"kind": "grpo"}, "lora": {"rank": 2}}
    with pytest.raises(ConfigError, match=r"^student: trainer.lora.targets: adapters of experts"):
        checked(None, student=str(experts), trainer=trainer)
