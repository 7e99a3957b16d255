"""How good a quantised model is, in one word; and where it is not good, what is to blame and what to try.

Measured on windows that a `Witness` has sent through both models.

Blame is found in two ways, since each is blind where the other sees. The witness has measured what rounding one part
alone changes in its block's output (`Witness.alone`). And walks through the quantised model put parts back to 16 bits:
activations, keys or values of all blocks, then the parts of single blocks that change most. A fit learns to live with
what a broken part gives it, so that putting the part back afterwards may help nothing: a part that changes its block
far more than the same part of other blocks does is to blame all the same. Rounded weights cannot be put back: what they
cause alone, with all else in 16 bits, is measured.

What was given up: pairs of parts that are harmless one at a time. A search costs a fixed number of passes over a few
hundred tokens, whatever the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flatquant import seams
from flatquant.calibrate.capture import capture
from flatquant.calibrate.samples import UNSCORED, cut, scored
from flatquant.calibrate.witness import Ends, Head, Part, Witness, put, rounded_parts, through
from flatquant.evaluate.perplexity import CHUNK
from flatquant.evaluate.prose import PROMPTS
from flatquant.grade import BOUNDS, is_bad, word
from flatquant.models import check_ids
from flatquant.quantizers import Dynamic
from flatquant.spec import CacheBits, Plan, QuantSpec, Scheme, SiteBits
from flatquant.wiring.arch import blocks_at
from flatquant.wiring.archs import arch_of

_BLAME_TOKENS = 256  # of one window
_SUSPECTS = 4  # parts of a kind that are put back one at a time
_LARGE, _STANDS_OUT = 0.1, 4.0  # a part is to blame that changes so much of a block, and so many times the median block
_MARGIN = 1.25  # times the KL with all of a kind at 8 bits: few parts at 8 bits are enough if they come so near
_NEW_TOKENS = 12  # of a text
# A model that takes longer after the first writes fewer. The first may wait for the start of a device's libraries.
_TEXT_SECONDS = {"cuda": 0.4, "cpu": 2.5}
# Not cuDNN's attention, which builds an execution plan for every length: up to a second a token.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_PACKED_TOKENS = 16
PACKED_ERROR = 1e-2  # of a block; the integers are the same, so that only the order of sums can differ

KINDS = ("activations", "keys", "values")
Progress = Callable[[int, int], None]
# Gives a block of the quantised model, on the witness's device, for as long as it is looked at.
Bring = Callable[[int], AbstractContextManager[nn.Module]]


@torch.no_grad()
def verdict(witness: Witness) -> dict[str, Any]:
    """What the witness saw, JSON-ready: `word`, `kl`, `top1`, `perplexity`, `windows`, `seqlen`, `bounds`, and by block
    the error of its outputs (`blocks`) and what rounding each of its parts changes alone (`alone`). Where the output
    layer is rounded, `head` is the KL that this alone makes; where the embedding is, `embedding` is the error of
    embedded tokens, relative to the original's.
    """
    heads = witness.heads
    kl, top1, original, quantised = _distance(heads, witness.original, witness.quantised, witness.ids)
    rounded: dict[str, float | None] = {}
    if witness.rounded_ends is not None:
        rounded["head"] = _distance(heads, witness.original, witness.original, witness.ids)[0]
    if witness.embedding_error is not None:
        rounded["embedding"] = witness.embedding_error
    return {
        "word": word(kl),
        "kl": kl,
        "top1": top1,
        "perplexity": {"original": original, "quantised": quantised},
        "windows": witness.windows.shape[0],
        "seqlen": witness.windows.shape[1],
        "bounds": dict(BOUNDS),
        "blocks": [_finite(error) for error in witness.errors],
        "alone": [a and {name: _finite(error) for name, error in a.items()} for a in witness.alone],
        **rounded,
    }


def _distance(
    heads: tuple[Head, Head], before: Tensor, after: Tensor, windows: Tensor
) -> tuple[float | None, float, float | None, float | None]:
    """KL, top-1 agreement, and both perplexities, of two models' heads and hidden states.  # (N, T, h), and (N, T)"""
    kl = same = 0.0
    nll = [0.0, 0.0]
    for p_hidden, q_hidden, ids in zip(before, after, windows.to(before.device), strict=True):  # (T, h), (T,)
        for start in range(0, len(ids), CHUNK):
            rows = slice(start, start + CHUNK)
            pairs = zip(heads, (p_hidden, q_hidden), strict=True)
            p, q = (head(hidden[rows]).log_softmax(-1) for head, hidden in pairs)  # (C, V)
            kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
            following = ids[start + 1 : start + 1 + len(p)]
            for i, found in enumerate((p, q)):
                nll[i] += float(F.nll_loss(found[: len(following)], following, reduction="sum"))
    predicted = int((windows[:, 1:] != UNSCORED).sum())
    original, quantised = (_perplexity(total, predicted) for total in nll)
    return _finite(kl / windows.numel()), same / windows.numel(), original, quantised


