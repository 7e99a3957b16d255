"""Preflight: law 1 on the user's own model with the installed libraries, before minutes are spent.

Of every kind of block one is copied in float64. Random changes of basis go onto every edge that the recipe transforms,
grids stay off, and the outputs are compared with those of the untouched copy: as fitted, folded, with padding on the
left, and token by token with a cache. transformers' own model calls the block, so that masks, rotary embeddings and
the cache are those of the installed version. The untouched copy is also compared with the model's own attention.

The bound follows from the precision at hand. Norms, routers and rotary embeddings compute in float32 whatever the
model, and a block may amplify that rounding (keys with biases in the hundreds do). So the bound is measured: how far
the untouched block moves when its inputs are moved by float32's rounding, times `_MARGIN`. In the model's own 16 bits
a wrong bias would drown in rounding; the copy costs 8 bytes a weight of one block for seconds.

What was given up: inputs are random, not those of text. The law holds for any input.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from flatquant import seams, versions
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.lent import Lent
from flatquant.errors import FlatQuantError, ModelError, one_line
from flatquant.models import Checkpoint
from flatquant.runtime.embedding import embedding_device
from flatquant.spec import Recipe, Scheme, Transforms, TransformSpec
from flatquant.transforms import Factor, make_factor, shared_inverses
from flatquant.transforms.factor import cayley
from flatquant.wiring.arch import Arch, Geometry, blocks_at, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fitted import FitBlock
from flatquant.wiring.fold import fold_block
from flatquant.wiring.keyvalue import FitKeyValue
from flatquant.wiring.plan import make_plan
from flatquant.wiring.residual import residual_factor
from flatquant.wiring.wrap import wrap_block

_TOKENS, _PADDING, _PIECES = 10, 3, (6, 3, 1)  # of each of two windows; on the left of one; how a cache is filled
_NOISE = 0.3  # of random scales, and of matrices in spectral norm
_MARGIN = 100.0  # between what float32's rounding of the inputs does and the bound
_FLOOR = 1e-6  # of the bound: roundings inside a block that moving its inputs does not show
_SEAM = "keys"  # an edge that no recipe names: keys and queries after RoPE


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was checked. `error` and `bound` are those of the check that came nearest to its bound."""

    kinds: int
    error: float
    bound: float
    seconds: float


@torch.no_grad()
def preflight(
    model: PreTrainedModel, recipe: Recipe, *, device: torch.device, checkpoint: Checkpoint | None = None
) -> Preflight | None:
    """Check that random changes of basis leave one block of every kind as it is; None if the recipe has none.

    The model is not changed, and no random stream but its own is read.

    Args:
        device: where the copies go, one at a time.
        checkpoint: where a block's tensors come from if the model's blocks are on the meta device.

    Raises:
        ModelError: a block and an edge, and by how much the block's output moved.
    """
    start, arch = time.perf_counter(), arch_of(model.config, model)
    transforms = _at_random(recipe)
    if not transforms:
        return None
    blocks = blocks_at(model, arch.blocks)
    kinds: dict[object, int] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(_kind(block), index)
    found = []
    with _attention(model, seams.ATTENTION) if arch.reached else nullcontext():
        seams.use_attention(model, arch.reached)
        for index in kinds.values():
            try:
                found += _Check(model, arch, blocks, index, device, checkpoint).law(transforms)
            except FlatQuantError as error:
                raise type(error)(f"preflight, block {index}: {error}") from error
    if "residual" in transforms:
        found.append(_final_norm(model, arch, transforms["residual"][0]))
    nearest = max(found, key=lambda f: f.error / f.bound)
    seconds = round(time.perf_counter() - start, 3)
    return Preflight(kinds=len(kinds), error=nearest.error, bound=nearest.bound, seconds=seconds)


def _at_random(recipe: Recipe) -> dict[str, Transforms]:
    """A recipe's transforms with starts that need no text; and one of keys, if their seam is used at all."""
    plain = ("diagonal", "shift")
    transforms = {
        site: tuple(replace(part, init="identity") if part.kind in plain else part for part in parts)
        for site, parts in recipe.transforms.items()
        if parts
    }
    if recipe.scheme.keys is None and not recipe.scheme.cache_overrides:
        transforms.pop("qk", None)  # without effect, and not every family has a place for it
    seam = recipe.scheme.keys is not None or recipe.scheme.values is not None
    if seam and not any(part.kind == "matrix" for part in transforms.get("qk", ())):
        transforms[_SEAM] = (TransformSpec(kind="matrix", init="orthogonal"),)
    return transforms


