"""How fast the runtime is: kernels against the bytes they move, products and whole models against bfloat16.

Every row is checked first - the same inputs through the kernel and through its reference - and a row that fails its
check has no time and no ratio. On CUDA all sides run as replayed graphs, on inputs that rotate past the cache; times
are medians with the tenth and ninetieth percentile. Weights are random, of the true shapes; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from flatquant import seams
from flatquant.calibrate.memory import free_device
from flatquant.errors import SpecError
from flatquant.ops import int4_linear, kron_quantize, kv_cache
from flatquant.ops.int4_linear import reference as product_reference
from flatquant.ops.kron.reference import kron_matmul
from flatquant.ops.kron_quantize import Form, Site
from flatquant.ops.kron_quantize import reference as site_reference
from flatquant.ops.kv_cache import reference as cache_reference
from flatquant.ops.pack.reference import unpack_bits
from flatquant.recipes import flatquant
from flatquant.runtime import fused
from flatquant.runtime.build import install
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import FrozenSite
from flatquant.spec import Scheme
from flatquant.transforms import kronecker_split
from flatquant.transforms.hadamard import hadamard, has_hadamard
from flatquant.wiring.arch import Geometry
from flatquant.wiring.archs import arch_of
from flatquant.wiring.plan import make_plan

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
SIZES = (4096, 5120, 8192, 11008, 14336, 18944, 28672)
TOKENS = (1, 16, 2048, 8192)
TRANSFORMS = ("kronecker", "hadamard", "none")
_PAST_CACHE = 200 << 20  # bytes that inputs rotate over
SITE_ERROR = 0.5 + 2**-3  # in steps: half of one by rounding, and what operands in bfloat16 add at most
PRODUCT_ERROR = 2**-7  # of the largest element: results are bfloat16
SCALE_ERROR = 2**-7  # of a token: four roundings to bfloat16
BLOCK_ERROR = 1.15  # see `block_error`: right blocks of 64 to 512 channels give .99 to 1.06
_ATTENTION_ERROR = 0.02  # of the largest element
_SDPA = "flatquant_bench"  # the baseline's attention, as transformers knows it
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, in milliseconds; `ratio` is of `baseline_ms` to `ms`, None where the check failed."""

    what: str
    tokens: int
    error: float  # of the check: distance from the reference, in the check's own unit
    correct: bool
    ms: float | None = None
    low: float | None = None  # tenth percentile
    high: float | None = None  # ninetieth
    baseline: str = ""
    baseline_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the baseline."""
        return None if self.ms is None or self.baseline_ms is None else self.baseline_ms / self.ms

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    median: float
    low: float
    high: float


def measure(calls: Sequence[Callable[[], Any]], device: torch.device, *, seconds: float = 0.3) -> Times:
    """Time one call, from runs of all of them in turn; on CUDA as a graph.

    Args:
        calls: the same work on different data.
        seconds: to spend on it.
    """
    return in_turn([calls], device, seconds=seconds)[0]


def in_turn(sides: Sequence[Sequence[Callable[[], Any]]], device: torch.device, *, seconds: float = 0.3) -> list[Times]:
    """`measure` for each of several sides, run one after the other again and again: none meets a warmer device."""
    runs = [_recorded(calls, device) if device.type == "cuda" else partial(_wall, calls) for calls in sides]
    for _ in range(3 if device.type == "cuda" else 1):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in sides]
    until = time.perf_counter() + seconds * len(sides)
    while times and (len(times[0]) < 10 or (time.perf_counter() < until and len(times[0]) < 1000)):
        for run, calls, taken in zip(runs, sides, times, strict=True):
            taken.append(run() / len(calls))
    deciles = [statistics.quantiles(taken, n=10) for taken in times]
    return [Times(statistics.median(t), d[0], d[-1]) for t, d in zip(times, deciles, strict=True)]


def _recorded(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """Calls as one graph; it gives the milliseconds of a replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return replay


def _wall(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - start)


