"""Every family of causal language models in transformers, tiny and random: is it right here?

    python -m benchmarks.families [FAMILY ...] [--vllm] [--write docs/models.md]

Scores, their gradients and samples are compared with the plain forward of each sequence by itself.
A few seconds a family, one after the other, on a CPU. With --vllm an engine is started for each
that vLLM lists, half a minute on two idle cores: it is sent two versions of the weights, which its
probe checks, and what it samples is compared too.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rollout import transformers_engine
from rollout.config import RolloutConfig
from rollout.engine import build_engine
from rollout.rows import Request
from services import layouts, packed
from services.engines import EngineError
from services.errors import EngineDied
from services.models import probe_tokens
from services.shrink import FAILURES, SPECIAL, needed_by, shrunken, small_model
from services.trajectory import Sampling
from services.weights import Weights, WeightsMismatch

MARK = "<!-- made by python -m benchmarks.families --write docs/models.md -->"
NATS = 5e-4  # what a log-prob may be off
SEQUENCES = [[2 + i * i % 50 for i in range(n)] for n in (19, 3, 11, 12, 40)]
STARTS = [1, 2, 5, 1, 30]
# What vLLM's CPU kernels take: attention heads and experts are no narrower.
_WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 64}
# What published configs say, vLLM reads, and transformers' own do not hold.
_PUBLISHED = {"lfm2": {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128}}
PROMPTS = [[2], [5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 10, 11, 12]]


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one family; "right", or what was not."""

    family: str
    architecture: str
    score: str
    gradient: str = ""
    sampling: str = ""
    vllm: str = ""

    @property
    def works(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.score in ("packed", "rows") and self.gradient == "right" and self._samples

    @property
    def _samples(self) -> bool:
        return self.sampling in transformers_engine.METHODS

    @property
    def problem(self) -> str:
        """The first thing that is wrong with it."""
        if self.score not in ("packed", "rows"):
            return self.score
        return self.sampling if self.gradient == "right" else self.gradient


def tiny_config(family: str) -> PretrainedConfig:
    """A config of the family with a layer of every kind, and sizes as small as can be.

    Raises:
        FAILURES: the family's config does not take them.
    """
    config = CONFIG_MAPPING[family]()
    return shrunken(config, needed_by(config))


def tiny(family: str) -> PreTrainedModel:
    """The model."""
    config = tiny_config(family)
    config.is_decoder = True
    return small_model(config)


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T - 1] log-probs of all tokens but the first."""
    row = torch.tensor([list(ids)])
    table = model(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return table.gather(1, row[0, 1:, None]).squeeze(1)


def examine(family: str) -> Row:
    """Tries one family."""
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    try:
        model = tiny(family)
    except FAILURES as error:
        return Row(family, name, f"no tiny model: {_brief(error)}")
    try:
        ends = [plain(model, [*SEQUENCES[0], last])[:-1] for last in (3, 4)]
        if float((ends[0] - ends[1]).abs().max()) > NATS:
            return Row(family, name, "not causal")
        if not bool(torch.isfinite(ends[0]).all()):
            return Row(family, name, "its plain forward gives no numbers")
    except FAILURES as error:
        return Row(family, name, f"no plain forward of tokens: {_brief(error)}")
    return Row(family, name, _scores(model), _gradients(model), _samples(model))


def _scores(model: PreTrainedModel) -> str:
    ours = copy.deepcopy(model)
    try:
        got = packed.score(packed.prepare(ours), SEQUENCES, STARTS)
    except FAILURES as error:
        return _brief(error)
    worst = max(
        float(np.abs(np.array(mine) - plain(model, ids)[start - 1 :].numpy()).max())
        for mine, ids, start in zip(got, SEQUENCES, STARTS, strict=True)
    )
    return layouts.proven(ours).layout if worst < NATS else f"WRONG by {worst:.2g}"


def _gradients(model: PreTrainedModel) -> str:
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    try:
        batch = packed.pack(SEQUENCES, STARTS)
        packed.token_logprobs(packed.prepare(ours), batch, [1.0]).sum().backward()
    except FAILURES as error:
        return _brief(error)
    for ids, start in zip(SEQUENCES, STARTS, strict=True):
        row = torch.tensor([ids])
        table = theirs(input_ids=row, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        table.gather(1, row[0, start:, None]).sum().backward()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    worst = {
        name: float((_grad(mine) - _grad(plain)).norm() / (_grad(plain).norm() + 1e-2))
        for (name, mine), plain in pairs
    }
    name = max(worst, key=worst.__getitem__)
    return "right" if worst[name] < 1e-2 else f"WRONG by {worst[name]:.2g} at {name}"


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _samples(model: PreTrainedModel) -> str:
    ours = copy.deepcopy(model)
    requests = [
        Request(ids, Sampling(n=4, max_tokens=4 + 5 * i, seed=i)) for i, ids in enumerate(PROMPTS)
    ]
    try:
        groups = transformers_engine.sample_groups(transformers_engine.prepare(ours), requests, [1])
    except (*FAILURES, transformers_engine.SamplingError) as error:
        return _brief(error)
    worst = 0.0
    for request, group in zip(requests, groups, strict=True):
        for drawn in group:
            expected = plain(model, [*request.prompt_ids, *drawn.token_ids.tolist()]).numpy()
            off = np.abs(expected[len(request.prompt_ids) - 1 :] - drawn.logprobs).max()
            worst = max(worst, float(off))
    return transformers_engine.way(ours).method if worst < NATS else f"WRONG by {worst:.2g}"


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def examined(families: Sequence[str]) -> Iterator[Row]:
    """One after the other."""
    for family in families:
        yield examine(family)
        gc.collect()


async def examine_vllm(family: str) -> str:
    """What an engine of vLLM's, under new weights, makes of the family: "right", or what is not."""
    factory = CONFIG_MAPPING[family]
    wide = {name: size for name, size in _WIDE.items() if hasattr(factory(), name)}
    special = SPECIAL.get(family, {}) | wide | _PUBLISHED.get(family, {}) | {"text_config": _WIDE}
    model = small_model(shrunken(factory(), special))
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        settings = {"kind": "vllm", "args": {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 16}}
        try:
            made = RolloutConfig.model_validate({"engine": settings, "probe_tolerance": 0.01})
            engine = await asyncio.to_thread(build_engine, made, directory)
        except EngineError as error:
            return _brief(error)
        try:
            for version, spread in enumerate((0.0, 0.05)):
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.add_(torch.randn_like(weight), alpha=spread)
                ids = probe_tokens(model.config.get_text_config().vocab_size)
                logprobs = plain(model, ids).tolist()
                await engine.load_weights(
                    Weights.flatten(version, model.named_parameters(), ids, logprobs)
                )
            worst = 0.0
            for ids in PROMPTS:
                sampled = await engine.sample(ids, Sampling(n=2, max_tokens=20, seed=1))
                for drawn in sampled.completions:
                    expected = plain(model, [*ids, *drawn.token_ids.tolist()])[len(ids) - 1 :]
                    worst = max(worst, float(np.abs(expected.numpy() - drawn.logprobs).max()))
        except (WeightsMismatch, EngineDied) as error:
            return _brief(error)
        finally:
            await engine.close()
    return "right" if worst < NATS else f"WRONG by {worst:.2g}"


