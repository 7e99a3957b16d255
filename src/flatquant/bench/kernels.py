"""Sites against the bytes they move, products against bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.bench.timing import Row, copies, made_row, measure, moves
from flatquant.ops import int4_linear, kron_quantize
from flatquant.ops.int4_linear import reference as product_reference
from flatquant.ops.kron.reference import kron_matmul
from flatquant.ops.kron_quantize import Form, Site
from flatquant.ops.kron_quantize import reference as site_reference
from flatquant.ops.kron_quantize.reference import of_rows
from flatquant.ops.pack.reference import unpack_bits
from flatquant.transforms import kronecker_split
from flatquant.transforms.hadamard import hadamard, has_hadamard

SITE_ERROR = 0.5 + 2**-3  # in steps: half of one by rounding, and what operands in bfloat16 add at most
PRODUCT_ERROR = 2**-7  # of the largest element: results are bfloat16


def make_site(n: int, transform: str, device: torch.device) -> Site:
    """A site of n channels with a random transform of a kind."""
    n1, n2 = kronecker_split(n)
    left = right = None
    if transform != "none":
        left, right = (random_matrix(k, transform, device) for k in (n1, n2))
    return Site((n1, n2), left, right, torch.full((2,), 0.95, device=device), 4)


def random_matrix(n: int, transform: str, device: torch.device) -> Tensor:
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
            calls = [partial(kron_quantize.plain, x, site, "packed") for x in inputs]
            times = measure(calls, device) if error <= SITE_ERROR else None
            what = f"transform and quantise {n} ({site.shape[0]} x {site.shape[1]})"
            rows.append(made_row(what, t, error, times, "moving the bytes", bytes_.median))
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
    match of_rows(form, len(integers)):
        case "packed":
            return unpack_bits(integers, 4, 2 * integers.shape[-1]).double() - 8
        case "planes":
            return integers.double().unflatten(-1, (2, -1)).mT.flatten(-2)
        case _:
            return integers.view(torch.float8_e4m3fn).double()


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
            if of_rows(int4_linear.form(device, torch.bfloat16), t) == "float8":
                x = x.float().to(torch.float8_e4m3fn)
            s = torch.rand(t, 1, device=device) + 0.5
            want = product_reference.int4_linear(x, s, packed[0], scale, None, None, torch.float32)
            product = partial(int4_linear.int4_linear, dtype=torch.bfloat16, scratch=scratch)
            error = relative_error(product(x, s, packed[0], scale, None, None), want)
            y = torch.randn(t, n, device=device, dtype=torch.bfloat16)
            base = measure([partial(F.linear, y, w) for w in dense], device)
            calls = [partial(product, x, s, w, scale, None, None) for w in packed]
            times = measure(calls, device) if error <= PRODUCT_ERROR else None
            rows.append(made_row(f"product {o} x {n}", t, error, times, "bfloat16", base.median))
        del packed, dense
    return rows
