"""Models in formats: what a fit saw is what is stored, and what is stored is what serves."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from flatquant.api import stored_bytes
from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.calibrate.state import RunState
from flatquant.errors import ArtifactError, CalibrationError, SpecError
from flatquant.qtensor import QTensor
from flatquant.quantizers import BlockWeights, FrozenBlocks
from flatquant.recipes import autoround, direct, flatquant, flattenquant, gptq, quarot, rtn, svdquant, vptq
from flatquant.runtime import fused
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.codes import FrozenCodes, PackedCodes
from flatquant.runtime.folder import Folder
from flatquant.runtime.fused import take
from flatquant.runtime.kernels import Unsupported
from flatquant.runtime.kvcache import QuantizedCache, token_bytes
from flatquant.seams import CACHE
from flatquant.spec import DataSpec, FitSpec, Recipe, Scheme, SolverSpec, TransformSpec, to_dict
from flatquant.wiring.arch import submodule
from flatquant.wiring.fitted import observing
from flatquant.wiring.fold import fold_block
from tests.laws import (
    BASES,
    bare,
    calibrated,
    family,
    hidden,
    in_pairs,
    inputs_of,
    relative,
    reloaded,
    same_bytes,
    tokens_for,
    wrap,
)
from tests.test_laws import ALL_READERS, READERS
from tests.tiny_models import tiny_family, tiny_llama

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
HEADS = {"hidden": 128, "head_dim": 32, "intermediate": 96}  # a block of each format divides a head
TINY = {"hidden": 64, "intermediate": 96, "bias": True, "mlp_bias": True}


def short(recipe: Recipe) -> Recipe:
    """The same parts on little text, with few steps."""
    fit, end = recipe.fit, recipe.end_to_end
    return dataclasses.replace(
        recipe,
        data=DataSpec(samples=4, seqlen=12),
        fit=fit and dataclasses.replace(fit, epochs=1, batch_size=2),
        end_to_end=end and dataclasses.replace(end, steps=2, batch_size=2),
    )


def updating(scheme: str) -> Recipe:
    return dataclasses.replace(gptq(scheme), solver=SolverSpec(kind="gptq", updates_scales=True))


# ------------------------------------------------------------------------------- what a fit saw is what serves


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4kv4", "wnvfp4a8", "w4amxfp4", "w4anvfp4", "w16anvfp4"])
@pytest.mark.parametrize("name", ["svd orthogonal", "inverse hadamard"])
def test_numbers_that_serve_are_those_of_the_fit(scheme: str, name: str) -> None:
    """In float64, so that no number rounds differently; static scales are given, since a fit's follow its batch."""
    model = family("llama", **TINY)
    tokens = tokens_for(model, 2, 7)
    plan, fits = wrap(model, bare(BASES[name], Scheme.parse(scheme)), noise=0.05)
    fit, block = fits[0], fits[0].block
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path in ALL_READERS:
        submodule(block, path).register_forward_hook(lambda _, args, y, path=path: seen.update({path: (args[0], y)}))
    with torch.no_grad(), observing(fit.static_grids()):
        model(tokens, use_cache=False)
    scales = dict(zip(("attn_in", "mlp_in", "mlp_mid"), fit.parameters()["scale"], strict=True))
    scales = {site: p.detach().exp() for site, p in scales.items()}
    fold_block(fit, dtype=torch.float64)
    solve_block(block, plan.blocks[0], make_solver(SolverSpec()), BlockCall(args=(), kwargs={}), None, 1)
    written = "w4" not in scheme and "w16" not in scheme  # up_proj has applied the scale of mlp_mid in the fit as well
    for site, paths in READERS.items():
        for path in paths:
            x, y = seen[path]
            if site in scales and not (written and site == "mlp_mid"):  # now the norm, or up_proj, has applied it
                x = x * scales[site]
            if path == "mlp.up_proj" and not written:
                y = y * scales["mlp_mid"]
            linear = submodule(block, path)
            assert isinstance(linear, FrozenCodes) == written, path
            assert isinstance(linear.site(x), QTensor) == ("a8" in scheme)
            assert relative(linear(x), y) < 3e-6, path


# ------------------------------------------------------------------------------- from a recipe to a folder and back


