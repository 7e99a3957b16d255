"""Parts of a folder are what `load` puts into a model, and a linear cut for several ranks is still that linear."""

import dataclasses
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant import recipes
from flatquant.api import quantize
from flatquant.engines.parts import (
    Gathered,
    Joined,
    Linear,
    Own,
    Parts,
    check_ranks,
    columns_of,
    cut_site,
    rows_of,
    share,
    site_of,
)
from flatquant.errors import ArtifactError, ModelError
from flatquant.ops import int4_linear
from flatquant.ops.kron_quantize.reference import FEW
from flatquant.runtime.artifact import load
from flatquant.runtime.experts import Experts
from flatquant.runtime.folder import Folder
from flatquant.runtime.kernels import Unsupported
from flatquant.runtime.linear import FrozenSite, PackedLinear
from flatquant.seams import attached
from flatquant.spec import DataSpec, Plan, QuantSpec, Recipe, SitePlan
from tests.tiny_models import tiny_family

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))
RECIPES = {
    "flatquant": lambda: recipes.flatquant("w4a4kv4", preset="quick"),
    "groups": lambda: recipes.flatquant("w4g4a8kv4,attn_in=w16a16", preset="quick"),
    "quarot": lambda: recipes.quarot("w4a4kv4"),
    "ranks": lambda: recipes.flatquant("w4a4kv4", preset="quick").for_ranks(4),
    "rtn": lambda: recipes.rtn("w4a4"),
    "weights": lambda: recipes.flatquant("w4a16", preset="quick").for_ranks(4),
    "branch": lambda: recipes.svdquant("w4a4", rank=2),
    "levels": lambda: recipes.direct("w3a4"),
    "nvfp4": lambda: recipes.rtn("nvfp4"),
    "codebook": lambda: recipes.vptq("w3a16"),
}


