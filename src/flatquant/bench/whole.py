"""Whole models against bfloat16: prefill and decoding."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, StaticCache

from flatquant import seams
from flatquant.bench.checks import BLOCK_ERROR, block_error, kernels_error
from flatquant.bench.kernels import random_matrix
from flatquant.bench.shapes import SCHEME, config_of, shape_of
from flatquant.bench.timing import Row, Times, in_turn, made_row, measure
from flatquant.calibrate.memory import free_device, release
from flatquant.recipes import flatquant
from flatquant.runtime import fused
from flatquant.runtime.artifact import rebuild_buffers
from flatquant.runtime.build import install, install_ends
from flatquant.runtime.folder import end_sites
from flatquant.spec import Scheme
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.head import with_ends
from flatquant.wiring.plan import make_plan

TRANSFORMS = ("kronecker", "hadamard", "none")
_FACTORS = ("left", "right", "key_matrix", "query_matrix")  # buffers that are orthogonal
_SDPA = "flatquant_bench"  # the baseline's attention, as transformers knows it
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@torch.no_grad()
def packed_model(
    config: Any,
    device: torch.device,
    transform: str = "kronecker",
    *,
    key_offset: bool = False,
    scheme: str = SCHEME,
) -> PreTrainedModel:
    """A W4A4KV4 model of random integers, with the fused runtime attached.

    Args:
        scheme: with an output layer on a grid, or without.
        transform: "kronecker" everywhere; "hadamard" where QuaRot has it online, in front of o_proj and down_proj and
            on queries and keys; or "none".
        key_offset: keys are cached less a constant.
    """
    with torch.device("meta"):
        own = copy.deepcopy(config)  # which names the attention
        model: Any = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    arch = arch_of(config)
    seams.use_attention(model, arch.reached)
    parsed = replace(Scheme.parse(scheme), key_offset="mean" if key_offset else "none")
    recipe = flatquant(parsed)
    plan = make_plan(recipe, arch, Geometry.of(config), model.model.layers)
    plan = with_ends(plan, recipe, model)
    for block, block_plan in zip(model.model.layers, plan.blocks, strict=True):
        install(block, plan.attention, block_plan, packed=True)
    install_ends(model, plan, packed=True)
    ends = {f"{site.readers[0]}.packed": site.weights.bits for site in end_sites(plan) if site.weights}
    if ends:
        model.config.tie_word_embeddings = False
    model.load_state_dict({n: torch.empty_like(t, device=device) for n, t in model.state_dict().items()}, assign=True)
    model.tie_weights()
    rebuild_buffers(model, device)
    computed = {id(b) for m in model.modules() for n, b in m._buffers.items() if n in m._non_persistent_buffers_set}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        leaf = name.rpartition(".")[2]
        if id(tensor) in computed:
            continue
        if ends.get(name) == 8:
            tensor.random_(1, 256)  # -127 to 127
        elif tensor.dtype == torch.uint8:  # -7 to 7: weights have a mean of 0; another adds up over a token's channels
            tensor.random_(1, 16).add_(torch.randint_like(tensor, 1, 16), alpha=16)
        elif leaf == "scale":
            tensor.fill_(0.2 / config.hidden_size**0.5)
        elif leaf == "ratio":
            tensor.fill_(0.95)
        elif "norm" in name:
            tensor.fill_(1 - arch.norm_offset)
        elif leaf in _FACTORS:
            tensor.copy_(torch.linalg.qr(torch.randn_like(tensor)).Q)
        else:
            tensor.normal_(0, 0.02)
    if transform != "kronecker":
        _replace_transforms(model, transform)
    fused.attach(model, ("cuda", "cpu"))
    return model.eval().requires_grad_(False)


def _replace_transforms(model: PreTrainedModel, transform: str) -> None:
    for name, module in model.named_modules():
        if not hasattr(module, "left") and not hasattr(module, "key_matrix"):
            continue
        for leaf in _FACTORS:
            factor = getattr(module, leaf, None)
            if factor is None:
                continue
            online = transform == "hadamard" and not name.endswith(("attn_in", "mlp_in"))
            size = factor.shape[0]
            setattr(module, leaf, random_matrix(size, transform, factor.device) if online else None)


@torch.no_grad()
def models(
    shape: str,
    device: torch.device,
    *,
    layers: int | None = None,
    prompt: int = 2048,
    batches: Sequence[int] = (1, 4, 16, 64),
) -> tuple[list[Row], dict[str, int]]:
    """Prefill and decoding of a whole model against bfloat16, with transforms, with Hadamard ones, and without.

    The baseline has whichever of PyTorch's attention kernels is fastest, without a mask. It sees all keys where a model
    has windows (Gemma 3): there the ratio is not that of one model, and the check is what counts.

    Returns:
        The rows, and bytes of weights and cache.
    """
    config, scheme = config_of(shape, layers), shape_of(shape).scheme
    AttentionInterface.register(_SDPA, _attention)
    with device:  # random numbers are drawn where they are needed
        baseline: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=_SDPA)
    baseline = baseline.to(device).eval().requires_grad_(False)
    base_decode = {b: _base_decode(baseline, b, prompt, device) for b in batches}
    sizes = {"bf16_weights": sum(p.nbytes for p in baseline.parameters())}
    sizes["bf16_cache"] = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * prompt

    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    base = _available(partial(baseline, ids, use_cache=False, logits_to_keep=1))
    base_prefill: dict[str, Times] = {}
    free = free_device(device)
    if free is not None and free < 1.5 * sizes["bf16_weights"]:  # three packed models, and what they need, are less
        base_prefill = dict(zip(base, in_turn([[call] for call in base.values()], device, seconds=0.5), strict=True))
        baseline, base = None, {}
        release(device)

    packed = {transform: packed_model(config, device, transform, scheme=scheme) for transform in TRANSFORMS}
    runtimes = {transform: runtime_of(model) for transform, model in packed.items()}
    errors = {t: max(kernels_error(r), block_error(packed[t], r) / BLOCK_ERROR) for t, r in runtimes.items()}
    right = {t: runtime for t, runtime in runtimes.items() if errors[t] <= 1}
    rows: list[Row] = []

    def add(what: str, tokens: int, base: tuple[str, Times] | None, times: Sequence[Times]) -> None:
        name, ms = (f"bfloat16, {base[0]}", base[1].median) if base else ("bfloat16 (does not fit)", None)
        taken = dict(zip(right, times, strict=True))
        rows.extend(made_row(f"{shape} {what}, {t}", tokens, errors[t], taken.get(t), name, ms) for t in TRANSFORMS)

    ours = [partial(prefill, runtime, ids, runtime.new_cache(1, prompt)) for runtime in right.values()]
    times = in_turn([[call] for call in (*base.values(), *ours)], device, seconds=0.5)
    base_prefill |= dict(zip(base, times, strict=False))
    add("prefill", prompt, _fastest(base_prefill), times[len(base) :])
    baseline, base, ours = None, {}, []  # their memory is for the next ones
    release(device)
    for b in batches:
        steps = [partial(decoding, runtime, b, prompt) for runtime in right.values()]
        add("decode", b, base_decode[b], _in_turn_or_alone(steps, device))
    cache = runtimes["kronecker"].new_cache(1, prompt)
    cache.room.rewind(prompt)
    held = {t.data_ptr(): t.nbytes for t in packed["kronecker"].state_dict().values()}  # tied ones once
    sizes["weights"] = sum(held.values())
    sizes["cache"] = cache.nbytes()
    return rows, sizes


def _in_turn_or_alone(sides: Sequence[Callable[[], Callable[[], Any]]], device: torch.device) -> list[Times]:
    """`in_turn` for sides that are made for it; one after the other where there is no memory for all at once."""
    with contextlib.suppress(torch.OutOfMemoryError):
        times = in_turn([[make()] for make in sides], device, seconds=0.5)
        release(device)
        return times
    times = []
    for make in sides:
        release(device)
        times += in_turn([[make()]], device, seconds=0.5)
    release(device)
    return times


def runtime_of(model: PreTrainedModel) -> fused.Fused:
    """The fused runtime of a `packed_model`."""
    runtime = fused.runtime(model)
    assert runtime is not None
    return runtime


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """All keys up to one's own, which of one new token are all there are.  # (B, H, T, D) -> (B, T, H, D)"""
    grouped = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=grouped)
    return y.transpose(1, 2), None