def _kind(block: nn.Module) -> object:
    """What decides a block's function besides the values of its tensors; its own number aside."""

    def settings(module: nn.Module) -> str:
        plain = (bool, int, float, str, type(None))
        held = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx" and k[0] != "_"}
        return repr(sorted(held.items()))

    shapes = tuple((name, tuple(t.shape)) for name, t in block.state_dict().items())
    return shapes, tuple((name, type(module), settings(module)) for name, module in block.named_modules())


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Have a model and the copies of its blocks call the attention function `name`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True, kw_only=True)
class _Found:
    error: float
    bound: float
    where: str  # of the law's stages

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # NaN does not


def _raise(what: str) -> NoReturn:
    """Report a break of law 1; of transformers, where the installed release is none that was tested."""
    if not _is_tested(transformers.__version__):
        raise seams.broken(what)
    raise ModelError(f"{what}; flatquant/wiring/archs does not describe this model (docs/families.md)")


def _final_norm(model: PreTrainedModel, arch: Arch, rotation: TransformSpec) -> _Found:
    """The final norm, whose gain goes to the head: without it, a rotation of the residual stream passes."""
    norm = copy.deepcopy(submodule(model, arch.final_norm)).double()
    gain = norm.get_parameter("weight")
    x = torch.randn(_TOKENS, len(gain), generator=_generator(0), dtype=torch.float64).to(gain)
    want = norm(x)
    bound = max(_FLOOR, _MARGIN * _deviation(norm(_rounded(x)), want))
    r = make_factor(rotation, len(gain), _generator(1)).to(gain).matrix()
    before = gain + arch.norm_offset
    gain.fill_(1 - arch.norm_offset)
    found = _Found(error=_deviation(norm(x @ r) @ r.mT * before, want), bound=bound, where="")
    if not found.holds:
        _raise(f"preflight: a rotation moves the final norm's output by {found.error:.2g}, not at most {bound:.1g}")
    return found


