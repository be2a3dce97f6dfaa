"""Which layout a model is right in, found by measuring the very model, and what it does to its
logits.

`packed`: all sequences in one row, told apart by attention alone. `rows`: sequences of like length
side by side, padded on the right, where causality hides the padding from attention, convolution
and recurrence alike. The hidden states of two short sequences of unequal length, and gradients
through them, must equal those of each sequence by itself.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel

from services.fused import plainly
from services.models import steady_tokens

Layout: TypeAlias = Literal["packed", "rows"]
Source: TypeAlias = Literal["backbone", "output"]
"""Where hidden states are read off: what the model without its output returns, or, where a model
does more to them, what its output matrix is given."""

FAILURES = (
    TypeError, AttributeError, ValueError, RuntimeError, LookupError, AssertionError,
)  # fmt: skip
"""What a model raises that was not made for what is asked of it."""

_PROOF_LENGTHS = (9, 12)  # unequal, side by side in one bucket, longer than hybrids' convolutions
_NARROW = 4  # tokens
# Differences may be so many times what rounding the embeddings does, but no rounding excuses these,
# of hidden states and of gradients: sequences that see each other are 0.45 and 0.75 off or more.
_TIMES, _NO_ROUNDING = 8.0, (0.3, 0.6)
DRAWS = 3  # of a rounding that is measured
# Names of settings that change what a token sees, other than `sliding_window`.
_LIMIT = re.compile(
    r"^(?!sliding_window$).*window(_size)?$|local_attention|attention_chunk_size|^index_topk"
)
_STATE, _OWN = "scope_layout", "scope_own_attention"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to `output matrix · hidden state`: x → cap · tanh(scale · x / cap)."""

    scale: float = 1.0  # also what the hidden state is multiplied by before the output matrix
    cap: float | None = None  # None leaves them as they are

    def __call__(self, logits: Tensor) -> Tensor:
        """Of any shape; logits that the map leaves as they are come back uncopied."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Of the result by the logits."""
        if self.cap is None:
            return self.scale
        return self.scale * (1.0 - torch.tanh(logits * (self.scale / self.cap)).square())


@dataclass(frozen=True, slots=True)
class Proven:
    """What was measured of a model when it was prepared."""

    layout: Layout
    logits: LogitMap
    source: Source = "backbone"
    shares: bool = False  # whether packed sequences may lie behind one copy of their beginning


Both: TypeAlias = tuple[Tensor, Tensor]  # hidden states and gradients

Run: TypeAlias = Callable[[Proven, Sequence[Sequence[int]], int | None], Tensor]
"""Hidden states [C, H] of all tokens of sequences but their last ones; or, where so many tokens
are common to them, from the last of these on, behind one copy of them."""


def proven(model: PreTrainedModel) -> Proven:
    """What `services.packed.prepare` found; packed, for a model that was not prepared."""
    kept: Proven = getattr(model, _STATE, Proven("packed", LogitMap()))
    return kept


def own_attention(model: PreTrainedModel) -> str:
    """The attention that the model had before anything here put another in its place."""
    if not hasattr(model, _OWN):
        setattr(model, _OWN, model.config._attn_implementation)
    own: str = getattr(model, _OWN)
    return own


def set_attention(model: PreTrainedModel, name: str) -> None:
    """What the model's next forwards attend with: one model may score and sample by turns."""
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def is_proven(model: PreTrainedModel) -> bool:
    """Whether the model was prepared before."""
    return hasattr(model, _STATE)


def record(model: PreTrainedModel, proven: Proven) -> None:
    """Keeps what was found with the model, and says it in the log."""
    setattr(model, _STATE, proven)
    text = f"{model.config.model_type}: {proven.layout} layout, proven on two sequences"
    _log.info("%s; logits: %s", text, proven.logits)


def find(model: PreTrainedModel, head: torch.nn.Module, run: Run) -> Proven:
    """Measures the model, which is run by `run`.

    Raises:
        ValueError: neither layout gives what the model gives for each sequence by itself.
    """
    if holds_no_values(model):
        return Proven("packed", LogitMap())
    logits, source = outputs(model, head)
    packed, rows = (Proven(layout, logits, source) for layout in ("packed", "rows"))
    worst = {}
    if _may_be_packed(model):
        worst["packed"] = _packed_difference(model, packed, rows, run)
        if worst["packed"] <= 1.0:
            return replace(packed, shares=_shares(model, packed, run))
    worst["rows"] = _difference(model, rows, run)
    if worst["rows"] <= 1.0:
        return rows
    said = ", ".join(f"{layout} {times:.3g}" for layout, times in worst.items())
    raise ValueError(
        f"no layout gives what each sequence gives by itself: off {said} times what rounding makes"
    )