def _available(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The call with each of PyTorch's attention kernels that can serve it, and for which there is memory."""

    def bound(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return call()

    found = {}
    for name, backend in _BACKENDS.items():
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reasons why not
            bound(backend)
            found[name] = partial(bound, backend)
    return found


def _fastest(times: dict[str, Times]) -> tuple[str, Times] | None:
    return min(times.items(), key=lambda item: item[1].median, default=None)


def prefill(runtime: fused.Fused, ids: Tensor, cache: Any) -> Tensor:
    """Logits of a prompt's last token, from an empty cache.  # (1, T) -> (1, 1, V)"""
    cache.room.rewind(0)
    return runtime.prefill(ids, torch.arange(ids.shape[1], device=ids.device)[None], cache, 1)


def decoding(runtime: fused.Fused, batch: int, prompt: int) -> Callable[[], Tensor]:
    """A step of decoding after a prompt of random keys and values, which can be repeated.  # -> (B, 1, V)"""
    cache = runtime.new_cache(batch, prompt + 1)
    for layer in cache.packed:
        for store in layer.stores:
            store.packed.random_(0, 256)
    ids = torch.zeros((batch, 1), dtype=torch.int64, device=runtime.device)
    places = torch.arange(prompt, device=runtime.device)[None]
    for kind, turn in enumerate(runtime.turns):
        cache.room.turn(*runtime.angles(places, torch.float32, turn), places, kind)
    cache.room.advance(prompt)

    def step() -> Tensor:
        logits = runtime.logits(runtime.hidden(ids, ids + prompt, cache, {}))
        cache.room.advance(1)
        cache.room.rewind(prompt)
        return logits

    return step


def _windowless(config: Any) -> Any:
    """A config whose caches keep all places: the baseline's attention has no mask, so that it sees all of them."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(config.layer_types)
    return config


def _base_decode(model: PreTrainedModel, batch: int, prompt: int, device: torch.device) -> tuple[str, Times] | None:
    """A step of decoding by the fastest attention; None where the memory of the GPU does not hold it."""
    found: dict[str, Times] = {}
    with contextlib.suppress(torch.OutOfMemoryError):
        cache = StaticCache(config=_windowless(model.config), max_cache_len=prompt + 1)
        ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        places = torch.full((batch, 1), prompt, dtype=torch.int64, device=device)
        model(ids, use_cache=True, **{seams.CACHE: cache})  # makes room
        used: Any = [layer.cumulative_length for layer in cache.layers]  # pyright: ignore[reportAttributeAccessIssue]
        full = [torch.full_like(length, prompt) for length in used]

        def decode() -> Any:
            torch._foreach_copy_(used, full)  # pyright: ignore[reportPrivateImportUsage] - all steps write to one place
            return model(ids, position_ids=places, use_cache=True, **{seams.CACHE: cache}).logits

        for name, call in _available(decode).items():
            with contextlib.suppress(torch.OutOfMemoryError):
                found[name] = measure([call], device, seconds=0.5)
            release(device)
    release(device)
    return _fastest(found)