class _Check:
    """The law on one block."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        blocks: nn.ModuleList,
        index: int,
        device: torch.device,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.arch, self.blocks, self.index = model, arch, blocks, index
        self.device, self.checkpoint = device, checkpoint
        config = model.config.get_text_config()
        x = torch.randn(2, _TOKENS, config.hidden_size, generator=_generator(0), dtype=torch.float64)
        self.hidden = x.to(device)  # (2, T, h)
        self.lent = Lent.of(blocks, config.hidden_size)

    def law(self, transforms: dict[str, Transforms]) -> list[_Found]:
        """All edges at once; if that fails, one by one, to name the edge."""
        block = self._copy()
        want = self._untouched(block)
        bound = max(_FLOOR, _MARGIN * self._rounding(block, want))
        if self.model.config.get_text_config()._attn_implementation == seams.ATTENTION:
            with _attention(self.model, "eager"), _WideSoftmax():
                own = _deviation(self._plain(block), want)
            if not own <= bound:
                raise seams.broken(f"the model's own attention and {seams.ATTENTION!r} differ by {own:.2g}")
        found = self._stages(block, transforms, want, bound)
        if all(f.holds for f in found):
            return found
        del block
        for edge, parts in transforms.items():
            alone = self._stages(self._copy(), {edge: parts}, want, bound)
            self._raise_first(edge, alone)
        self._raise_first("all edges together", found)
        raise AssertionError("one of them does not hold")

    def _raise_first(self, edge: str, found: list[_Found]) -> None:
        broken = [f for f in found if not f.holds]
        if not broken:
            return
        first = broken[0]
        _raise(
            f"{edge}: a change of basis moves the block's output by {first.error:.2g}{first.where}, "
            f"where rounding allows {first.bound:.1g}"
        )

    def _stages(self, block: nn.Module, transforms: dict[str, Transforms], want: Tensor, bound: float) -> list[_Found]:
        """What a block does that is given a basis, against what it did.  # want: (2, T, h)"""
        fit, basis = self._wrap(block, transforms)
        found = []

        def add(where: str, run: Callable[[nn.Module, Factor | None], Tensor], of: Tensor) -> None:
            found.append(_Found(error=_deviation(run(block, basis), of), bound=bound, where=where))

        with shared_inverses(fit.roots()):
            add("", self._plain, want)
        fold_block(fit, dtype=torch.float64)
        add(" once folded", self._plain, want)
        add(" with padding on the left", self._padded, want[1:, : _TOKENS - _PADDING])
        add(" with a cache", self._cached, want)
        return found

    # ------------------------------------------------------------------------------------------ the block

    def _copy(self) -> nn.Module:
        """The block in float64, on the device; it shares the model's config."""
        config = self.model.config.get_text_config()
        block = copy.deepcopy(self.blocks[self.index], {id(config): config})
        if self.checkpoint is not None:
            self.checkpoint.fill(block, f"{self.arch.blocks}.{self.index}.", self.device)
        return block.to(self.device, torch.float64).requires_grad_(False)

    def _wrap(self, block: nn.Module, transforms: dict[str, Transforms]) -> tuple[FitBlock, Factor | None]:
        """Put random changes of basis onto a block's edges."""
        named = {site: parts for site, parts in transforms.items() if site != _SEAM}
        law = Recipe(name="preflight", scheme=Scheme(), transforms=named)
        plan = make_plan(law, self.arch, Geometry.of(self.model.config), self.blocks, force=True)
        generator = _generator(1)
        basis = residual_factor(self.model, law, plan, generator, force=True)
        if basis is not None:
            basis.to(self.device, torch.float64)
        at = plan.blocks[self.index]
        fit = wrap_block(block, self.arch, at, law, {}, generator, residual=basis, force=True)
        if _SEAM in transforms and fit.arch.attention is not None:
            factor = make_factor(transforms[_SEAM][0], at.key_dim, generator)
            latent = fit.key_value.latent if fit.key_value else None
            rotary = at.latent.rotary if at.latent else None
            fit.key_value = FitKeyValue(factor, None, None, latent=latent, rotary=rotary)
            seams.attach(submodule(block, fit.arch.attention), fit.key_value.to(self.device))
        for root in (block, *fit.roots()):
            root.double()
        _move(fit, generator)
        return fit, basis

    # ----------------------------------------------------------------------------------------- its outputs

    def _plain(self, block: nn.Module, basis: Factor | None = None) -> Tensor:
        """What a block adds to the residual stream of two windows.  # (2, T, h)"""
        return self._run(block, basis, self.hidden, torch.arange(_TOKENS).expand(2, -1))

    def _untouched(self, block: nn.Module) -> Tensor:
        """`_plain`; if the model does not run by itself either, that is the user's to know."""
        try:
            return self._plain(block)
        except (FlatQuantError, torch.OutOfMemoryError):
            raise
        except Exception:
            with _attention(self.model, "eager"):
                try:
                    self._plain(block)
                except Exception as own:
                    version = f"transformers {transformers.__version__}"
                    raise ModelError(f"the model itself does not run in {version}: {one_line(own)}") from own
            raise

    def _rounding(self, block: nn.Module, want: Tensor) -> float:
        """How far float32's rounding of the inputs moves what an untouched block adds."""
        moved = self._run(block, None, _rounded(self.hidden), torch.arange(_TOKENS).expand(2, -1))
        return _deviation(moved, want)

    def _padded(self, block: nn.Module, basis: Factor | None) -> Tensor:
        """The second window's first tokens, behind padding.  # (1, T - padding, h)"""
        hidden = self.hidden.roll(_PADDING, dims=1)  # of the first window, nothing is padding
        mask = torch.ones(2, _TOKENS, dtype=torch.int64)
        mask[1, :_PADDING] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return self._run(block, basis, hidden, positions, mask=mask)[1:, _PADDING:]

    def _cached(self, block: nn.Module, basis: Factor | None) -> Tensor:
        """Both windows, piece by piece.  # (2, T, h)"""
        cache = DynamicCache(config=self.model.config)
        positions = torch.arange(_TOKENS).expand(2, -1)
        pieces = zip(self.hidden.split(_PIECES, 1), positions.split(_PIECES, 1), strict=True)
        return torch.cat([self._run(block, basis, x, at, cache=cache) for x, at in pieces], 1)

    def _run(
        self,
        block: nn.Module,
        basis: Factor | None,
        hidden: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Have the model call a block in its place; what it adds to the residual stream.  # (B, T, h)"""
        out: list[Tensor] = []

        def called(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            call = BlockCall(args=args, kwargs=kwargs, basis=basis).map(_wide).to(self.device)
            out.append(call(block, hidden) - hidden)
            return given

        home = embedding_device(self.model)
        with _aside(self.blocks, self.index, called, hidden, self.lent):
            self.model.base_model(
                input_ids=torch.zeros_like(positions, device=home),
                position_ids=positions.to(home),
                attention_mask=None if mask is None else mask.to(home),
                use_cache=cache is not None,
                **{seams.CACHE: cache},
            )
        return out[0]


@contextmanager
def _aside(blocks: nn.Module, index: int, called: Callable[..., Tensor], inputs: Tensor, lent: Lent) -> Iterator[None]:
    """Have blocks hand hidden states on unchanged; in the place of block `index`, `called` is called.

    The others put zeros into their layer of a cache for all tokens: positions and masks may follow any layer's length.
    What they are given says nothing: some models take the first of what a block returns. Those that lend keys and
    values lend random products of the block's inputs, for all tokens that there are by then.

    Args:
        inputs: of the block, (B, T, h).
    """

    def passing(layer: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            empty = hidden.new_zeros(len(inputs), 1, inputs.shape[1], 1)
            given = lent.at_random(layer, inputs, _generator(layer)) or {"": (empty, empty)}
            for name, (k, v) in given.items():
                for value in (*args, *kwargs.values()):
                    if seams.is_cache(value) and _holds(value, layer):
                        k, v = value.update(k, v, layer)
                if name:
                    kwargs[seams.LENT][name] = k, v
            return hidden

        return forward

    for layer, block in enumerate(blocks.children()):
        block.forward = called if layer == index else passing(layer)  # shadows the method
    try:
        yield
    finally:
        for block in blocks.children():
            del block.forward


def _holds(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache holds keys and values. There may be none for blocks that read those of others."""
    return layer < len(cache.layers) and isinstance(cache.layers[layer], DynamicLayer)


class _WideSoftmax(TorchFunctionMode):
    """Softmax in its input's precision. Eager attention asks for float32, which large scores do not fit into."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def _wide(t: Tensor) -> Tensor:
    """An argument of a block; a floating-point one in float64."""
    if not t.is_floating_point():
        return t
    # The lowest float16, with which an additive mask hides a token, is above some scores.
    hidden = t == torch.finfo(t.dtype).min
    return t.to(torch.float64).masked_fill(hidden, torch.finfo(torch.float32).min)


def _rounded(x: Tensor) -> Tensor:
    """x moved by as much as float32 rounds."""
    noise = torch.randn(x.shape, generator=_generator(2), dtype=torch.float64).to(x)
    return x * (1 + torch.finfo(torch.float32).eps * noise)


def _deviation(ours: Tensor, want: Tensor) -> float:
    """The largest relative error of a token's vector; 0 where both are 0.  # (B, T, h)"""
    error, size = (ours - want).norm(dim=-1), want.norm(dim=-1)
    return float(torch.where(error == 0, error, error / size).max())


def _move(fit: FitBlock, generator: torch.Generator) -> None:
    """Move every scale and matrix, so that nothing stays 1, symmetric or, unless it is a rotation, orthogonal."""
    for group, parameters in fit.parameters().items():
        for p in parameters if group != "clip" else ():
            square = p.ndim > 1 and p.shape[-1] == p.shape[-2]
            size = _NOISE / 2 * p.shape[-1] ** -0.5 if square else _NOISE  # a Gaussian matrix has norm 2 sqrt(n)
            step = size * torch.randn(p.shape, generator=generator).to(p)
            p.copy_(p @ cayley(step) if group == "rotation" else p + step)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _is_tested(version: str) -> bool:
    """Whether a release of transformers lies in the range that the test suite passes with."""
    low, release, high = (tuple(map(int, v.split(".")[:2])) for v in (versions.TESTED[0], version, versions.TESTED[1]))
    return low <= release <= high
