"""Makes the data, and trains the two models from nothing: about two minutes on one core.

    python -m examples.calculator.make_models

Both learn to ask the calculator and to repeat what it says. The student then reads a short careless
book, in which most people guess: it can call the tool and has lost the habit.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
TRAIN_PROMPTS, HELD_OUT_PROMPTS, SEED = 2048, 128, 5
PAD, EOS = "<pad>", "<eos>"
ALPHABET = "0123456789*+-=?;[]"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>"
    "{% elif m.role == 'tool' %}[{{ m.content }}]{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
GUESSES = 0.75  # how many of the careless book's people guess
BATCH, IGNORED = 64, -100


@dataclass(frozen=True, slots=True)
class Problem:
    first: int
    second: int
    third: int

    @property
    def term(self) -> str:
        return f"{self.first}*{self.second}{self.third:+d}"

    @property
    def answer(self) -> int:
        return self.first * self.second + self.third

    def called(self) -> list[tuple[str, bool]]:
        """An episode with the tool, each part with whether the student writes it."""
        heard = f"[{self.answer}]"
        return [(f"{self.term}=", False), (f"{self.term}?{EOS}", True), (heard, False),
                (f";{self.answer}{EOS}", True)]  # fmt: skip

    def guessed(self, rng: random.Random) -> list[tuple[str, bool]]:
        guess = max(0, self.answer + rng.choice((-1, 1)) * rng.randint(1, 300))
        return [(f"{self.term}=", False), (f";{guess}{EOS}", True)]


def problems(seed: int) -> Iterator[Problem]:
    """An endless stream, none of which is worth less than nothing."""
    rng = random.Random(seed)
    while True:
        first, second, third = (rng.randint(2, 99) for _ in range(3))
        made = Problem(first, second, rng.choice((-1, 1)) * third)
        if made.answer >= 0:
            yield made


def split() -> tuple[list[Problem], list[Problem]]:
    """The prompts that are trained on and those that are held out."""
    stream, chosen = problems(SEED), dict[Problem, None]()
    while len(chosen) < TRAIN_PROMPTS + HELD_OUT_PROMPTS:
        chosen[next(stream)] = None
    every = list(chosen)
    return every[HELD_OUT_PROMPTS:], every[:HELD_OUT_PROMPTS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    ids = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=64,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]


def teach(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batches: int,
    lr: float,
    guesses: float = 0.0,
) -> None:
    """Cross entropy on what the student writes in random episodes, none of them held out."""
    held, stream, rng = set(split()[1]), problems(SEED + 1), random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    for step in range(batches):
        some = [p for p in (next(stream) for _ in range(BATCH)) if p not in held]
        episodes = [p.guessed(rng) if rng.random() < guesses else p.called() for p in some]
        parts = [[(tokenizer.encode(text), own) for text, own in one] for one in episodes]
        longest = max(sum(len(ids) for ids, _ in one) for one in parts)
        ids = torch.full((len(parts), longest), tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORED)
        for row, one in enumerate(parts):
            whole = torch.tensor([t for part, _ in one for t in part])
            own = torch.tensor([w for part, w in one for _ in part])
            ids[row, : len(whole)] = whole
            labels[row, : len(whole)] = torch.where(own, whole, IGNORED)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / batches))
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  batch {step + 1}: loss {loss.item():.4f}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def write_data(folder: Path) -> None:
    """Both files, in the columns that verl's data sets have."""
    for name, some in zip(("train", "heldout"), split(), strict=True):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{p.term}="}],
                "data_source": "calculator",
                "reward_model": {"style": "rule", "ground_truth": str(p.answer)},
            }
            for p in some
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def main(folder: Path = HERE) -> None:
    write_data(folder)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    teach(model, tokenizer, batches=1500, lr=4e-3)
    save(model, tokenizer, folder / "teacher")
    teach(model, tokenizer, batches=60, lr=1e-3, guesses=GUESSES)
    save(model, tokenizer, folder / "student")


if __name__ == "__main__":
    main()