def _perplexity(nll: float, predicted: int) -> float | None:
    if not math.isfinite(nll):
        return None
    return math.exp(min(nll / max(predicted, 1), 700.0))  # a float ends at exp(709)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------------------------- blame


Setting = Mapping[Part, int | None]  # the bits that parts are put to, None for 16


@torch.no_grad()
def blame(
    witness: Witness,
    model: PreTrainedModel,
    plan: Plan,
    scheme: Scheme,
    bring: Bring,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What is to blame, and a scheme to try.

    Args:
        model: quantised; its blocks are reached through `bring`.
        progress: called with (walks over the model done, at most so many).

    Returns:
        Entries {kind, block, site, kl, error}. `kl` is the divergence that remains with this part in 16 bits; `block`
        and `site` are None for all of a kind. `error` is what rounding this part alone changes in its block's output,
        relative to it. An entry of weights of all blocks has `alone` instead, the divergence with all else in 16 bits.
        And {scheme, kl, before}: the divergence that was measured with these parts at 8 bits and without, on the same
        tokens. `kl` is None for a proposal that cannot be measured without a fit or rounding anew.
    """
    walks = _Walks(witness, model, plan, bring, progress)
    parts = _parts(plan)
    roles = {edge.site: edge.role for kind in arch_of(model.config, model).kinds for edge in kind.edges}
    kinds = [kind for kind in KINDS if parts[kind]]
    everything: Setting = {part: None for kind in kinds for part in parts[kind]}
    base, weights_alone, *without = walks.kls([{}, everything, *(dict.fromkeys(parts[k]) for k in kinds)])
    entries = [_entry(kind, kl=kl) for kind, kl in zip(kinds, without, strict=True)]
    setting: dict[Part, int | None] = {}
    now = base
    for kind, remaining in sorted(zip(kinds, without, strict=True), key=lambda pair: _order(pair[1])):
        if not is_bad(word(_finite(now))) or _order(remaining) > 0.9 * _order(base):
            continue
        suspects = _worst(witness, parts[kind])
        confirmed = walks.kls([{**setting, part: None} for part in suspects])
        ranked = sorted(zip(confirmed, suspects, strict=True), key=lambda pair: _order(pair[0]))
        entries += [_entry(kind, part, kl=kl, error=_error(witness, part)) for kl, part in ranked]
        choice, kl = walks.smallest([part for _, part in ranked], parts[kind], setting)
        if _order(kl) < 0.9 * _order(now):
            setting |= choice
            now = kl
    walks.end()
    known = {(entry["kind"], entry["block"], entry["site"]) for entry in entries}
    hidden = [part for kind in kinds for part in _outstanding(witness, parts[kind]) if part not in setting]
    entries += [
        _entry(part.kind, part, error=_error(witness, part))
        for part in hidden
        if (part.kind, part.block, part.site) not in known
    ]
    if any(site.weights for block in plan.blocks for site in block.sites.values()):
        entries += _weights(witness, weights_alone)
    wider = _wider_weights(scheme) if is_bad(word(_finite(weights_alone))) else None
    if hidden:  # what their fits have made of all else, weights too, is not known without a fit
        least = min(_error(witness, part) for part in hidden)
        chosen = scheme if wider is None or _median_of_weights(witness) < least else wider
        return entries, _proposal(chosen, plan, roles, setting | dict.fromkeys(hidden, 8), base, None)
    if wider is not None:
        return entries, _proposal(wider, plan, roles, setting, base, None)
    return entries, _proposal(scheme, plan, roles, setting, base, now) if setting else None


def _entry(kind: str, part: Part | None = None, **found: float | None) -> dict[str, Any]:
    where = {"block": None, "site": None} if part is None else {"block": part.block, "site": part.site}
    return {"kind": kind, **where, **{name: _finite(_order(value)) for name, value in found.items()}}


def _error(witness: Witness, part: Part) -> float:
    """What rounding a part alone changes in its block; zero where an earlier run has not looked."""
    return (witness.alone[part.block] or {}).get(part.name, 0.0)


def _worst(witness: Witness, parts: Sequence[Part]) -> list[Part]:
    """The parts that change most."""
    return sorted(parts, key=lambda part: -_order(_error(witness, part)))[:_SUSPECTS]


def _median_of_weights(witness: Witness) -> float:
    """What rounding the weights of the median block changes in it."""
    errors = [seen["weights"] for seen in witness.alone if seen is not None]
    return median_low(errors) if errors else 0.0


def _outstanding(witness: Witness, parts: Sequence[Part]) -> list[Part]:
    """Parts that change far more than the same parts of other blocks do, worst first."""
    found = []
    for part in _worst(witness, parts):
        error, same = _error(witness, part), [_error(witness, p) for p in parts if p.site == part.site]
        if error > max(_LARGE, _STANDS_OUT * median_low(same)):
            found.append(part)
    return found


def _order(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _parts(plan: Plan) -> dict[str, list[Part]]:
    """Every grid of activations, keys and values, by kind."""
    found: dict[str, list[Part]] = {kind: [] for kind in KINDS}
    for index, block in enumerate(plan.blocks):
        for part in rounded_parts(block, index):
            found[part.kind].append(part)
    return found


def _weights(witness: Witness, alone: float) -> list[dict[str, Any]]:
    """What weights cause alone; where that is bad, the blocks that rounding changed most."""
    found = [_entry("weights", alone=alone)]
    if is_bad(word(_finite(alone))):
        parts = [Part(kind="weights", block=index) for index, seen in enumerate(witness.alone) if seen is not None]
        found += [_entry("weights", part, error=_error(witness, part)) for part in _worst(witness, parts)]
    return found


def _grid(part: Part, bits: int | None) -> Dynamic | None:
    return None if bits is None else Dynamic(QuantSpec(bits=bits, symmetric=part.kind == "activations"))


class _Walks:
    """Walks over a quantised model with some of its parts put to other bits, on a few hundred tokens."""

    def __init__(
        self, witness: Witness, model: PreTrainedModel, plan: Plan, bring: Bring, progress: Progress | None
    ) -> None:
        windows = cut(witness.windows, 1, _BLAME_TOKENS)
        tokens = windows.shape[1]
        self.windows = scored(windows, model.config)
        _, calls = capture(model, arch_of(model.config, model), windows)
        device = witness.device
        self.calls = [
            replace(call.to(device), basis=seen.basis) for call, seen in zip(calls, witness.calls, strict=True)
        ]
        self.first, self.original = witness.first[:1, :tokens], witness.original[:1, :tokens]
        self.heads = witness.heads
        self.plan, self.bring = plan, bring
        self.done, self.most = 0, (1 + 2 * len(KINDS)) * len(self.calls)
        self.progress = progress or (lambda *_: None)
        self.progress(0, self.most)

    def kls(self, settings: Sequence[Setting]) -> list[float]:
        """The divergence from the original with each setting, in one walk over the blocks."""
        base = self.first
        streams: list[Tensor | None] = [None] * len(settings)  # None until a setting differs from the base
        for index, call in enumerate(self.calls):
            with self.bring(index) as block:
                for i, setting in enumerate(settings):
                    here = {part: _grid(part, bits) for part, bits in setting.items() if part.block == index}
                    if here or streams[i] is not None:
                        with put(block, self.plan.attention, here):
                            stream = streams[i]
                            streams[i] = through(block, call, base if stream is None else stream)
                base = through(block, call, base)
            self._step()
        found = (base if stream is None else stream for stream in streams)
        return [self._kl(hidden) for hidden in found]

    def _kl(self, hidden: Tensor) -> float:
        kl = _distance(self.heads, self.original, hidden, self.windows)[0]
        return math.inf if kl is None else kl

    def smallest(
        self, ranked: Sequence[Part], parts: Sequence[Part], setting: Setting
    ) -> tuple[dict[Part, int | None], float]:
        """The fewest parts at 8 bits that bring nearly what all of their kind bring, and the divergence with them."""
        sets = [ranked[:count] for count in (1, 2, 4) if count <= len(ranked)]
        sets += [[part for part in parts if part.site == ranked[0].site]] if ranked[0].site else []
        sets += [list(parts)]
        choices: list[dict[Part, int | None]] = [dict.fromkeys(chosen, 8) for chosen in sets]
        found = self.kls([{**setting, **choice} for choice in choices])
        enough = max(_MARGIN * found[-1], BOUNDS["excellent"])
        best = next((i for i, kl in enumerate(found) if kl <= enough), len(found) - 1)
        return choices[best], found[best]

    def _step(self) -> None:
        self.done += 1
        self.progress(self.done, self.most)

    def end(self) -> None:
        """Tell that no walk is to come."""
        self.progress(self.most, self.most)


def _wider_weights(scheme: Scheme) -> Scheme | None:
    """More bits for weights; None from 8 on."""
    weights = scheme.weights
    if weights is None or weights.bits >= 8:
        return None
    return replace(scheme, weights=weights.with_bits(4 if weights.bits < 4 else 8))


def _proposal(
    scheme: Scheme, plan: Plan, roles: Mapping[str, str], setting: Setting, before: float, now: float | None
) -> dict[str, Any]:
    """A scheme with these parts at 8 bits."""
    return {
        "scheme": str(_with_parts(scheme, plan, roles, setting)),
        "kl": None if now is None else _finite(now),
        "before": _finite(before),
    }


def _with_parts(scheme: Scheme, plan: Plan, roles: Mapping[str, str], setting: Setting) -> Scheme:
    """A scheme with parts at 8 bits: as its own bits where they are all of a kind, else as overrides.

    Args:
        roles: the name that schemes have for a site. All sites of a block with one name share an override.
    """
    sites, caches = dict(scheme.overrides), dict(scheme.cache_overrides)
    for kind, members in _parts(plan).items():
        chosen = [part for part in members if part in setting]
        if not chosen:
            continue
        if len(chosen) == len(members) and (spec := getattr(scheme, kind)) is not None:
            scheme = replace(scheme, **{kind: spec.with_bits(8)})
            continue
        for part in chosen:
            key = str(part.block)
            if part.site is None:
                caches[key] = replace(caches[key], **{kind: 8}) if key in caches else CacheBits(**{kind: 8})
                continue
            role = roles[part.site]
            key = role if _whole(part.site, chosen, members) else f"{key}.{role}"
            sites[key] = replace(sites[key], **{kind: 8}) if key in sites else SiteBits(**{kind: 8})
    return replace(scheme, overrides=sites, cache_overrides=caches)


def _whole(site: str, chosen: Sequence[Part], members: Sequence[Part]) -> bool:
    """Whether a site was chosen in every block."""
    return sum(part.site == site for part in chosen) == sum(part.site == site for part in members)


# --------------------------------------------------------------------------------------------- the packed folder


@torch.no_grad()
def packed_agrees(
    packed: PreTrainedModel, model: PreTrainedModel, plan: Plan, witness: Witness, bring: Bring
) -> dict[str, Any]:
    """A model that was read from its folder against the one in memory, on a few tokens: {tokens, kl, equal, error}.

    `error` is the largest of any block, given the same input: the median over tokens, relative to what the block adds
    to the residual stream. Where the order of a sum moves an activation to the next integer, few tokens are off.

    Args:
        packed: on the CPU.
        model: its blocks are reached through `bring`.
    """
    ids = cut(witness.windows, 1, _PACKED_TOKENS)
    arch, device, dtype = arch_of(model.config, model), witness.device, witness.dtype

    modules = blocks_at(packed, plan.blocks_path)

    @contextmanager
    def loaded(index: int) -> Iterator[nn.Module]:
        block = modules[index].to(device)
        yield block
        block.to("cpu")

    (want, calls), (got, _) = capture(model, arch, ids), capture(packed, arch, ids)
    assert isinstance(want, Tensor)
    assert isinstance(got, Tensor)
    want, got, error = want.to(device, dtype), got.to(device, dtype), 0.0
    for index, call in enumerate(c.to(device) for c in calls):
        with bring(index) as ours, loaded(index) as theirs:
            before, alike = want, torch.equal(want, got)
            want, got = through(ours, call, want), through(theirs, call, got)
            again = got if alike else through(theirs, call, before)
            off, added = (call.states(x).norm(dim=-1) for x in (again - want, want - before))
            off = off / added.clamp(min=torch.finfo(dtype).tiny)
            error = max(error, float(off.nan_to_num(torch.inf, torch.inf).median()))
    want, got = (Ends(root, arch).head(device, dtype)(x) for root, x in ((model, want), (packed, got)))  # (1, T, V)
    log_p, log_q = want.log_softmax(-1), got.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return {"tokens": ids.shape[1], "kl": _finite(kl), "equal": torch.equal(want, got), "error": _finite(error)}


# --------------------------------------------------------------------------------------------- texts


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """What a model writes after `PROMPTS`, taking the likeliest token each time: [{prompt, text}].

    All are written at once. A longer prompt is cut to the tokens of the shortest, so that none needs padding. A model
    that writes slowly writes less.
    """
    end, seconds = math.inf, _TEXT_SECONDS.get(model.device.type, 0.4)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    length = min(map(len, prompts))
    ids = torch.tensor([prompt[:length] for prompt in prompts], dtype=torch.int64)  # (prompts, length)
    check_ids(ids, model, "prompts")
    step, columns, cache = ids.to(model.device), [], DynamicCache(config=model.config)
    with sdpa_kernel(_ATTENTION):
        for _ in range(_NEW_TOKENS if length else 0):
            out = model(input_ids=step, use_cache=True, logits_to_keep=1, **{seams.CACHE: cache})
            step = out.logits[:, -1:].argmax(-1)  # (prompts, 1)
            columns.append(step.cpu())
            if time.perf_counter() > end:
                break
            end = min(end, time.perf_counter() + seconds)
    written = torch.cat(columns, dim=1) if columns else ids[:, :0]

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return [
        {"prompt": text(before), "text": text(torch.cat([before, after]))[len(text(before)) :]}
        for before, after in zip(ids, written, strict=True)
    ]
