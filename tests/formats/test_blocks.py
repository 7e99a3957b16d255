"""What holds for every format: laws first, then what compressed-tensors and torchao make of the same numbers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant import formats
from flatquant.errors import SpecError
from flatquant.formats import Facts
from flatquant.formats.base import SCALE, WHOLE, BlockFormat, Codes
from flatquant.formats.minifloat import from_e4m3, from_e8m0
from flatquant.quantizers import BlockWeights
from flatquant.solvers import GPTQ, RTN
from flatquant.spec import Clip, QuantSpec

NAMES = formats.names()
FORMS = [pytest.param(name, how, id=f"{name}{', searched' * how}") for name in NAMES for how in (False, True)]


def matrix(seed: int, o: int = 12, n: int = 64) -> Tensor:
    """Rows of very different sizes, with a row and a block of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(o, n, generator=g) * torch.exp(3 * torch.randn(o, 1, generator=g))
    x[1], x[2, :32] = 0, 0
    return x


def step_of(form: BlockFormat, parts: dict[str, Tensor]) -> Tensor:
    return form.steps(parts[SCALE], parts.get(WHOLE)).repeat_interleave(form.block, -1)


@pytest.mark.parametrize("name, searched", FORMS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_number_takes_the_nearest_code(name: str, searched: bool, seed: int) -> None:
    form, x = formats.make(name, searched=searched), matrix(seed)
    q = form.quantize(x)
    q.check_range()
    step = step_of(form, q.parts)
    table = torch.cat([torch.tensor(form.magnitudes), -torch.tensor(form.magnitudes)]).double()
    best = (x.double()[..., None] - table * step.double()[..., None]).abs().amin(-1)
    error = (x.double() - q.dequantize(torch.float64)).abs()
    torch.testing.assert_close(error, best, rtol=1e-6, atol=1e-30)  # the division by the step is rounded


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_halfway_takes_the_even_code(name: str, sign: int) -> None:
    form = formats.make(name)
    m = torch.tensor(form.magnitudes)
    codes = form.nearest(sign * (m[1:] + m[:-1]) / 2).long() % len(m)
    below = torch.arange(len(m) - 1)
    assert torch.equal(codes, below + below % 2)


@pytest.mark.parametrize("name, searched", FORMS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_numbers_of_the_format_stay(name: str, searched: bool, seed: int) -> None:
    form = formats.make(name, searched=searched)
    q = form.quantize(matrix(seed))
    assert torch.equal(form.encode(q.dequantize(), q.parts) % 8, q.codes % 8)  # the sign of 0 is lost
    assert torch.equal(form.fake(matrix(seed)), q.dequantize())


@pytest.mark.parametrize("name, searched", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_those_of_float32_whatever_the_dtype(name: str, searched: bool, dtype: torch.dtype) -> None:
    form, x = (
        formats.make(name, searched=searched),
        torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype),
    )
    ours, want = form.quantize(x), form.quantize(x.float())
    assert all(torch.equal(ours.parts[part], want.parts[part]) for part in want.parts)
    assert form.fake(x).dtype == dtype
    assert torch.equal(form.fake(x), want.dequantize(dtype) if dtype != torch.float64 else ours.dequantize(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_codes_go_into_bytes_and_back(name: str) -> None:
    form = formats.make(name)
    q = form.quantize(matrix(0, o=5))
    layout, packed = form.layout(5, 64), q.packed()
    assert torch.equal(form.unpack(packed, 64), q.codes)
    for part, tensor in {"packed": packed, **q.parts}.items():
        assert (tensor.dtype, tuple(tensor.shape)) == layout[part][:2], part
    assert layout.keys() == {"packed", *q.parts}
    first, second = q.split([2, 3])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), q.dequantize())


@pytest.mark.parametrize("name, searched", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_nan_is_nan_and_others_keep_their_numbers(name: str, searched: bool, bad: float) -> None:
    form, x = formats.make(name, searched=searched), torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    whole = form.parts(x).get(WHOLE)
    want = form.fake(x, whole=whole)
    x[0, 3] = bad
    got = form.fake(x, whole=whole)
    assert torch.equal(got[:, form.block :], want[:, form.block :])
    assert got[0, : form.block].isnan().all() if math.isnan(bad) else not bool((got[0, 3] == want[0, 3]).any())


@pytest.mark.parametrize("name, searched", FORMS)
def test_gradients_pass_straight_through(name: str, searched: bool) -> None:
    form = formats.make(name, searched=searched)
    x = matrix(3).requires_grad_()
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    form.fake(x).backward(seed)
    q = form.quantize(x.detach())
    inside = x.detach().abs() <= form.magnitudes[-1] * step_of(form, q.parts)
    assert inside.float().mean() > 0.9
    assert torch.equal(x.grad, torch.where(inside, seed, 0.0))


@pytest.mark.parametrize("name, searched", FORMS)
def test_fake_is_what_is_stored_under_autograd_too(name: str, searched: bool) -> None:
    form, x = formats.make(name, searched=searched), matrix(5)
    assert torch.equal(form.fake(x.clone().requires_grad_()), form.quantize(x).dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_back_from_a_device(name: str) -> None:
    """A CUDA graph of a fit's step could not hold that; a device without memory stands for one."""
    x = torch.empty(4, 64, device="meta", requires_grad=True)
    formats.make(name, searched=True).fake(x).sum().backward()
    assert x.grad is not None


# --------------------------------------------------------------------------------------------- searched scales


def squared_errors(form: BlockFormat, x: Tensor, q: Codes) -> Tensor:
    """Of every block, in float64, relative to the largest magnitude of its tensor.  # (o, g)"""
    error = (q.dequantize(torch.float64) - x.double()) / x.double().abs().amax()
    return error.unflatten(-1, (-1, form.block)).square().sum(-1)


def tried(form: BlockFormat, x: Tensor) -> Tensor:
    """The squared errors of blocks with every scale that a search may choose.  # (tries, o, g)"""
    whole, found = form.parts(x).get(WHOLE), []
    peak = x.unflatten(-1, (-1, form.block)).abs().amax(-1)
    for stretch in (1.0, *form.stretches):
        parts = form.parts(x) | {SCALE: form.scales(peak * stretch, whole)}
        found.append(squared_errors(form, x, Codes(codes=form.encode(x, parts), parts=parts, format=form)))
    return torch.stack(found)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_no_block_is_worse_for_a_search(name: str, seed: int) -> None:
    x = matrix(seed)
    plain, searched = formats.make(name), formats.make(name, searched=True)
    before = squared_errors(plain, x, plain.quantize(x))
    after = squared_errors(plain, x, searched.quantize(x))
    assert bool((after <= before * (1 + 1e-6)).all())  # of errors this close, either may be the smaller in float32
    torch.testing.assert_close(after, tried(plain, x).amin(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name, block, largest",
    [
        ("nvfp4", (6.0, 4.0, 3.0, 2.0, 1.0, 0.5), 6.0),  # all on the grid
        ("nvfp4", (4.0, 4.0, 3.0, 3.0, 1.0), 4.0),  # in steps of 4 / 6, 3 would be 4.5
        ("mxfp4", (6.0, 4.0, 3.0, 2.0, 1.0, 0.5), 6.0),
        ("mxfp4", (7.9, 7.9, 4.0), 4.0),  # 7.9 is nearer to 8 than to 6, which it is cut to
    ],
)
def test_four_over_six(name: str, block: tuple[float, ...], largest: float) -> None:
    form = formats.make(name, searched=True)
    x = torch.tensor([*block] + [0.0] * (form.block - len(block)))[None]
    parts = form.parts(x, peak=torch.tensor([x.amax().item() * 7]))
    assert form.values(form.encode(x, parts)).abs().amax() == largest


def test_a_format_without_stretches_has_nothing_to_search() -> None:
    class Plain(type(formats.make("mxfp4"))):
        stretches = ()

    x, facts = matrix(0), formats.facts("mxfp4")
    assert torch.equal(Plain(facts, searched=True).fake(x), Plain(facts).fake(x))


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_rounds_as_the_table_does(name: str) -> None:
    form = formats.make(name)
    x = torch.cat([torch.linspace(0, 9, 3001), torch.tensor([0.25, 0.75, 2.5, 5.0, math.inf])])
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(form.magnitude(x.to(dtype)), BlockFormat.magnitude(form, x.to(dtype)))


# --------------------------------------------------------------------------------------------- solvers


def grid_of(name: str, clip: Clip) -> QuantSpec:
    return dataclasses.replace(QuantSpec.of(name, symmetric=True), clip=clip)


def gram(n: int, seed: int = 0) -> Tensor:
    x = torch.randn(256, n, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        n, n, generator=torch.Generator().manual_seed(seed + 1)
    )
    return x.mT @ x / 256


@pytest.mark.parametrize("clip", ["none", "search"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("updated", [False, True])
def test_gptq_loses_on_weights_and_wins_on_outputs(name: str, clip: Clip, updated: bool) -> None:
    w, h, grid = (
        torch.randn(24, 64, generator=torch.Generator().manual_seed(2)),
        gram(64),
        BlockWeights(grid_of(name, clip)),
    )
    plain, ours = RTN[Codes]().solve(w, grid, None), GPTQ[Codes](updated=updated).solve(w, grid, h)

    def errors(q: Codes) -> tuple[float, float]:
        d = q.dequantize() - w
        return float(d.square().sum()), float(((d @ h) * d).sum())

    (plain_weight, plain_output), (weight, output) = errors(plain), errors(ours)
    assert weight > plain_weight
    assert output < plain_output
    assert updated or all(torch.equal(ours.parts[part], plain.parts[part]) for part in plain.parts)


@pytest.mark.parametrize("clip", ["none", "search"])
@pytest.mark.parametrize("name", NAMES)
def test_gptq_with_updated_scales_minds_no_block_size(name: str, clip: Clip) -> None:
    w, h, grid = (
        torch.randn(8, 96, generator=torch.Generator().manual_seed(2)),
        gram(96),
        BlockWeights(grid_of(name, clip)),
    )
    one, other = (GPTQ[Codes](updated=True, block_size=size).solve(w.double(), grid, h.double()) for size in (7, 96))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.parts[SCALE], other.parts[SCALE])


@pytest.mark.parametrize("clip", ["none", "search"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("updated", [False, True])
def test_gptq_with_an_identity_hessian_is_plain_rounding(name: str, clip: Clip, updated: bool) -> None:
    w, grid = (
        torch.randn(8, 64, generator=torch.Generator().manual_seed(2)),
        BlockWeights(grid_of(name, clip)),
    )
    ours, want = GPTQ[Codes](updated=updated).solve(w, grid, torch.eye(64)), RTN[Codes]().solve(w, grid, None)
    assert torch.equal(ours.codes, want.codes)


# --------------------------------------------------------------------------------------------- other tools


def hard(seed: int, scale: float) -> Tensor:
    """Random numbers with rows of zeros, subnormal numbers, ties, and signs of zero."""
    x = scale * matrix(seed, o=16, n=128)
    x[4] = 1e-40
    x[5, ::3], x[6, ::5] = 0.0, -0.0
    x[7] = scale * torch.tensor([6.0, *(t / 4 for t in range(-31, 32))]).repeat(2)  # ties, at a step that is scale
    return x


@pytest.mark.parametrize("preset, name", [("NVFP4A16", "nvfp4"), ("MXFP4A16", "mxfp4")])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4, 1e-38])
@pytest.mark.parametrize("seed", range(3))
def test_compressed_tensors_stores_the_same_bytes(preset: str, name: str, scale: float, seed: int) -> None:
    """Given a block's scale; MX scales themselves are found by the specification here, by another rule there."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, x = formats.make(name), hard(seed, scale)
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    assert args is not None
    assert args.group_size == form.block
    q = form.quantize(x)
    whole, blocks = q.parts.get(WHOLE), x.unflatten(-1, (-1, form.block))
    if whole is not None:
        torch.testing.assert_close(whole, generate_gparam(x.amin(), x.amax()), rtol=0, atol=0)
        theirs, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
        ours = from_e4m3(q.parts[SCALE])
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)
    else:
        theirs = from_e8m0(q.parts[SCALE])
    assert torch.equal(q.packed(), quantize_and_pack_fp4(x, theirs, whole, None, form.block))
    want = fake_quantize(x, theirs, None, args, whole)  # pyright: ignore[reportArgumentType]
    assert torch.equal(q.dequantize(), want)


def read(name: str) -> list[dict[str, Any]]:
    """What torchao 0.18 made of some numbers: its `to_mx`, and its `nvfp4_quantize` with 1 / `whole`."""
    recorded = json.loads(Path(__file__).with_name("torchao-0.18.json").read_text())[name]
    for row in recorded:
        numbers = torch.frombuffer(bytearray.fromhex(row["numbers"]), dtype=torch.float32)
        row["numbers"] = numbers.reshape(row["shape"])
        for part in ("scales", "codes"):
            row[part] = torch.frombuffer(bytearray.fromhex(row[part]), dtype=torch.uint8).reshape(row["shape"][0], -1)
    return recorded


@pytest.mark.parametrize("row", read("mxfp4"), ids=["around 1", "tiny", "large"])
def test_torchao_stores_the_same_mx_bytes(row: dict[str, Any]) -> None:
    q = formats.make("mxfp4").quantize(row["numbers"])
    assert torch.equal(q.parts[SCALE], row["scales"])
    assert torch.equal(q.packed() & 0x77, row["codes"] & 0x77)  # signs of zeros aside


@pytest.mark.parametrize("row", read("nvfp4"), ids=["seed 0", "seed 1"])
def test_torchao_stores_the_same_nv_bytes(row: dict[str, Any]) -> None:
    """On blocks whose scales are normal numbers of e4m3; torchao has no others."""
    x, form = row["numbers"], formats.make("nvfp4")
    parts = form.parts(x, whole=torch.tensor([row["whole"]]))  # a power of two: its inverse is exact
    q = Codes(codes=form.encode(x, parts), parts=parts, format=form)
    assert torch.equal(q.parts[SCALE], row["scales"])
    assert torch.equal(q.packed() & 0x77, row["codes"] & 0x77)


# --------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["w4", "kv4", "a8x", "FP4", "", "uniform", "levels", "4bit", "xkv4", "xa8"])
def test_names_that_read_as_something_else_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="format name"):
        Facts(name=name, bits=4, block=16, code="x:Y")


@pytest.mark.parametrize("name", ["wnvfp4", "anvfp4", "knvfp4", "vnvfp4", "kvnvfp4"])
def test_a_name_that_a_scheme_reads_as_a_known_format_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="could mean 'nvfp4'"):
        formats.register(Facts(name=name, bits=4, block=16, code="x:Y"))
    assert name not in formats.names()


def test_an_unknown_name_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(SpecError, match="nvfp4"):
        formats.make("fp3")


@pytest.mark.parametrize("name", formats.names())
def test_no_tokens_are_rounded_to_no_numbers(name: str) -> None:
    whole = torch.ones(1) if formats.facts(name).tensor_scale else None
    assert formats.make(name).fake(torch.empty(0, 64), whole=whole).shape == (0, 64)