def vllm_architectures() -> frozenset[str]:
    """What the installed vLLM says that it runs; nothing where there is none."""
    if find_spec("vllm") is None:
        return frozenset()
    from vllm import ModelRegistry

    return frozenset(ModelRegistry.get_supported_archs())


def table(rows: Sequence[Row], known: frozenset[str], old: Mapping[str, str] | None = None) -> str:
    """The rows as Markdown; what keeps a family from being right stands below them. `old`: what
    was found with vLLM before, by family."""
    right = [row for row in rows if row.works]
    lines = ["| family | score | gradient | sampling | vLLM |", "|---|---|---|---|---|"]
    lines += [_line(row, known, old or {}) for row in right]
    lines += ["", f"{len(right)} of {len(rows)} families are right in all three. The others:", ""]
    lines += [
        textwrap.fill(f"* {row.family}: {row.problem}", 118, subsequent_indent="  ")
        for row in rows
        if not row.works
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row, known: frozenset[str], old: Mapping[str, str]) -> str:
    cells = (row.family, row.score, row.gradient, row.sampling, _vllm(row, known, old))
    return f"| {' | '.join(cells)} |"


def _vllm(row: Row, known: frozenset[str], old: Mapping[str, str]) -> str:
    """What an engine was found to do, now or before; else what vLLM says of itself."""
    if row.vllm:
        return textwrap.shorten(row.vllm.replace("|", "/"), 60, placeholder=" …")
    before = old.get(row.family, "")
    if before and (not known or before not in ("listed", "no")):
        return before
    return "listed" if row.architecture in known else "no"


def write(path: Path, rows: Sequence[Row], known: frozenset[str]) -> None:
    """Puts the table below the mark in a page; of some families, their lines alone."""
    head, page = path.read_text(encoding="utf-8").split(MARK)
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in page.splitlines()]
    old = {family: vllm for family, *_, vllm in (row for row in cells if len(row) > 1)}
    if len(rows) < len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        made = {row.family: _line(row, known, old) for row in rows if row.works}
        text = "".join(
            made.get(line.split(" | ")[0].strip("| "), line.rstrip("\n")) + "\n"
            for line in page.splitlines(keepends=True)
        )
    else:
        text = "\n\n" + table(rows, known, old)
    path.write_text(f"{head}{MARK}{text}", encoding="utf-8")


def main() -> None:
    """Prints each row as it is found, and writes the table where it is told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--vllm", action="store_true", help="start vLLM's engine for each")
    parser.add_argument("--write", type=Path, help="a page whose table is made anew")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, known = [], vllm_architectures() if arguments.vllm or arguments.write else frozenset()
    for row in examined(arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        if arguments.vllm and row.works and row.architecture in known:
            row = replace(row, vllm=asyncio.run(examine_vllm(row.family)))
        print(" | ".join(astuple(row)), flush=True)
        rows.append(row)
    if arguments.write:
        write(arguments.write, rows, known)


if __name__ == "__main__":
    main()