def cases() -> Iterator:
    for scheme in ("nvfp4", "mxfp4kv4"):
        for name, recipe in (
            ("rtn", rtn(scheme)),
            ("gptq", gptq(scheme)),
            ("gptq, scales updated", updating(scheme)),
            ("reference", flatquant(scheme)),
            ("best", flatquant(scheme, "best")),
            ("quick", flatquant(scheme, "quick")),
            ("quarot", quarot(scheme)),
            ("svdquant", svdquant(scheme)),
        ):
            yield pytest.param(recipe, id=f"{scheme}, {name}")
    for scheme in ("nvfp4kvnvfp4", "mxfp4kvmxfp4"):
        yield pytest.param(flatquant(scheme), id=f"{scheme}, reference")
        yield pytest.param(rtn(scheme), id=f"{scheme}, rtn")
    for scheme in (
        "w4a4kvmxfp4",
        "knvfp4v4,1.kv8",
        "wnvfp4",
        "anvfp4",
        "w4anvfp4kv4",
        "mxfp4,mlp_mid=nvfp4,0.attn_in=w8a8,1.attn_out=w16",
    ):
        yield pytest.param(flatquant(scheme, "quick"), id=scheme)


def round_trip(model: PreTrainedModel, recipe: Recipe, path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A quantised copy, and what its folder gives; they agree to the last bit."""
    quantised, plan, _ = calibrated(model, recipe)
    loaded = reloaded(quantised, plan, recipe, path)
    tokens = tokens_for(model, 1, 9)
    ids = [m.generate(tokens, max_new_tokens=5, do_sample=False) for m in (loaded, quantised)]
    assert torch.equal(*ids)
    return quantised, loaded


@pytest.mark.parametrize("recipe", list(cases()))
def test_a_loaded_model_has_the_same_codes(tmp_path: Path, recipe: Recipe) -> None:
    model, loaded = round_trip(tiny_llama(**HEADS), short(recipe), tmp_path / "a")
    scheme, quantised = str(recipe.scheme), 0
    for pair in in_pairs(model, loaded, ALL_READERS):
        linear, again = (getattr(m, "inner", m) for m in pair)
        if not isinstance(linear, FrozenCodes):
            assert "w" in scheme
            continue
        assert isinstance(again, PackedCodes)
        assert torch.equal(linear.codes, again.qweight().codes)
        assert torch.equal(PackedCodes.of(linear).packed, again.packed)
        assert linear.packed_bytes == again.packed.nbytes
        assert all(torch.equal(part, again.parts[name]) for name, part in linear.parts.items())
        linear.qweight().check_range()
        quantised += linear.codes.numel()
    found = inspect(tmp_path / "a")
    assert found.scheme == scheme
    assert sum(found.bytes_by_kind.values()) == stored_bytes(model)
    assert found.quantised_parameters >= quantised
    save(loaded, Folder.open(tmp_path / "a").plan, tmp_path / "b", recipe=to_dict(recipe), report={}, scheme=scheme)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3", "olmo2", "cohere", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["nvfp4kvnvfp4", "mxfp4kv4"])
def test_every_kind_of_family(tmp_path: Path, name: str, scheme: str) -> None:
    model = tiny_family(name, **SIZES, **({"moe_intermediate_size": 32} if name == "qwen3_moe" else {}))
    round_trip(model, short(flatquant(scheme)), tmp_path / "reference")
    round_trip(model, short(gptq(scheme)), tmp_path / "gptq")


@pytest.mark.parametrize("scheme, bits", [("wnvfp4", 4 + 8 / 16), ("wmxfp4", 4 + 8 / 32)])
def test_inspect_counts_the_bits_of_scales(tmp_path: Path, scheme: str, bits: float) -> None:
    model = tiny_llama(hidden=64, intermediate=96)
    round_trip(model, rtn(scheme), tmp_path / "a")
    found = inspect(tmp_path / "a")
    assert found.quantised_parameters == sum(
        submodule(b, p).weight.numel() for b in model.model.layers for p in ALL_READERS
    )
    wholes = 32 * 14 / found.quantised_parameters if "nv" in scheme else 0
    assert found.bits_per_quantised_weight == pytest.approx(bits + wholes)


def test_readers_of_a_site_share_their_tensor_scale() -> None:
    """As tools ask for that join q, k and v; experts too, which GPTQ rounds one after another."""
    for model in (tiny_llama(hidden=64, intermediate=96), tiny_family("mixtral", **SIZES)):
        quantised, plan, _ = calibrated(model, short(gptq("wnvfp4")))
        for block, block_plan in zip(quantised.model.layers, plan.blocks, strict=True):
            for site in block_plan.sites.values():
                assert len({float(submodule(block, path).tensor_scale) for path in site.readers}) == 1


def test_static_scales_cover_what_calibration_saw() -> None:
    model = tiny_llama(hidden=64, intermediate=96)
    recipe = short(rtn("anvfp4"))
    quantised, _, _ = calibrated(model, recipe)
    tokens = tokens_for(model, recipe.data.samples, recipe.data.seqlen, seed=1)
    block, first = quantised.model.layers[0], model.model.layers[0]
    with inputs_of(submodule(first, "self_attn.q_proj")) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    grid = block.flatquant["attn_in"].activations
    assert isinstance(grid, FrozenBlocks)
    assert grid.tensor_scale is not None
    torch.testing.assert_close(448 * 6 / grid.tensor_scale, torch.cat(seen).abs().amax().reshape(1))


def test_a_token_is_rounded_alike_alone_and_among_others() -> None:
    """Only the scale of the tensor is shared by tokens, and that is static."""
    quantised, _, _ = calibrated(tiny_llama(hidden=64, intermediate=96), short(rtn("nvfp4")))
    site = quantised.model.layers[0].flatquant["mlp_in"]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(site(x)[1, 2], site(x[1:2, 2:3])[0, 0])


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model, recipe = tiny_llama(hidden=64, intermediate=96), short(flatquant("nvfp4kv4"))
    whole, _, _ = calibrated(model, recipe)
    first, _, _ = calibrated(model, recipe, state=RunState(tmp_path / "state", {}, resume=False))
    (tmp_path / "state" / "solved-00001.safetensors").unlink()
    again, _, _ = calibrated(model, recipe, state=RunState(tmp_path / "state", {}, resume=True))
    assert same_bytes(whole, first)
    assert same_bytes(whole, again)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_a_fit_helps(scheme: str) -> None:
    model = tiny_llama(hidden=64, intermediate=96)
    tokens = tokens_for(model, 4, 16, seed=9)
    data = DataSpec(samples=16, seqlen=16)
    recipe = dataclasses.replace(flatquant(scheme), data=data, fit=FitSpec(epochs=8, batch_size=4))
    want = hidden(model, tokens)
    ours, plain = (calibrated(model, r)[0] for r in (recipe, dataclasses.replace(rtn(scheme), data=data)))
    assert relative(hidden(ours, tokens), want) < relative(hidden(plain, tokens), want)


# --------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["kvnvfp4", "kvmxfp4", "mxfp4knvfp4v4", "kmxfp4"])
def test_a_packed_cache_gives_the_same_tokens(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    _, loaded = round_trip(tiny_llama(**HEADS), short(flatquant(scheme)), tmp_path / "a")
    model = loaded.to(dtype)
    tokens = tokens_for(model, 2, 9)
    cache, plain = QuantizedCache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for step in tokens.split([6, 1, 2], 1):
            ours = model(step, **{CACHE: cache}).logits
            assert torch.equal(ours, model(step, **{CACHE: plain}).logits)


@pytest.mark.parametrize("name, bits", [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_bytes_of_a_key_are_those_of_its_codes_and_scales(name: str, bits: float) -> None:
    assert 8 * token_bytes(64, Scheme.parse(f"kv{name}").keys) == 64 * bits


def test_static_scales_of_keys_and_values_cover_what_calibration_saw() -> None:
    model, recipe = tiny_llama(**HEADS), dataclasses.replace(short(rtn("kvnvfp4")))
    recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, key_offset="none"))
    quantised, _, _ = calibrated(model, recipe)
    tokens = tokens_for(model, recipe.data.samples, recipe.data.seqlen, seed=1)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens, **{CACHE: cache})
    grids = submodule(quantised.model.layers[0], "self_attn.flatquant_kv")
    first = cache.layers[0]
    for grid, seen in ((grids.keys, first.keys), (grids.values, first.values)):
        assert isinstance(grid, FrozenBlocks)
        torch.testing.assert_close(448 * 6 / grid.tensor_scale, seen.abs().amax().reshape(1))


def test_matrices_in_blocks_divide_the_inputs() -> None:
    blocks = TransformSpec(kind="blocks", parameters="fixed", init="hadamard", size=128)
    recipe = dataclasses.replace(rtn("wmxfp4"), transforms={"mlp_mid": (blocks,)})
    with pytest.raises(SpecError, match=r"blocks of 128 do not divide the 96 inputs of .*; the largest power .* is 32"):
        calibrated(tiny_llama(hidden=64, intermediate=96), recipe)


def test_blocks_divide_heads() -> None:
    with pytest.raises(SpecError, match="mxfp4: blocks of 32 do not divide heads of 16"):
        calibrated(tiny_llama(hidden=64, intermediate=96), rtn("kvmxfp4"))


def test_casts_of_a_loaded_model_leave_codes_and_scales(tmp_path: Path) -> None:
    _, loaded = round_trip(tiny_llama(hidden=64, intermediate=96), short(rtn("nvfp4")), tmp_path / "a")
    before = {n: t for n, t in copy.deepcopy(loaded).state_dict().items() if "scale" in n or "packed" in n}
    after = loaded.half().state_dict()
    assert before
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Scheme.parse("wnvfp4g16"), "scales of its own"),
        (lambda: Scheme.parse("w4a4nvfp4"), "expected something like"),
        (lambda: direct("nvfp4"), "levels of its own"),
        (lambda: flattenquant("nvfp4"), "scale for a tensor|levels|clip|no zero point"),
        (lambda: vptq("wnvfp4"), "codebooks"),
        (lambda: vptq("w2,mlp_mid=wnvfp4"), "codebooks"),
        (lambda: autoround("w4,0.mlp_mid=mxfp4", "quick"), "not for mxfp4"),
        (lambda: dataclasses.replace(gptq("w4"), solver=SolverSpec(kind="gptq", updates_scales=True)), "updated"),
        (lambda: SolverSpec(kind="gptq", updates_scales=True, act_order=True), "in order"),
        (lambda: SolverSpec(updates_scales=True), "only gptq"),
    ],
)
def test_what_a_format_does_not_do_is_one_line(make, match: str) -> None:
    with pytest.raises(SpecError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_blocks_divide_the_inputs() -> None:
    with pytest.raises(SpecError, match="mxfp4: blocks of 32 do not divide the 24 inputs of"):
        calibrated(family("llama", dtype=torch.float32), rtn("wmxfp4"))


def test_a_static_scale_needs_text() -> None:
    assert rtn("nvfp4").needs_data
    assert rtn("kvnvfp4").needs_data
    assert rtn("kv4,1.vnvfp4").needs_data
    assert rtn("w4,mlp_mid=anvfp4").needs_data
    assert not rtn("wnvfp4").needs_data
    assert not rtn("mxfp4").needs_data
    model = family("llama", **TINY)
    _, fits = wrap(model, bare(BASES["svd orthogonal"], Scheme.parse("anvfp4")))
    with pytest.raises(CalibrationError, match="static scale"):
        fold_block(fits[0])


def test_kernels_leave_formats_to_the_modules() -> None:
    quantised, _, _ = calibrated(tiny_llama(hidden=64, intermediate=96), short(rtn("nvfp4kv4")))
    with pytest.raises(Unsupported, match="not packed integers"):
        take.block_of(
            quantised.model.layers[0], 0, quantised.config, torch.device("cpu"), fused.FAMILIES["llama"], None
        )


def test_a_plan_of_an_unknown_format_is_damage(tmp_path: Path) -> None:
    round_trip(tiny_llama(hidden=64, intermediate=96), rtn("wnvfp4"), tmp_path / "a")
    plan = Folder.open(tmp_path / "a").plan
    from flatquant.runtime.folder import plan_from_json, plan_to_json

    data = plan_to_json(plan)
    data["kinds"][0]["sites"]["attn_in"]["weights"]["kind"] = "fp3"
    with pytest.raises(ArtifactError, match="unknown format"):
        plan_from_json(data)


def test_a_fit_and_the_solver_share_the_grid() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    spec = Scheme.parse("wnvfp4").weights
    assert spec is not None
    joined = BlockWeights.covering(spec, w.split(4))
    parts = [joined.nearest(part).dequantize() for part in w.split(4)]
    assert torch.equal(torch.cat(parts), BlockWeights(spec)(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nvfp4kvnvfp4", "mxfp4"])
def test_transformers_loads_the_same_model(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    round_trip(tiny_llama(hidden=64, intermediate=96), short(flatquant(scheme, "quick")), tmp_path / "a")
    ours, theirs = load(tmp_path / "a", dtype=dtype), AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    tokens = tokens_for(ours, 2, 9)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    theirs.save_pretrained(tmp_path / "b")
    assert same_bytes(load(tmp_path / "b"), ours)
