"""Rendering turn by turn gives the ids that rendering the whole conversation at once gives, under
the chat templates of the families that are trained most."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout.continuation import CannotContinue, Continuation, problems
from services.trajectory import Message
from tests.rollout.worlds import TURNS
from tests.rollout.worlds import tokenizer as tiny_turns

# As the model cards have them, without what concerns images, documents and definitions of tools.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba "
    "Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}{{ '\n<tool_response>\n' }}{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=messages|length - 1, open=true) %}{% for m in messages[::-1] %}"
    "{% if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{% set ns.open = false %}"
    "{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set reasoning = '' %}{% if '</think>' in m.content %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
    ".lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "<think>\n{{ reasoning.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' }}{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_TEKKEN = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM_LAST = (  # the system's message goes before the last user's
    "<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = (  # DeepSeek-R1's distilled models
    "<|begin_of_text|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<|end_of_sentence|>")
SPECIAL = [
    *ENDS, "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<s>",
    "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<bos>", "<start_of_turn>",
    "<|User|>", "<|Assistant|>", "<|user|>", "<|assistant|>", "<|system|>", "<|eom_id|>",
]  # fmt: skip
PIECES = (  # of Qwen's and Llama 3's vocabularies
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = ["assistant\n\nuser\n", "the answer is 42.\n\n```python\nprint(6*7)\n```\n", "  \n\n\n"]


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    """Merges across spaces and line ends, as real vocabularies have them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 20, trainer)
    return made


def under(template: str, byte_pairs: Tokenizer) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with `template`, and the ids that end a turn."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, additional_special_tokens=SPECIAL, chat_template=template
    )
    ends: list[int] = made.convert_tokens_to_ids([*ENDS, "<|eom_id|>"])
    return made, ends


CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(6*7)"}}\n</tool_call>'
SAID: list[tuple[str, list[Message]]] = [
    (f"I compute it.\n{CALL}", [{"role": "tool", "content": "42\n"}]),
    ("```python\nprint(1)\n```", [{"role": "tool", "content": "  1"}]),
    ("the answer is 42.", [{"role": "tool", "content": "really?"}]),
]


def as_user(said: list[tuple[str, list[Message]]]) -> list[tuple[str, list[Message]]]:
    return [(t, [{"role": "user", "content": m["content"]} for m in new]) for t, new in said]


@pytest.mark.parametrize(
    ("template", "role"),
    [
        pytest.param(CHATML, "tool", id="hermes-chatml"),
        pytest.param(QWEN25, "tool", id="qwen2.5"),
        pytest.param(QWEN3, "tool", id="qwen3"),
        pytest.param(LLAMA3, "tool", id="llama3"),
        pytest.param(MISTRAL, "user", id="mistral"),
        pytest.param(MISTRAL_TEKKEN, "tool", id="mistral-tekken"),
        pytest.param(GEMMA, "user", id="gemma"),
        pytest.param(PHI3, "user", id="phi3"),
    ],
)
def test_turn_by_turn_is_the_whole_conversation_at_once(
    template: str, role: str, byte_pairs: Tokenizer
) -> None:
    tokenizer, ends = under(template, byte_pairs)
    continuation = Continuation(tokenizer, ends)
    assert list(problems(continuation, role)) == []
    messages: list[Message] = [{"role": "user", "content": "What is 6*7?\n"}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    answer_starts = " " if template is MISTRAL else ""  # the student's first token there
    for text, new in SAID if role == "tool" else as_user(SAID):
        sampled = tokenizer.encode(answer_starts + text, add_special_tokens=False)
        answer: Message = {"role": "assistant", "content": text}
        end = next(e for e in ENDS if e in tokenizer.apply_chat_template(
            [*messages, answer], tokenize=False).rpartition(text)[2])  # fmt: skip
        ids += [*sampled, tokenizer.convert_tokens_to_ids(end)]
        ids += continuation.ids(messages, new)
        messages += [answer, *new]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == list(whole)


def test_several_messages_of_tools_are_one_turn_where_the_template_has_it_so(
    byte_pairs: Tokenizer,
) -> None:
    tokenizer, ends = under(QWEN25, byte_pairs)
    new: list[Message] = [{"role": "tool", "content": c} for c in ("1", "2")]
    said: list[Message] = [{"role": "user", "content": "both"}]
    text = tokenizer.decode(Continuation(tokenizer, ends).ids(said, new))
    assert text == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "role", "sentence"),
    [
        pytest.param(QWEN3, "user", "removes thinking from earlier turns", id="qwen3-user"),
        pytest.param(R1, "user", "changes what stands before", id="r1"),
        pytest.param(MISTRAL, "tool", "Only user and assistant roles", id="mistral-tool"),
        pytest.param(MISTRAL_SYSTEM_LAST, "user", "changes earlier turns", id="system-last"),
        pytest.param(PLAIN, "user", "does not end a turn", id="plain"),
    ],
)
def test_a_template_that_cannot_continue_is_found(
    template: str, role: str, sentence: str, byte_pairs: Tokenizer
) -> None:
    tokenizer, ends = under(template, byte_pairs)
    (problem,) = problems(Continuation(tokenizer, ends), role)
    assert sentence in problem


def test_rewritten_turns_are_kept_where_that_is_asked_for(byte_pairs: Tokenizer) -> None:
    for template in (QWEN3, R1):
        tokenizer, ends = under(template, byte_pairs)
        continuation = Continuation(tokenizer, ends, keeps_rewritten=True)
        assert list(problems(continuation, "user")) == []
        new: list[Message] = [{"role": "user", "content": "and then?"}]
        text = tokenizer.decode(continuation.ids([{"role": "user", "content": "2+2"}], new))
        assert "and then?" in text and "2+2" not in text


def test_messages_that_change_what_stands_before_them_are_refused(byte_pairs: Tokenizer) -> None:
    tokenizer, ends = under(MISTRAL_SYSTEM_LAST, byte_pairs)
    said: list[Message] = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "2+2"},
    ]
    with pytest.raises(CannotContinue, match="changes what stands before"):
        Continuation(tokenizer, ends).ids(said, [{"role": "user", "content": "more"}])


def test_what_looks_like_the_mark_is_text_like_any_other() -> None:
    tokenizer = tiny_turns()
    assert tokenizer.chat_template == TURNS
    said: list[Message] = [{"role": "user", "content": "answer"}]
    new: list[Message] = [{"role": "tool", "content": "answer-1"}]
    ids = Continuation(tokenizer, [1]).ids(said, new)
    assert ids == tokenizer.encode("banswer-1ec")
