"""A model on learned levels from calibration to a folder and back: the same integers, the bytes as promised."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flatquant.api import stored_bytes
from flatquant.calibrate.state import RunState
from flatquant.errors import ModelError, SpecError
from flatquant.formats.base import Codes
from flatquant.formats.levels import Levels
from flatquant.interchange import export_compressed, export_dense
from flatquant.recipes import direct, quarot
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.codes import FrozenCodes, PackedCodes
from flatquant.spec import BranchSpec, DataSpec, EndToEndSpec, QuantSpec, Recipe, Scheme, SolverSpec, to_dict
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
from tests.test_laws import ALL_READERS

ROW = torch.zeros(1, 4, dtype=torch.uint8)


def small(scheme: str = "w2a16", steps: int = 3) -> Recipe:
    found = direct(scheme)
    assert found.end_to_end is not None
    fit = dataclasses.replace(found.end_to_end, steps=steps, batch_size=2)
    return dataclasses.replace(found, end_to_end=fit, data=DataSpec(samples=4, seqlen=12))


@pytest.mark.parametrize("shape", ["mha", "biased", "untied"])
@pytest.mark.parametrize("scheme", ["w2a16", "w3g4a4kv4", "w2,mlp_mid=w4a8,1.attn_in=w16"])
def test_a_loaded_model_has_the_same_integers(tmp_path: Path, scheme: str, shape: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES[shape])
    chosen = small(scheme)
    model, plan, _ = calibrated(original, chosen)
    loaded = reloaded(model, plan, chosen, tmp_path / "a")
    quantised = 0
    for linear, again in in_pairs(model, loaded, ALL_READERS):
        if not isinstance(linear, FrozenCodes):
            assert "w16" in scheme
            continue
        assert isinstance(again, PackedCodes)
        assert torch.equal(linear.codes, again.qweight().codes)
        assert torch.equal(linear.levels, again.levels)
        assert torch.equal(PackedCodes.of(linear).packed, again.packed)
        assert linear.packed_bytes == again.packed.nbytes
        linear.qweight().check_range()
        quantised += linear.codes.numel()
    found = inspect(tmp_path / "a")
    assert found.quantised_parameters == quantised > 0
    assert sum(found.bytes_by_kind.values()) == stored_bytes(model)
    save(loaded, plan, tmp_path / "b", recipe=to_dict(chosen), report={})
    assert inspect(tmp_path / "b").content_hash == found.content_hash


def test_training_lowers_the_loss_by_moving_codes_and_levels() -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    start, _, _ = calibrated(original, small("w2a16", steps=0))
    chosen = small("w2a16", steps=40)
    assert chosen.end_to_end is not None
    fit = dataclasses.replace(chosen.end_to_end, code_lr=2e-2)
    ours, _, report = calibrated(original, dataclasses.replace(chosen, end_to_end=fit))
    first, last = report.end_to_end.losses[:4], report.end_to_end.losses[-4:]
    assert sum(last) < 0.95 * sum(first)
    before, after = start.model.layers[0].mlp.up_proj, ours.model.layers[0].mlp.up_proj
    moved = float((before.codes != after.codes).float().mean())
    assert 0 < moved < 0.5
    assert not torch.equal(before.levels, after.levels)


def test_a_killed_fit_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = family("llama", dtype=torch.float32)
    chosen = small("w2a4", steps=20)
    whole, _, _ = calibrated(model, chosen)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "end to end" and done == 18:
            raise KeyboardInterrupt

    identity = {"recipe": to_dict(chosen)}
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, chosen, state=RunState(tmp_path / "s", identity, resume=False), progress=kill)
    resumed, _, _ = calibrated(model, chosen, state=RunState(tmp_path / "s", identity, resume=True))
    assert same_bytes(whole, resumed)


def test_weights_on_levels_in_a_rotated_model(tmp_path: Path) -> None:
    """Fixed rotations come before levels: eight bits are near the original, and far from it in any other basis."""
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    scheme = Scheme(weights=QuantSpec(bits=8, kind="levels"))
    chosen = dataclasses.replace(quarot("w8"), scheme=scheme, solver=SolverSpec(), data=DataSpec(samples=2, seqlen=12))
    model, plan, _ = calibrated(original, chosen)
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        assert relative(model(tokens).logits, original(tokens).logits) < 0.1
        save(model, plan, tmp_path / "a", recipe=to_dict(chosen), report={})
        assert torch.equal(load(tmp_path / "a")(tokens).logits, model(tokens).logits)


def test_exports_hold_the_numbers_or_refuse(tmp_path: Path) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    model, plan, _ = calibrated(original, small("w4a16"))
    export_dense(model, plan, tmp_path / "dense")
    plain = type(original).from_pretrained(tmp_path / "dense")
    tokens = tokens_for(original, 2, 9)
    torch.testing.assert_close(hidden(plain, tokens), hidden(model, tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="uniform grids"):
        export_compressed(model, plan, tmp_path / "packed")


@pytest.mark.parametrize(
    "made, why",
    [
        (lambda: QuantSpec(bits=2, kind="levels", clip="search"), "no clip"),
        (lambda: QuantSpec(bits=2, kind="levels", symmetric=False), "no zero point"),
        (lambda: Scheme(keys=QuantSpec(bits=4, kind="levels")), "keys: levels are for weights"),
        (lambda: dataclasses.replace(small(), solver=SolverSpec(kind="gptq")), "use the solver rtn"),
        (lambda: dataclasses.replace(small(), branch=BranchSpec()), "no branch"),
        (lambda: dataclasses.replace(small(), transforms=BASES["diagonal only"]), "only fixed transforms"),
        (lambda: dataclasses.replace(small("a4"), transforms=BASES["diagonal only"]), "leave out transforms"),
        (lambda: dataclasses.replace(small(), end_to_end=EndToEndSpec(steps=1, weight_lr=1e-4)), "weight_lr 0"),
        (lambda: Codes(codes=torch.zeros(2, 3), parts={}, format=Levels(2, None)), "uint8"),
        (lambda: Codes(codes=ROW, parts={"levels": torch.zeros(1, 2, 2)}, format=Levels(2, None)), "levels is"),
        (lambda: Codes(codes=ROW, parts={}, format=Levels(2, None)), "the format has levels"),
    ],
)
def test_what_levels_cannot_do_is_said(made, why: str) -> None:
    with pytest.raises((SpecError, ValueError), match=why):
        made()


def test_activations_alone_on_levels_need_text() -> None:
    scheme = Scheme(activations=QuantSpec(bits=4, kind="levels"))
    assert bare({}, scheme).needs_data
    assert not bare({}, Scheme(weights=QuantSpec(bits=4, kind="levels"))).needs_data
