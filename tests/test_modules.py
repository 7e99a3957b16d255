"""What sites share lasts as long as a block's forward pass, and is never old."""

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatquant.calibrate.capture import capture
from flatquant.modules import joined
from flatquant.recipes import direct, rtn, svdquant, vptq
from flatquant.runtime.artifact import load, save
from flatquant.runtime.linear import PackedLinear
from flatquant.spec import DataSpec, EndToEndSpec, Recipe, Scheme
from flatquant.wiring.archs import arch_of
from tests.laws import BASES, SHAPES, bare, calibrated, family, in_a_pass, tokens_for, wrap
from tests.tiny_models import tiny_family

DATA = DataSpec(samples=4, seqlen=12)


def _small(recipe: Recipe) -> Recipe:
    """On little text, with nothing trained."""
    end = None if recipe.end_to_end is None else EndToEndSpec(steps=0)
    return Recipe(**{**recipe.__dict__, "data": DATA, "end_to_end": end})


def _original(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if "experts" in name:
        return tiny_family("mixtral", dtype=dtype)
    return family("llama", dtype=dtype, **SHAPES["biased"])


def _fit(name: str) -> nn.Module:
    model = _original(name, torch.float64)
    wrap(model, bare(BASES["svd orthogonal"], Scheme.parse("w4a4kv4")))
    return model


def _served(recipe: Callable[[], Recipe], name: str) -> nn.Module:
    made, plan, _ = calibrated(_original(name), _small(recipe()))
    if "packed" not in name:
        return made
    with TemporaryDirectory() as folder:
        save(made, plan, Path(folder) / "model", recipe={}, report={}, scheme="w4")
        return load(Path(folder) / "model")


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "fit": _fit,
    "fit experts": _fit,
    "frozen": partial(_served, partial(rtn, "w4a4kv4")),
    "packed": partial(_served, partial(rtn, "w4a4kv4")),
    "experts": partial(_served, partial(rtn, "w4a8")),
    "packed experts": partial(_served, partial(rtn, "w4a8")),
    "branch": partial(_served, partial(svdquant, "w4a4", rank=3)),
    "packed branch": partial(_served, partial(svdquant, "w4a4", rank=3)),
    "codebook": partial(_served, partial(vptq, "w2a16")),
    "packed codebook": partial(_served, partial(vptq, "w2a16")),
    "levels": partial(_served, partial(direct, "w2a4")),
    "packed levels": partial(_served, partial(direct, "w2a4")),
}


@cache
def _made(name: str) -> nn.Module:
    return KINDS[name](name)


def model_of(name: str) -> Any:
    """A quantised model that has never run."""
    return copy.deepcopy(_made(name))


# ------------------------------------------------------------------------------------------- nothing is kept


class Stop(Exception):
    pass


def _watch(root: nn.Module) -> list[weakref.ref]:
    """References to everything that modules inside receive and return from here on."""
    seen: list[weakref.ref] = []

    def note(module: nn.Module, args: tuple, out: Any = None) -> None:
        for value in (*args, *(out if isinstance(out, tuple) else (out,))):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                seen.append(weakref.ref(value))

    for module in root.modules():
        module.register_forward_pre_hook(note)
        module.register_forward_hook(note)
    return seen


def _alive(seen: list[weakref.ref]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in seen)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("end", ["returns", "raises", "gradients"])
def test_nothing_outlives_a_forward_pass(name: str, end: str) -> None:
    model = model_of(name)
    tokens = tokens_for(model, 2, 9)
    layers = model.model.layers
    seen = _watch(layers)
    if end == "raises":

        def stop(*_: Any) -> None:
            raise Stop

        layers[1].mlp.register_forward_hook(stop)
        with pytest.raises(Stop):
            model(tokens, use_cache=False)
    elif end == "gradients":
        x = torch.randn(2, 9, 24, dtype=model.dtype, requires_grad=True)
        model(inputs_embeds=x, use_cache=False).logits.sum().backward()
        del x
    else:
        with torch.no_grad():
            model(tokens, use_cache=False)
    assert len(seen) > 20
    assert _alive(seen) == 0


@pytest.mark.parametrize("name", ["fit", "fit experts", "frozen", "packed experts"])
def test_nothing_outlives_a_recomputed_pass(name: str) -> None:
    """Checkpointing ends a recomputation by an exception, once it has what it needs."""
    model = model_of(name)
    _, calls = capture(model, arch_of(model.config), tokens_for(model, 2, 9))
    grads = []
    for recomputed in (False, True):
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=model.dtype, requires_grad=True)
        seen = _watch(model.model.layers)
        y: Any = x
        for block, call in zip(model.model.layers, calls, strict=True):
            y = checkpoint(call, block, y, use_reentrant=False) if recomputed else call(block, y)
        y.square().sum().backward()
        grads.append(x.grad)
        del y, x
        assert _alive(seen) == 0
    assert torch.equal(*grads)


def test_a_pass_that_an_interrupt_cuts_off_ends_with_the_next() -> None:
    """torch calls no hook for a KeyboardInterrupt."""
    model = model_of("frozen")
    seen = _watch(model.model.layers)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens_for(model, 2, 9), use_cache=False)
    handle.remove()
    seen.clear()
    other = model_of("packed")
    with torch.no_grad():
        other(tokens_for(other, 1, 3), use_cache=False)
        want = model_of("frozen")(tokens_for(model, 2, 9), use_cache=False).logits
        assert torch.equal(model(tokens_for(model, 2, 9), use_cache=False).logits, want)
    assert _alive(seen) == 0