def copies(bytes_each: int) -> int:
    """How many inputs of a size calls rotate over, so that none is found in the cache."""
    return max(1, min(64, -(-_PAST_CACHE // max(1, bytes_each))))


def moves(size: int, count: int, device: torch.device) -> list[Callable[[], Any]]:
    """Copies that read and write `size` bytes together, of `count` pairs of buffers."""
    half = [torch.empty(max(1, size // 2), dtype=torch.uint8, device=device) for _ in range(2 * count)]
    return [partial(a.copy_, b) for a, b in zip(half[::2], half[1::2], strict=True)]


# --------------------------------------------------------------------------------------------- kernels


def make_site(n: int, transform: str, device: torch.device) -> Site:
    """A site of n channels with a random transform of a kind."""
    n1, n2 = kronecker_split(n)
    left = right = None
    if transform != "none":
        left, right = (_orthogonal(k, transform, device) for k in (n1, n2))
    return Site((n1, n2), left, right, torch.full((2,), 0.95, device=device), 4)


def _orthogonal(n: int, transform: str, device: torch.device) -> Tensor:
    """A Hadamard matrix, if that is the transform and there is one; a random one otherwise.  # float32, (n, n)"""
    if transform == "hadamard" and has_hadamard(n):
        return (hadamard(n) / n**0.5).to(device)
    return torch.linalg.qr(torch.randn(n, n, device=device)).Q


def sites(device: torch.device, sizes: Sequence[int], tokens: Sequence[int]) -> list[Row]:
    """SwiGLU, transform and quantisation, packed, against the time of moving the same bytes."""
    rows = []
    for n in sizes:
        site = make_site(n, "kronecker", device)
        for t in tokens:
            moved = t * n * 5 // 2  # x in 16 bit, integers in 4
            inputs = [torch.randn(t, n, device=device, dtype=torch.bfloat16) for _ in range(copies(moved))]
            ends = torch.arange(t, device=device)[[*range(min(t, 64)), *range(-min(t, 64), 0)]]
            integers = in_order(kron_quantize.plain(inputs[0], site, "packed")[0][ends], "packed")
            error = site_error(inputs[0][ends], integers, site)
            bytes_ = measure(moves(moved, len(inputs), device), device)
            rows.append(
                _row(
                    f"transform and quantise {n} ({site.shape[0]} x {site.shape[1]})",
                    t,
                    error,
                    error <= SITE_ERROR,
                    [partial(kron_quantize.plain, x, site, "packed") for x in inputs],
                    device,
                    "moving the bytes",
                    bytes_.median,
                )
            )
            del inputs
    return rows


def site_error(x: Tensor, integers: Tensor, site: Site) -> float:
    """How far integers lie from the exact values, in steps: one half by rounding, and a little by arithmetic."""
    left, right = (None if p is None else p.double() for p in (site.left, site.right))
    _, scale = site_reference.kron_quantize(x.double(), left, right, site.ratios.double(), site.bits, "float8")
    exact = (kron_matmul(x.double(), left, right) / scale).clamp(-8, 7)
    return (integers - exact).abs().max().item()


def in_order(integers: Tensor, form: Form) -> Tensor:
    """What a site gives, one by one in the order of channels.  # float64, (T, n)"""
    match form:
        case "packed":
            return unpack_bits(integers, 4, 2 * integers.shape[-1]).double() - 8
        case "planes":
            return integers.double().unflatten(-1, (2, -1)).mT.flatten(-2)
        case "float8":
            return integers.double()


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest element."""
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def products(device: torch.device, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Row]:
    """Products with packed weights, against bfloat16."""
    rows = []
    for o, n in shapes:
        count = copies(o * n // 2)
        packed = [torch.randint(0, 256, (o, n // 2), device=device, dtype=torch.uint8) for _ in range(count)]
        scale = torch.rand(o, device=device) * 0.01 + 0.01
        scratch = int4_linear.scratch(int4_linear.scratch_bytes(o, n), device)
        dense = [torch.randn(o, n, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * o * n))]
        for t in tokens:
            x = torch.randint(-8, 8, (t, n), device=device, dtype=torch.int8)
            if int4_linear.form(t, device, torch.bfloat16) == "float8":
                x = x.float().to(torch.float8_e4m3fn)
            s = torch.rand(t, 1, device=device) + 0.5
            want = product_reference.int4_linear(x, s, packed[0], scale, None, None, torch.float32)
            product = partial(int4_linear.int4_linear, dtype=torch.bfloat16, scratch=scratch)
            error = relative_error(product(x, s, packed[0], scale, None, None), want)
            y = torch.randn(t, n, device=device, dtype=torch.bfloat16)
            base = measure([partial(F.linear, y, w) for w in dense], device)
            calls = [partial(product, x, s, w, scale, None, None) for w in packed]
            rows.append(
                _row(f"product {o} x {n}", t, error, error <= PRODUCT_ERROR, calls, device, "bfloat16", base.median)
            )
        del packed, dense
    return rows


def _row(
    what: str,
    tokens: int,
    error: float,
    correct: bool,
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    baseline: str,
    baseline_ms: float | None,
) -> Row:
    times = measure(calls, device) if correct else None
    return _made(what, tokens, error, times, baseline, baseline_ms)


def _made(what: str, tokens: int, error: float, times: Times | None, baseline: str, baseline_ms: float | None) -> Row:
    """A row; of what failed its check there are no times."""
    if times is None:
        return Row(what=what, tokens=tokens, error=error, correct=False, baseline=baseline)
    return Row(
        what=what,
        tokens=tokens,
        error=error,
        correct=True,
        ms=times.median,
        low=times.low,
        high=times.high,
        baseline=baseline,
        baseline_ms=baseline_ms,
    )


# --------------------------------------------------------------------------------------------- models


def config_of(shape: str, layers: int | None = None) -> Any:
    """The configuration of a Llama of the shape.

    Raises:
        SpecError: an unknown shape.
    """
    if shape not in SHAPES:
        raise SpecError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    sizes: dict[str, Any] = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    return LlamaConfig(**sizes, max_position_embeddings=8192)


@torch.no_grad()
def packed_model(
    config: Any, device: torch.device, transform: str = "kronecker", *, key_offset: bool = False
) -> PreTrainedModel:
    """A W4A4KV4 model of random integers, with the fused runtime attached.

    Args:
        transform: "kronecker" everywhere; "hadamard" where QuaRot has it online, in front of o_proj and down_proj and
            on queries and keys; or "none".
        key_offset: keys are cached less a constant.
    """
    with torch.device("meta"):
        own = copy.deepcopy(config)  # which names the attention
        model: Any = LlamaForCausalLM(own).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    arch = arch_of(config)
    seams.use_attention(model, arch.reached)
    scheme = replace(Scheme.parse("w4a4kv4"), key_offset="mean" if key_offset else "none")
    plan = make_plan(flatquant(scheme), arch, Geometry.of(config), model.model.layers)
    for block, block_plan in zip(model.model.layers, plan.blocks, strict=True):
        install(block, plan.attention, block_plan, packed=True)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        leaf = name.rpartition(".")[2]
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif leaf == "scale":
            tensor.fill_(0.2 / config.hidden_size**0.5)
        elif leaf == "ratio":
            tensor.fill_(0.95)
        elif "norm" in name:
            tensor.fill_(1)
        elif leaf in ("left", "right", "key_matrix", "query_matrix"):
            tensor.copy_(torch.linalg.qr(torch.randn_like(tensor)).Q)
        elif "inv_freq" not in leaf:
            tensor.normal_(0, 0.02)
    if transform != "kronecker":
        _replace_transforms(model, transform)
    fused.attach(model, ("cuda", "cpu"))
    return model.eval().requires_grad_(False)


def _replace_transforms(model: PreTrainedModel, transform: str) -> None:
    for name, module in model.named_modules():
        if not hasattr(module, "left") and not hasattr(module, "key_matrix"):
            continue
        for leaf in ("left", "right", "key_matrix", "query_matrix"):
            factor = getattr(module, leaf, None)
            if factor is None:
                continue
            online = transform == "hadamard" and not name.endswith(("attn_in", "mlp_in"))
            size = factor.shape[0]
            setattr(module, leaf, _orthogonal(size, transform, factor.device) if online else None)


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

    The baseline has whichever of PyTorch's attention kernels is fastest, without a mask, which none of these needs.

    Returns:
        The rows, and bytes of weights and cache.
    """
    config = config_of(shape, layers)
    AttentionInterface.register(_SDPA, _attention)
    with device:  # random numbers are drawn where they are needed
        baseline: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=_SDPA)
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
        _release(device)

    packed = {transform: packed_model(config, device, transform) for transform in TRANSFORMS}
    runtimes = {transform: runtime_of(model) for transform, model in packed.items()}
    errors = {t: max(kernels_error(r), block_error(packed[t], r) / BLOCK_ERROR) for t, r in runtimes.items()}
    right = {t: runtime for t, runtime in runtimes.items() if errors[t] <= 1}
    rows: list[Row] = []

    def add(what: str, tokens: int, base: tuple[str, Times] | None, times: Sequence[Times]) -> None:
        name, ms = (f"bfloat16, {base[0]}", base[1].median) if base else ("bfloat16 (does not fit)", None)
        taken = dict(zip(right, times, strict=True))
        rows.extend(_made(f"{shape} {what}, {t}", tokens, errors[t], taken.get(t), name, ms) for t in TRANSFORMS)

    ours = [partial(prefill, runtime, ids, runtime.new_cache(1, prompt)) for runtime in right.values()]
    times = in_turn([[call] for call in (*base.values(), *ours)], device, seconds=0.5)
    base_prefill |= dict(zip(base, times, strict=False))
    add("prefill", prompt, _fastest(base_prefill), times[len(base) :])
    baseline, base, ours = None, {}, []  # their memory is for the next ones
    _release(device)
    for b in batches:
        steps = [partial(decoding, runtime, b, prompt) for runtime in right.values()]
        add("decode", b, base_decode[b], _in_turn_or_alone(steps, device))
    cache = runtimes["kronecker"].new_cache(1, prompt)
    cache.room.rewind(prompt)
    sizes["weights"] = sum(t.nbytes for t in packed["kronecker"].state_dict().values())
    sizes["cache"] = cache.nbytes()
    return rows, sizes


def _in_turn_or_alone(sides: Sequence[Callable[[], Callable[[], Any]]], device: torch.device) -> list[Times]:
    """`in_turn` for sides that are made for it; one after the other where there is no memory for all at once."""
    with contextlib.suppress(torch.OutOfMemoryError):
        times = in_turn([[make()] for make in sides], device, seconds=0.5)
        _release(device)
        return times
    times = []
    for make in sides:
        _release(device)
        times += in_turn([[make()]], device, seconds=0.5)
    _release(device)
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
    cache.room.turn(*runtime.angles(places, torch.float32), places)
    cache.room.advance(prompt)

    def step() -> Tensor:
        logits = runtime.head(runtime.hidden(ids, ids + prompt, cache, {}))
        cache.room.advance(1)
        cache.room.rewind(prompt)
        return logits

    return step


def _base_decode(model: PreTrainedModel, batch: int, prompt: int, device: torch.device) -> tuple[str, Times] | None:
    """A step of decoding by the fastest attention; None where the memory of the GPU does not hold it."""
    found: dict[str, Times] = {}
    with contextlib.suppress(torch.OutOfMemoryError):
        cache = StaticCache(config=model.config, max_cache_len=prompt + 1)
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
            _release(device)
    _release(device)
    return _fastest(found)


def kernels_error(runtime: fused.Fused) -> float:
    """How far sites and products of the first block lie from their references on the same inputs, in what they may."""
    block, device, dtype = runtime.blocks[0], runtime.device, runtime.norm.gain.dtype
    shares = [_attention_error(runtime, block, dtype) / _ATTENTION_ERROR]
    for tokens in (1, 16, 80):  # each has its own kernel of a product
        form = int4_linear.form(tokens, device, dtype)
        for name, site in block.sites.items():
            n = site.shape[0] * site.shape[1]
            x, gate = (torch.randn(tokens, n, device=device, dtype=dtype) for _ in range(2))
            if name == "attn_out":
                parts = torch.randn(tokens, block.heads.queries, 3, block.heads.head_dim, device=device)
                lse = torch.randn(parts.shape[:3], device=device)
                calls = [
                    (x, kron_quantize.plain(x, site, form)),
                    (site_reference.merged(parts, lse), kron_quantize.merge(parts, lse, site, form)),
                ]
            elif name == "mlp_mid":
                calls = [(site_reference.gated(x, gate), kron_quantize.gate(x, gate, site, form))]
            else:
                norm = block.norms[name == "mlp_in"]
                exact = site_reference.rms_norm(x, norm.gain, norm.eps)
                calls = [(exact, kron_quantize.norm(x, norm.gain, norm.eps, site, form))]
            for exact, (integers, scale) in calls:
                want = site_reference.kron_quantize(exact, site.left, site.right, site.ratios, site.bits, "float8")[1]
                shares.append(site_error(exact, in_order(integers, form), site) / SITE_ERROR)
                shares.append(((scale - want) / want).abs().max().item() / SCALE_ERROR)
        for product in block.products.values():
            x = torch.randint(-8, 8, (tokens, 2 * product.packed.shape[1]), device=device, dtype=torch.int8)
            x = x.float().to(torch.float8_e4m3fn) if form == "float8" else x
            s = torch.rand(tokens, 1, device=device) + 0.5
            weights = (product.packed, product.scale, product.bias)
            exact = product_reference.int4_linear(x, s, *weights, None, torch.float32)
            got = int4_linear.int4_linear(x, s, *weights, None, dtype, runtime.scratch)
            shares.append(relative_error(got, exact) / PRODUCT_ERROR)
    return max(shares)


def random_store(batch: int, heads: int, places: int, head_dim: int, device: torch.device) -> kv_cache.Store:
    """Keys or values of random integers."""
    shape = (batch, heads, places)
    packed = torch.randint(0, 256, (*shape, head_dim // 2), device=device, dtype=torch.uint8)
    zero = torch.randint(0, 16, shape, device=device, dtype=torch.uint8)
    return kv_cache.Store(packed, torch.rand(shape, device=device) * 0.1, zero)


def _attention_error(runtime: fused.Fused, block: fused.Block, dtype: torch.dtype) -> float:
    """How far one token's attention over 300 places of two sequences lies from the reference's."""
    heads, places, device = block.heads, 300, runtime.device
    keys, values = (random_store(2, heads.keys, places, heads.head_dim, device) for _ in range(2))
    q = torch.randn(2, heads.queries, heads.head_dim, device=device, dtype=dtype)
    last, start = torch.tensor([places - 1], device=device), torch.tensor([0, 7], device=device)
    given = (q, keys, values, last, start, block.window, block.scaling)
    shortages: list[kv_cache.Shortage | None] = [None]
    if heads.offset is not None:
        turns = runtime.angles(torch.arange(places, device=device)[None], torch.float32)
        angles = turns.of_pairs("halves").expand(2, -1, -1).contiguous()
        amounts = heads.shortage(q[:, :, None])[:, :, 0]
        gaps = torch.tensor([0, 1], dtype=torch.int32, device=device)  # each way to get at angles
        shortages.append(kv_cache.Shortage(amounts, angles, runtime.first_angles, gaps))
    return max(
        relative_error(
            site_reference.merged(*kv_cache.attend(*given, 3, short)),
            site_reference.merged(*cache_reference.attend(*given, short)),
        )
        for short in shortages
    )


def block_error(model: PreTrainedModel, runtime: fused.Fused) -> float:
    """The error that 4-bit activations, keys and values make in the first block's kernels, over that in its modules.

    The truth is the block with all of these in 16 bits. Two right ways to round to 4 bits are equally far from it,
    though they are nearly as far from each other: single roundings go the other way, and the sites that follow amplify
    them. A wrong block is farther.
    """
    inner: Any = model.base_model
    exact = _without_grids(inner.layers[0])
    ratios = []
    for tokens in (48, 80):  # either side of where products change their kernel
        x = torch.randn(1, tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)
        places = torch.arange(tokens, device=model.device)[None]
        cos, sin = inner.rotary_emb(x, places)
        cache = runtime.new_cache(1, tokens)
        cache.room.turn(cos, sin, places)
        got = runtime.blocks[0](x, cos, sin, runtime.first_angles, cache, cache.packed[0], {}, runtime.scratch)
        given: dict[str, Any] = {"position_embeddings": (cos, sin), "attention_mask": None, "position_ids": places}
        truth = exact(x, **given)
        ratios.append(((got - truth).float().norm() / (inner.layers[0](x, **given) - truth).float().norm()).item())
    return max(ratios)


def _without_grids(block: nn.Module) -> nn.Module:
    """A copy with the same weights, of which activations, keys and values are not quantised."""
    made = copy.deepcopy(block)
    for module in made.modules():
        if isinstance(module, FrozenSite):
            module.activations = None
        elif isinstance(module, FrozenKeyValue):
            module.keys = module.values = None
    return made


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- the command


def run(
    device: torch.device, what: Sequence[str], shapes: Sequence[str], *, tiny: bool = False
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """All measurements that were asked for.

    Args:
        what: of "sites", "products", "models".
        shapes: of models and of their products.
        tiny: sizes for a machine without a GPU: the way is the same, the figures mean nothing.

    Returns:
        Rows, and for every model the bytes of its weights and of its cache.

    Raises:
        SpecError: an unknown shape, or one for which the device has no memory.
    """
    rows: list[Row] = []
    memory: dict[str, dict[str, int]] = {}
    if "sites" in what:
        rows += sites(device, (64, 96) if tiny else SIZES, (1, 5) if tiny else TOKENS)
    for shape in shapes:
        config = config_of(shape)
        if "products" in what:
            n, i, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
            matrices = ((n + 2 * kv, n), (n, n), (2 * i, n), (n, i))
            rows += products(device, matrices, (1, 5) if tiny else (1, 4, 16, 64, 2048))
        if "models" in what:
            options: dict[str, Any] = {"prompt": 16, "batches": (1, 2)} if tiny else {}
            try:
                made, memory[shape] = models(shape, device, **options)
            except torch.OutOfMemoryError as error:
                raise SpecError(f"{shape} needs more memory than {device} has; name another with --shapes") from error
            rows += made
            _release(device)
    return rows, memory