def _may_be_packed(model: PreTrainedModel) -> bool:
    """Whether short sequences can speak for long ones in the packed layout: a sliding window can
    be made so narrow that they reach past it. Convolutions and recurrent layers are told where
    sequences begin, but their kernels for a GPU alone heed it. Chunks, a choice of keys and
    windows by other names are left to the model's own masks."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    others = [name for name, value in vars(config).items() if value and _LIMIT.search(name)]
    heeding = {"linear_attention", "conv"} if model.device.type == "cuda" else set()
    return kinds <= {"full_attention", "sliding_attention"} | heeding and not others


@contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[bool]:
    """Makes the model's sliding window narrower than the trial's sequences are long, wherever it
    is written down. Gives whether there is one."""
    holders: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    wide = {id(p): (p, p.sliding_window) for p in holders if getattr(p, "sliding_window", None)}
    for holder, _ in wide.values():
        setattr(holder, "sliding_window", _NARROW)  # noqa: B010 (modules and configs)
    try:
        yield bool(wide)
    finally:
        for holder, width in wide.values():
            setattr(holder, "sliding_window", width)  # noqa: B010


def _packed_difference(model: PreTrainedModel, packed: Proven, rows: Proven, run: Run) -> float:
    """`_difference` where the sliding window, if there is one, is narrow enough to matter;
    infinity where the model cannot run so, or where a narrow window changes nothing, so that
    nothing is known of it."""
    try:
        ids = trial_tokens(model, _PROOF_LENGTHS[1])
        with torch.no_grad():
            wide = run(rows, [ids], None)
        with narrowed(model) as has_window:
            with torch.no_grad():
                narrow = run(rows, [ids], None) if has_window else None
            if narrow is not None and relative(narrow, wide) <= tolerance(model):
                return math.inf
            return _difference(model, packed, run)
    except FAILURES as error:
        _log.info("%s does not run packed: %s", model.config.model_type, error)
        return math.inf


@torch.no_grad()
def _shares(model: PreTrainedModel, packed: Proven, run: Run) -> bool:
    """Whether sequences behind one copy of their common beginning come out as without. The
    attention for it wants values as wide as keys."""
    if hasattr(model.config.get_text_config(), "v_head_dim"):
        return False
    ids = trial_tokens(model, _PROOF_LENGTHS[1])
    sequences = [ids, [*ids[:5], *ids[7:]]]
    try:
        with narrowed(model):
            apart = [run(packed, [one], None)[4:] for one in sequences]
            return relative(run(packed, sequences, 5), torch.cat(apart)) <= tolerance(model)
    except FAILURES as error:
        _log.info("%s shares no prefixes: %s", model.config.model_type, error)
        return False


def check_length(config: PretrainedConfig, tokens: int) -> None:
    """Refuses sequences of which nothing right could be said.

    Raises:
        ValueError: they have more than `steady_tokens`.
    """
    steady = steady_tokens(vars(config.get_text_config()))
    if steady is not None and tokens > steady:
        raise ValueError(
            f"{config.model_type}: {tokens} tokens are more than {steady}, where its rotary "
            "embedding changes for the whole sequence (rope_parameters in its config.json; of "
            "longrope, long_factor written as short_factor too gives all lengths the same)"
        )


def holds_no_values(model: PreTrainedModel) -> bool:
    """Whether the model has shapes alone, on the meta device or in fake tensors: what counts the
    memory and the work of a step has nothing that could be measured."""
    first = next(model.parameters())
    return first.is_meta or isinstance(first, FakeTensor)


@torch.enable_grad()
def _difference(model: PreTrainedModel, proven: Proven, run: Run) -> float:
    """Largest relative difference between sequences together, as `proven` says, and one by one with
    the model's own attention and none of our kernels: of hidden states, and of the gradients that
    reach the embeddings of the tokens. In units of what rounding may do: 1 is still right."""
    sequences, alone = (
        [trial_tokens(model, n) for n in _PROOF_LENGTHS],
        replace(proven, layout="rows"),
    )

    def apart() -> Both:
        with plainly():
            return _hidden_and_gradient(
                model, lambda: torch.cat([run(alone, [ids], None) for ids in sequences])
            )

    expected, got = apart(), _hidden_and_gradient(model, lambda: run(proven, sequences, None))
    differences = _relative(got, expected)
    allowed = [tolerance(model)] * len(differences)
    excusable = all(d <= limit for d, limit in zip(differences, _NO_ROUNDING, strict=True))
    if max(differences) > tolerance(model) and excusable:
        moved = _rounding(model, apart, expected)
        for index, (limit, far) in enumerate(zip(_NO_ROUNDING, moved, strict=True)):
            allowed[index] = max(allowed[index], min(_TIMES * far, limit))
    return max(d / a for d, a in zip(differences, allowed, strict=True))


@contextmanager
def rounded(model: PreTrainedModel, draw: int) -> Iterator[None]:
    """Moves the embeddings of the trials' tokens by their own rounding; each draw is another."""
    weight: Any = model.get_input_embeddings().weight
    ids = {token for length in _PROOF_LENGTHS for token in trial_tokens(model, length)}
    rows = torch.tensor(sorted(ids), device=weight.device)
    kept = weight.detach()[rows].clone()
    chance = torch.Generator().manual_seed(draw)
    noise = torch.empty(kept.shape).uniform_(-1.0, 1.0, generator=chance).to(kept.device)
    with torch.no_grad():
        moved = kept.float() * (1.0 + torch.finfo(kept.dtype).eps * noise)
        weight[rows] = moved.to(kept.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            weight[rows] = kept


def _rounding(model: PreTrainedModel, apart: Callable[[], Both], expected: Both) -> list[float]:
    """How far hidden states and gradients move when the trial's embeddings do, by their own
    rounding. Of a deep model with large weights that is much: SmolLM2-135M makes 2e-4 of the 1e-7
    of float32 in its backward pass, and half of everything of bfloat16's."""
    far = [0.0, 0.0]
    for draw in range(DRAWS):
        with rounded(model, draw):
            moved = _relative(apart(), expected)
        far = [max(pair) for pair in zip(far, moved, strict=True)]
    return far


def _relative(got: Both, expected: Both) -> list[float]:
    return [relative(g, e) for g, e in zip(got, expected, strict=True)]


def trial_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Tokens from all over the vocabulary, the padding among them: some models take it for more
    than a token."""
    text = model.config.get_text_config()
    ids = [(count + 7919 * i) % text.vocab_size for i in range(count)]
    if count > 1 and getattr(text, "pad_token_id", None) is not None:
        ids[1] = text.pad_token_id % text.vocab_size
    return ids


def tolerance(model: PreTrainedModel) -> float:
    """What a relative difference may be from rounding alone, of a model that does not make much of
    it."""
    return 3e-4 if model.dtype == torch.float32 else 0.08


def _hidden_and_gradient(model: PreTrainedModel, run: Callable[[], Tensor]) -> Both:
    """[T, H] hidden states, and the gradient of a fixed weighing of them by all embeddings."""
    weight: Any = model.get_input_embeddings().weight
    trained = weight.requires_grad
    weight.requires_grad_(True)
    try:
        hidden = run().float()
        weighing = torch.linspace(-1.0, 1.0, hidden.numel(), device=hidden.device).sin_()
        loss = (hidden * weighing.view_as(hidden).roll(1, 1)).sum()
        (gradient,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(trained)
    return hidden.detach(), gradient.float()


def relative(got: Tensor, expected: Tensor) -> float:
    """How far `got` is from `expected`; infinity where it has another shape or is no number."""
    if not bool(torch.isfinite(expected).all()):
        return 0.0  # broken weights: whoever uses the numbers refuses them
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


@torch.no_grad()
def outputs(model: PreTrainedModel, head: torch.nn.Module) -> tuple[LogitMap, Source]:
    """Finds where hidden states are read off, and measures what the model does before and after
    its output matrix: logits of all sizes are put in the matrix's place, and what comes out says
    scale and cap.

    Raises:
        ValueError: it does something else.
    """
    given = torch.empty(0)
    entered = torch.empty(0)

    def replace(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal given, entered
        entered = inputs[0]
        grid = torch.linspace(-60.0, 60.0, output.shape[-1], device=output.device)
        grid[0], grid[-1] = 1e-2, 1e9
        given = grid.expand(output.shape).clone()
        return given

    ids = torch.arange(3, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    hook = head.register_forward_hook(replace)
    try:
        out = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    source, before = _source(model, ids, entered)
    small, large = float(out[0, -1, 0] / 1e-2), float(out[0, -1, -1])
    scale = 1.0 if abs(small - 1.0) < 1e-4 else small
    logit_map = LogitMap(scale, large if large < 1e6 else None)
    if relative(out[..., 1:-1], logit_map(given.float())[..., 1:-1]) > 1e-3:
        raise ValueError("it changes its logits by more than a scale and a soft cap")
    return LogitMap(scale * before, logit_map.cap), source


def _source(model: PreTrainedModel, ids: Tensor, entered: Tensor) -> tuple[Source, float]:
    """Where the hidden states that `entered` the output matrix can be read off, and what the model
    multiplies them by after that place."""
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is not None and hidden.shape == entered.shape:
        before = float((entered.double() * hidden).sum() / hidden.double().square().sum())
        before = before if abs(before - 1.0) > 1e-2 else 1.0  # also what is no number
        if relative(entered.float(), hidden.float() * before) <= tolerance(model):
            return "backbone", before
    if entered.shape[:2] != ids.shape:
        raise ValueError("its output matrix is given something else than one state a token")
    return "output", 1.0


def last_hidden(model: PreTrainedModel, source: Source, **inputs: Any) -> Tensor:
    """[B, T, H] what the output matrix is to be multiplied by."""
    if source == "backbone":
        whole: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return whole
    given: list[Tensor] = []

    def take(_: object, entering: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(entering[0])
        return (entering[0][:, :0],)  # logits of no token

    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(take)
    try:
        model.forward(**inputs, use_cache=False)  # not through the hooks that shard the whole
    finally:
        hook.remove()
    return given[0]