def test_a_block_inside_a_block_ends_the_pass_of_the_outer() -> None:
    model = model_of("frozen")
    site, x = model.model.layers[0].flatquant["attn_in"], torch.randn(3, 24)
    reader = model.model.layers[0].self_attn.q_proj

    def outer() -> list[Any]:
        first = site(x), reader(x)
        return [first, in_a_pass(lambda: (site(x), reader(x))), (site(x), reader(x))]

    results = in_a_pass(outer)
    assert results[0][0] is not results[1][0] is not results[2][0]
    assert all(torch.equal(y, results[0][1]) for _, y in results)


# --------------------------------------------------------------------------------------------- nothing is old

READERS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
EXPERTS = {f"mlp.experts.{e}.{leaf}" for e in (0, 3) for leaf in ("gate_proj", "up_proj")}

step = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 3)),
    st.tuples(st.just("rows"), st.integers(0, 3)),
    st.tuples(
        st.sampled_from(["change x", "another x", "gradients", "load", "change", "cast", "pass", "threads"]), st.just(0)
    ),
)


class _Machine:
    """A block's readers, used at random, against ones that have never run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.block = model_of(name).model.layers[0]
        self.unused = copy.deepcopy(self.block)
        self.paths = sorted(EXPERTS if "experts" in name else READERS)
        generator = torch.Generator().manual_seed(1)
        own = {k: v.clone() for k, v in self.block.state_dict().items()}
        self.states = [own, {k: v.flip(0) if v.ndim > 1 else v for k, v in own.items()}]  # weights' rows in reverse
        self.generator = generator
        self.dtype = torch.float64 if "fit" in name else torch.float32
        self.x = self._random()
        self.grad = False

    def _random(self) -> Tensor:
        return torch.randn(5, 24, generator=self.generator).to(self.dtype)

    def want(self, path: str, x: Tensor) -> Tensor:
        fresh = copy.deepcopy(self.unused).to(self.dtype)
        fresh.load_state_dict(self.block.state_dict())
        with torch.set_grad_enabled(self.grad):
            return fresh.get_submodule(path)(x.clone())

    def check(self, path: str, x: Tensor) -> None:
        with torch.set_grad_enabled(self.grad):
            got = self.block.get_submodule(path)(x)
        want = self.want(path, x)
        tolerance = 1e-5 if self.dtype != torch.bfloat16 else 2e-2  # of some rows alone, sums have another order
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert got.requires_grad == want.requires_grad

    def act(self, what: str, index: int) -> None:
        path = self.paths[index % len(self.paths)]
        match what:
            case "read":
                self.check(path, self.x)
            case "rows":
                site = self.block.get_submodule(path).site
                with torch.set_grad_enabled(self.grad):
                    part = site.rows(self.x, torch.tensor([4, 0, 2]))
                self.check(path, part)
            case "change x":
                with torch.no_grad():
                    self.x.mul_(-1.5)
            case "another x":
                self.x = self._random()
            case "gradients":
                self.grad = not self.grad
            case "load":
                self.states.reverse()
                self.block.load_state_dict(self.states[0])
            case "change":
                linear = self.block.get_submodule(path)
                if isinstance(linear, PackedLinear):
                    linear.packed.bitwise_xor_(0x21)
            case "cast" if "fit" not in self.name:
                self.dtype = torch.bfloat16 if self.dtype == torch.float32 else torch.float32
                self.block.to(self.dtype)
                self.x = self.x.to(self.dtype)
            case "threads":
                self.in_threads()

    def in_threads(self) -> None:
        """All readers in two threads at once, each on a tensor of its own, each in a pass of its own."""

        def work(x: Tensor) -> None:
            in_a_pass(lambda: [self.check(path, x) for path in self.paths])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, (self.x + 1, self.x - 1)))

    def run(self, steps: list[tuple[str, int]]) -> None:
        """All steps; a `pass` step begins a forward pass, or ends it."""
        runs: list[list[tuple[str, int]]] = [[]]
        for what, index in steps:
            if what == "pass":
                runs.append([])
            else:
                runs[-1].append((what, index))
        for i, part in enumerate(runs):
            if i % 2:  # while a block runs, its own tensors stay what they are
                part = [(what, index) for what, index in part if what not in ("load", "change", "cast")]
                in_a_pass(partial(self._acts, part))
            else:
                self._acts(part)

    def _acts(self, steps: list[tuple[str, int]]) -> None:
        for what, index in steps:
            self.act(what, index)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("experts", "branch", "codebook", "levels")])
@settings(max_examples=8, deadline=None)
@given(steps=st.lists(step, min_size=3, max_size=9))
def test_what_is_shared_is_what_a_fresh_module_computes(name: str, steps: list[tuple[str, int]]) -> None:
    _Machine(name).run(steps)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.booleans(), st.booleans())
def test_joined_rows_are_one_tensor_or_a_copy(sizes: list[int], n: int, reverse: bool, apart: bool) -> None:
    """Neighbouring rows of one tensor need no copy; any others are copied; either way they are the rows in order."""
    whole = torch.arange(float(sum(sizes) * n)).view(-1, n)
    parts = list(whole.split(sizes))
    if reverse:
        parts = parts[::-1]
    if apart:
        parts[0] = parts[0].clone()
    out = joined(parts)
    assert torch.equal(out, torch.cat(parts))
    alone = len(parts) == 1
    assert (out.data_ptr() == parts[0].data_ptr()) == (alone or not (reverse or apart))
