"""A model in codebooks from calibration to a folder and back: the same numbers everywhere, the bytes as promised."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatquant.api import stored_bytes
from flatquant.calibrate.state import RunState
from flatquant.errors import ArtifactError, SpecError
from flatquant.recipes import flatquant, recipe, vptq
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.codebook import CodebookLinear, FrozenBook, PackedBook
from flatquant.spec import CodebookSpec, DataSpec, QuantSpec, Recipe, Scheme, SolverSpec, from_dict, to_dict
from flatquant.wiring.arch import submodule
from tests.laws import (
    BASES,
    SHAPES,
    bare,
    calibrated,
    family,
    hidden,
    in_pairs,
    relative,
    reloaded,
    same_bytes,
    tokens_for,
)

READERS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
DATA = DataSpec(samples=8, seqlen=16)


def small(scheme: str = "w2a16", **codebook) -> Recipe:
    found = vptq(scheme)
    assert found.solver.codebook is not None
    books = dataclasses.replace(found.solver.codebook, **codebook)
    return dataclasses.replace(found, data=DATA, solver=dataclasses.replace(found.solver, codebook=books))


RECIPES = {
    "one book": small("w2a16"),
    "two books": small("w3a16"),
    "outlier columns": small("w2a16", outliers=0.1),
    "wide indices": small("w4a16", main_bits=10, outliers=0.2, outlier_length=1, outlier_bits=9),
    "sites apart": small("w2,mlp_mid=w4,1.attn_in=w16"),
}


@pytest.mark.parametrize("shape", ["mha", "biased", "untied"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, name: str, shape: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES[shape])
    chosen = RECIPES[name]
    model, plan, _ = calibrated(original, chosen)
    loaded = reloaded(model, plan, chosen, tmp_path / "a")
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        assert relative(model(tokens).logits, original(tokens).logits) > 1e-3
    quantised = 0
    for linear, again in in_pairs(model, loaded, READERS):
        if not isinstance(linear, CodebookLinear):
            assert name == "sites apart"
            continue
        assert isinstance(again, CodebookLinear)
        assert {type(b) for b in linear.books.values()} == {FrozenBook}
        assert {type(b) for b in again.books.values()} == {PackedBook}
        assert torch.equal(linear.qweight().dequantize(), again.qweight().dequantize())
        linear.qweight().check_range()
        quantised += linear.qweight().shape.numel()
        for book in linear.books.values():
            assert torch.equal(PackedBook.of(book).packed, book.pack())
            assert book.packed_bytes == book.pack().nbytes
    found = inspect(tmp_path / "a")
    assert found.quantised_parameters == quantised
    ours = {k: found.bytes_by_kind[k] for k in ("packed", "grids", "transforms")}
    assert found.bits_per_quantised_weight == pytest.approx(8 * sum(ours.values()) / quantised)
    assert sum(found.bytes_by_kind.values()) == stored_bytes(model)
    save(loaded, plan, tmp_path / "b", recipe=to_dict(chosen), report={})
    assert inspect(tmp_path / "b").content_hash == found.content_hash


def test_bits_are_what_indices_and_entries_take(tmp_path: Path) -> None:
    """In a layer large enough for whole codebooks: 2 bits, and the entries on top."""
    original = family("llama", dtype=torch.float32, hidden=128, heads=4, kv_heads=4, intermediate=256, layers=1)
    chosen = small("w2a16", length=4, main_bits=8)
    model, plan, _ = calibrated(original, chosen)
    save(model, plan, tmp_path / "a", recipe=to_dict(chosen), report={})
    found = inspect(tmp_path / "a")
    weights = 4 * 128 * 128 + 3 * 128 * 256
    assert found.bytes_by_kind["packed"] == weights // 4
    assert found.bytes_by_kind["grids"] == 7 * 256 * 4 * 2
    assert isinstance(from_dict(Recipe, to_dict(chosen)), Recipe)
    assert from_dict(Recipe, to_dict(chosen)) == chosen


@pytest.mark.parametrize("basis", ["inverse orthogonal", "svd hadamard"])
@pytest.mark.parametrize("scheme", ["w2a16", "w4a4kv4"])
def test_codebooks_combine_with_fixed_changes_of_basis(basis: str, scheme: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    solver = SolverSpec(kind="codebook", codebook=CodebookSpec())
    chosen = dataclasses.replace(bare(BASES[basis], Scheme.parse(scheme, clip="none")), solver=solver, data=DATA)
    model, _, _ = calibrated(original, chosen)
    tokens = tokens_for(original, 2, 9)
    assert torch.isfinite(hidden(model, tokens)).all()
    for path in READERS:
        assert isinstance(submodule(model.model.layers[0], path), CodebookLinear)


def test_codebooks_in_a_rotated_model(tmp_path: Path) -> None:
    """The residual stream rotated, weights in codebooks, activations and cache on grids, as the command line asks."""
    from flatquant.cli.options import recipe_of

    chosen = recipe_of("quarot", "w2a4kv4", "reference", None, 8, 16, None, None, None, "codebook")
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    model, plan, _ = calibrated(original, chosen)
    linear = submodule(model.model.layers[0], "mlp.up_proj")
    assert isinstance(linear, CodebookLinear)
    save(model, plan, tmp_path / "a", recipe=to_dict(chosen), report={})
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        got = load(tmp_path / "a")(tokens).logits
        assert torch.equal(got, model(tokens).logits)
    # With an entry for every 16 weights it is near the original, and far from it in any other basis.
    books = CodebookSpec(length=1, main_bits=8)
    fine = dataclasses.replace(
        chosen,
        scheme=dataclasses.replace(chosen.scheme, weights=QuantSpec(bits=8), activations=None, keys=None, values=None),
        solver=dataclasses.replace(chosen.solver, codebook=books),
    )
    near, _, _ = calibrated(original, fine)
    with torch.no_grad():
        want = original(tokens).logits
        assert (near(tokens).logits - want).square().mean() < 0.2 * want.square().mean()  # unrelated logits: about 2


def test_codebooks_take_the_loss_for_their_hessian() -> None:
    original = family("llama", dtype=torch.float32)
    chosen = small("w2a16")
    solver = dataclasses.replace(chosen.solver, hessian="output_adaptive")
    ours, _, report = calibrated(original, dataclasses.replace(chosen, solver=solver))
    plain, _, _ = calibrated(original, chosen)
    assert report.seconds["gradients"] > 0
    assert not same_bytes(ours, plain)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = family("llama", dtype=torch.bfloat16)
    chosen = small("w3a16", outliers=0.1)
    whole, _, _ = calibrated(model, chosen)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, chosen, state=RunState(tmp_path, {"run": 1}, resume=False), progress=kill)
    resumed, _, _ = calibrated(model, chosen, state=RunState(tmp_path, {"run": 1}, resume=True))
    assert same_bytes(resumed, whole)
    with torch.no_grad():
        tokens = tokens_for(model, 2, 6)
        assert torch.equal(resumed(tokens).logits, whole(tokens).logits)


def test_other_precisions_keep_the_entries(tmp_path: Path) -> None:
    original = family("llama", dtype=torch.float32)
    model, plan, _ = calibrated(original, small("w2a16"))
    save(model, plan, tmp_path / "a", recipe=to_dict(small("w2a16")), report={})
    loaded = load(tmp_path / "a", dtype=torch.bfloat16)
    linear = submodule(loaded.model.layers[0], "mlp.down_proj")
    assert isinstance(linear, CodebookLinear)
    assert linear.books["main"].entries.dtype == torch.float16
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        assert loaded(tokens).logits.dtype == torch.bfloat16
    wide = copy.deepcopy(model).double()
    assert submodule(wide.model.layers[0], "mlp.down_proj").books["main"].entries.dtype == torch.float16


def test_wrong_combinations_are_errors() -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["mqa"])
    with pytest.raises(SpecError, match=r"vectors of 4 do not divide the 6 outputs of self_attn\.k_proj"):
        calibrated(original, small("w2a16"))
    with pytest.raises(SpecError, match="vptq quantises weights only, not w4a4kv4"):
        vptq("w4a4kv4")
    with pytest.raises(SpecError, match="two codebooks of 8 have less"):
        calibrated(family("llama", dtype=torch.float32), small("w5a16"))
    with pytest.raises(SpecError, match="neither clip nor groups"):
        vptq("w4g8a16")
    with pytest.raises(SpecError, match="codebook needs a codebook"):
        SolverSpec(kind="codebook")
    with pytest.raises(SpecError, match="gptq uses no codebook"):
        SolverSpec(kind="gptq", codebook=CodebookSpec())
    with pytest.raises(SpecError, match="uniform grid, which codebooks are not"):
        dataclasses.replace(flatquant("w2a16"), solver=vptq("w2a16").solver)
    with pytest.raises(SpecError, match="unknown preset 'slow'"):
        recipe("vptq", "w2a16", "slow")


def damaged(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.books.main.entries"), "lacks tensor .*entries"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.books.residual.packed": torch.zeros(1)}), "surplus"),
        (lambda t: wider(t, "model.layers.0.mlp.up_proj.books.main.entries"), "is torch.float32"),
    ],
    ids=["missing", "surplus", "wider"],
)
def test_damage_is_noticed(tmp_path: Path, change, match: str) -> None:
    model, plan, _ = calibrated(family("llama", dtype=torch.float32), small("w2a16"))
    save(model, plan, tmp_path / "a", recipe=to_dict(small("w2a16")), report={})
    damaged(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=match):
        load(tmp_path / "a", verify=False)


def wider(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()