def quantised(recipe: Recipe, output: Path, family: str = "llama") -> Path:
    model = tiny_family(family, hidden_size=32, head_dim=8, intermediate_size=48)
    fit = None if recipe.fit is None else dataclasses.replace(recipe.fit, epochs=min(recipe.fit.epochs, 1))
    recipe = dataclasses.replace(recipe, data=DataSpec(samples=4, seqlen=16), fit=fit)
    quantize(model, recipe, TOKENS, output=output, verdict=False)
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(RECIPES["flatquant"](), tmp_path_factory.mktemp("parts") / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("quarot")`: the folder of one of `RECIPES`, made once."""
    return cache(lambda name: quantised(RECIPES[name](), tmp_path_factory.mktemp("parts") / "out"))


def linears(plan) -> list[str]:
    blocks = enumerate(plan.blocks)
    return [f"{plan.blocks_path}.{i}.{r}" for i, b in blocks for site in b.sites.values() for r in site.readers]


# --------------------------------------------------------------------------------------------- the same modules


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "levels" else name for name in RECIPES]
)
def test_linears_compute_what_a_loaded_model_computes(name: str, tmp_path: Path) -> None:
    path = quantised(RECIPES[name](), tmp_path / "out")
    parts, model = Parts(Folder.open(path)), load(path)
    for linear in linears(parts.plan):
        theirs = model.get_submodule(linear)
        x = torch.randn(5, theirs.plain().shape[1])
        assert torch.equal(parts.linear(linear, CPU, torch.float32)(x), theirs(x)), linear


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "glm4", "cohere"])
def test_keys_and_queries_are_those_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    """With the offset of keys, whose angles are those that transformers gives the block."""
    path = quantised(recipes.flatquant("kv4", preset="quick"), tmp_path / "out", family)
    parts, model = Parts(Folder.open(path)), load(path)
    seen = {}

    def keep(index: int) -> Callable:
        return lambda module, args, kwargs: seen.__setitem__(index, kwargs["position_embeddings"])

    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(keep(index), with_kwargs=True)
    model(TOKENS[:1])
    for index in range(2):
        kv, theirs = parts.key_value(index, CPU), attached(model.model.layers[index].self_attn)
        angles = parts.angles(index, CPU)(torch.arange(16), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(angles, seen[index], strict=True))
        q, k, v = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
        assert kv.key_offset is not None
        assert torch.equal(kv.query(q), theirs.query(q))
        assert torch.equal(kv.key(k, angles), theirs.key(k, angles))
        assert torch.equal(kv.value(v), theirs.value(v))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_compute_what_a_loaded_model_computes(family: str, tmp_path: Path) -> None:
    path = quantised(RECIPES["flatquant"](), tmp_path / "out", family)
    experts = Parts(Folder.open(path)).experts("model.layers.0.mlp.experts", CPU, torch.float32)
    theirs = load(path).get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, Experts)
    x, index = torch.randn(9, 32), torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    assert torch.equal(experts(x, index, weights), theirs(x, index, weights))


def test_joined_linears_are_those_linears_and_transform_once(folder: Path) -> None:
    parts = Parts(Folder.open(folder))
    found = [parts.linear(f"model.layers.1.self_attn.{n}_proj", CPU, torch.float32) for n in "qkv"]
    x = torch.randn(3, 32)
    apart = torch.cat([linear(x) for linear in found], dim=-1)
    calls = []
    compute = found[0].site._compute
    found[0].site._compute = lambda x: calls.append(1) or compute(x)
    assert torch.equal(Joined(found)(x), apart)
    assert len(calls) == 1


def test_a_dense_weight_has_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    path = quantised(recipes.rtn("w4a4,mlp_mid=w16a16"), tmp_path / "out")
    linear = Parts(Folder.open(path)).linear("model.layers.0.mlp.down_proj", CPU, torch.bfloat16)
    assert linear.plain().dtype == torch.float32
    assert linear.weight.dtype == torch.bfloat16


def test_what_is_not_quantised_has_no_site(folder: Path) -> None:
    plan = Folder.open(folder).plan
    for path in ("lm_head", "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.7.mlp.up_proj"):
        assert site_of(plan, path) is None
    found = site_of(plan, "model.layers.1.mlp.up_proj")
    assert found is not None
    assert found[0] == "model.layers.1.flatquant.mlp_in"


# --------------------------------------------------------------------------------------------- operators


def together(parts: Parts, index: int = 1) -> list[list[Linear]]:
    """The linears of a block, by the site that they read."""
    sites = parts.plan.blocks[index].sites.values()
    root = f"{parts.plan.blocks_path}.{index}"
    return [[parts.linear(f"{root}.{r}", CPU, torch.float32) for r in site.readers] for site in sites]


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(RECIPES["flatquant"](), tmp_path_factory.mktemp("parts") / "out", "qwen2")


@settings(deadline=None, max_examples=20)
@given(
    rows=st.sampled_from([(1,), (7,), (2, 3), (70,), (0,)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_operators_have_the_bits_of_the_modules(biased: Path, rows: tuple, dtype: torch.dtype, seed: int) -> None:
    for linears in together(Parts(Folder.open(biased))):
        x = torch.randn(*rows, linears[0].plain().shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
        want = Joined(linears)(x)
        parts = Parts(Folder.open(biased))
        got = parts.kernels(linears, "here")(x)
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["quarot", "rtn"])
def test_operators_without_both_factors(name: str, tmp_path: Path) -> None:
    path = quantised(recipes.quarot("w4a4") if name == "quarot" else recipes.rtn("w4a4"), tmp_path / "out")
    parts = Parts(Folder.open(path))
    for linears in together(parts):
        x = torch.randn(5, linears[0].plain().shape[1]).bfloat16()
        want = Joined(linears)(x)
        assert torch.equal(parts.kernels(linears, "here")(x), want)


def test_torch_compile_takes_the_operators_whole(folder: Path) -> None:
    parts = Parts(Folder.open(folder))
    for linears in together(parts):
        kernels = parts.kernels(linears, "here")
        x = torch.randn(2, 3, linears[0].plain().shape[1])
        torch._dynamo.reset()
        assert torch.equal(torch.compile(kernels, fullgraph=True, backend="aot_eager")(x), kernels(x))


@pytest.mark.parametrize(
    "recipe, said",
    [
        (recipes.rtn("w4a16"), "the activations of here are not on a symmetric grid a token"),
        (recipes.rtn("w8a8"), "the weights of here are not symmetric 4-bit integers with one scale a row"),
        (recipes.rtn("w4g4a4"), "the weights of here are not symmetric 4-bit integers with one scale a row"),
        (recipes.svdquant("w4a4", rank=2), "here is a BranchedLinear, not packed integers"),
    ],
)
def test_what_has_no_kernels_says_why(recipe: Recipe, said: str, tmp_path: Path) -> None:
    parts = Parts(Folder.open(quantised(recipe, tmp_path / "out")))
    with pytest.raises(Unsupported, match=said):
        parts.kernels(together(parts)[0], "here")


def test_scratch_is_as_large_as_the_largest_product_takes(folder: Path) -> None:
    parts = Parts(Folder.open(folder))
    products = [parts.kernels(linears, "here").product for linears in together(parts)]
    assert parts._scratch_bytes == max(product.scratch_bytes for product in products)


# --------------------------------------------------------------------------------------------- ranks


class Ring:
    """Ranks in threads of this process, and what they give one another."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.parts = ranks, [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.own = threading.local()
        self.gathered: list[int] = []  # numbers a row that a rank gave

    def gather(self, part: Tensor) -> Tensor:
        self.parts[self.own.rank] = part
        self.gathered.append(part.shape[-1])
        self.barrier.wait()
        whole = torch.cat(self.parts, dim=-1)
        self.barrier.wait()
        return whole

    def __call__(self, modules: list, pieces: Iterable[Tensor]) -> list[Tensor]:
        """What each rank's module gives for its piece."""

        def run(rank: int, module, piece: Tensor) -> Tensor:
            self.own.rank = rank
            return module(piece)

        self.gathered.clear()
        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(run, range(self.ranks), modules, pieces))


def planned(plan: Plan, linear: str) -> SitePlan:
    found = site_of(plan, linear)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", ["flatquant", "groups", "quarot", "ranks", "rtn", "weights"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_the_whole(name: str, ranks: int, made: Callable[[str], Path]) -> None:
    parts, ring = Parts(Folder.open(made(name))), Ring(ranks)
    for linear in linears(parts.plan):
        whole = parts.linear(linear, CPU, torch.float32)
        x = torch.randn(5, whole.plain().shape[1])
        want = whole(x)
        own = want.shape[1] // ranks
        rows = torch.cat([rows_of(whole, own, rank, ranks)(x) for rank in range(ranks)], dim=-1)
        torch.testing.assert_close(rows, want, rtol=1e-6, atol=1e-6)
        pieces = x.chunk(ranks, dim=-1)
        plan = planned(parts.plan, linear)
        cut = [columns_of(whole, plan, ring.gather, rank, ranks) for rank in range(ranks)]
        columns = ring(cut, pieces)
        torch.testing.assert_close(torch.stack(columns).sum(0), want, rtol=1e-5, atol=1e-5)
        if name in ("ranks", "rtn", "weights") and plan.ranks % ranks == 0:  # no transform, or one that ranks do alone
            assert set(ring.gathered) == ({2} if plan.activations else set())
        elif plan.left:
            assert set(ring.gathered) == {x.shape[1] // ranks}
        if name in ("flatquant", "ranks") and x.shape[1] % (2 * ranks) == 0:
            for kernels, column in zip(
                ring([parts.kernels([one], "here") for one in cut], pieces), columns, strict=True
            ):
                assert torch.equal(kernels, column)


@pytest.mark.parametrize("name", ["flatquant", "ranks"])
@pytest.mark.parametrize("rows", [FEW, FEW + 1])
def test_ranks_have_integers_in_the_form_of_their_rows(
    name: str, rows: int, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with float8 units: ranks that gather, and ranks that transform by themselves."""
    monkeypatch.setattr(int4_linear, "_has_float8", lambda device: True)
    parts, ring = Parts(Folder.open(made(name))), Ring(2)
    for linear in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        whole = parts.linear(linear, CPU, torch.float32)
        pieces = torch.randn(rows, whole.plain().shape[1]).bfloat16().chunk(2, dim=-1)
        cut = [columns_of(whole, planned(parts.plan, linear), ring.gather, rank, 2) for rank in range(2)]
        want = ring(cut, pieces)
        found = ring([parts.kernels([one], "here") for one in cut], pieces)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("name", ["flatquant", "ranks"])
def test_a_traced_number_of_rows_does_not_choose_the_form_of_a_rank(
    name: str, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_linear, "_has_float8", lambda device: True)
    parts, linear = Parts(Folder.open(made(name))), "model.layers.0.mlp.down_proj"
    whole = parts.linear(linear, CPU, torch.float32)
    one = columns_of(whole, planned(parts.plan, linear), lambda x: torch.cat((x, x), dim=-1), 0, 2)
    kernels = parts.kernels([one], "here")
    torch._dynamo.reset()
    compiled = torch.compile(kernels, fullgraph=True, backend="eager")
    for rows in (FEW + 1, FEW):
        x = torch.randn(rows, whole.plain().shape[1] // 2).bfloat16()
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert torch.equal(compiled(x), kernels(x))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_alone_rounds_as_all_together(ranks: int, made: Callable[[str], Path]) -> None:
    """On one grid, with numbers whose sums are exact: the same integers."""
    parts, ring = Parts(Folder.open(made("ranks"))), Ring(ranks)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        whole = parts.linear(f"model.layers.0.{name}", CPU, torch.float32)
        site, plan = whole.site, planned(parts.plan, f"model.layers.0.{name}")
        for factor in (site.left, site.right):
            if factor is not None:
                factor.copy_((factor * 16).round() / 16)
        x = torch.randint(-9, 9, (7, whole.plain().shape[1])).float()
        cut = [cut_site(site, plan, ring.gather, rank, ranks) for rank in range(ranks)]
        assert all(isinstance(one, Own) for one in cut)
        want: Any = site(x)
        found: list[Any] = ring(cut, x.chunk(ranks, dim=-1))
        assert torch.equal(torch.cat([part.values for part in found], dim=-1), want.values)
        assert all(torch.equal(part.scale, want.scale) for part in found)


def test_ranks_that_the_folder_is_not_made_for_gather(made: Callable[[str], Path]) -> None:
    parts = Parts(Folder.open(made("ranks")))
    linear = "model.layers.0.mlp.down_proj"
    site, plan = parts.linear(linear, CPU, torch.float32).site, planned(parts.plan, linear)
    assert plan.ranks == 4
    assert isinstance(cut_site(site, plan, lambda x: x, 0, 4), Own)
    assert isinstance(cut_site(site, plan, lambda x: x, 0, 8), Gathered)
    assert site.left is not None
    site.left[0, -1] = 1
    with pytest.raises(ArtifactError, match=r"the left factor of mlp\.down_proj is not in 4 blocks, as its plan says"):
        cut_site(site, plan, lambda x: x, 0, 2)


def test_integers_are_cut_and_not_rounded_again(folder: Path) -> None:
    whole = Parts(Folder.open(folder)).linear("model.layers.0.mlp.down_proj", CPU, torch.float32)
    assert isinstance(whole, PackedLinear)
    cut = columns_of(whole, planned(Folder.open(folder).plan, "model.layers.0.mlp.down_proj"), lambda x: x, 1, 2)
    assert torch.equal(cut.qweight().values, whole.qweight().values[:, 24:])
    assert torch.equal(cut.scale, whole.scale)
    assert cut.bias is None


def test_heads_that_ranks_share() -> None:
    assert [share(8, 4, rank, 2) for rank in range(2)] == [slice(0, 4), slice(4, 8)]
    assert [share(2, 1, rank, 4) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]


@pytest.mark.parametrize(
    "site, ranks, columns, said",
    [
        ({"readers": ("mlp.down_proj",), "shape": (5, 9)}, 2, True, "45 columns"),
        ({"readers": ("mlp.down_proj",), "shape": (4, 4), "weights": "w4g4"}, 8, True, "16 columns in groups of 4"),
        ({"readers": ("mlp.gate_up_proj",), "shape": (4, 4)}, 2, False, "one matrix for several outputs"),
        ({"readers": ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj"), "shape": (4, 4)}, 2, False, "a mixture"),
        ({"readers": ("mlp.up_proj",), "shape": (4, 4), "weights": "w4", "rank": 2}, 2, False, "weights in a codebook"),
    ],
)
def test_what_cannot_be_cut_is_refused(site: dict, ranks: int, columns: bool, said: str) -> None:
    if "weights" in site:
        group = 4 if site["weights"] == "w4g4" else None
        site = {**site, "weights": QuantSpec(bits=4, group_size=group)}
    with pytest.raises(ModelError, match=f"mlp cannot be cut for {ranks} ranks: it has {said}"):
        check_ranks("mlp", SitePlan(**site), ranks, columns=columns)


def test_a_site_is_filled_once(folder: Path) -> None:
    parts = Parts(Folder.open(folder))
    first = parts.linear("model.layers.0.mlp.up_proj", CPU, torch.float32).site
    left = first.left
    assert isinstance(first, FrozenSite)
    assert parts.linear("model.layers.0.mlp.gate_proj", CPU, torch.float32).site.left is left
