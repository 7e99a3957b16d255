"""Which launch settings of the runtime's kernels are fastest on this GPU: each is checked, then timed.

    python -m benchmarks.tune_runtime --budget 150 --out benchmarks/results

Every case has a list of settings, the first of them what is launched where nothing is said. All are compiled first,
side by side, which fills Triton's cache; then they are timed as `flatquant bench` times, the most important cases
first, until the budget is spent. The table has a line a case: the fastest settings against those of today and against
the baselines.
"""

from __future__ import annotations

import argparse
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import spawned, write_result
from flatquant.ops import int4_linear
from flatquant.ops.int4_linear import reference as product_reference
from flatquant.ops.int4_linear import triton as products
from flatquant.ops.int8_linear import reference as head_reference
from flatquant.ops.int8_linear import triton as heads_of_8_bits
from flatquant.ops.kron_quantize import triton as sites
from flatquant.ops.kron_quantize.reference import Form, gated, merged, rms_norm
from flatquant.ops.kron_quantize.triton import Settings
from flatquant.ops.kv_cache import reference as cache_reference
from flatquant.ops.kv_cache import triton as caching

NAME = "tune-runtime-h100"
CONTEXT = 2048

Variant = dict[str, Any]  # keyword arguments of a launch


class Prepared(NamedTuple):
    """A case with its data: calls rotate over `count` inputs, so that none is found in the cache."""

    count: int
    call: Callable[[int, Variant], Any]
    error: Callable[[Variant], float]
    baselines: Mapping[str, Sequence[Callable[[], Any]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to tune.

    Attributes:
        what: as the table names it.
        tokens: rows, or sequences.
        limit: errors above it mean that a kernel is wrong.
    """

    what: str
    tokens: int
    limit: float

    @abstractmethod
    def variants(self) -> list[Variant]:
        """Settings, today's first."""

    @abstractmethod
    def prepare(self, device: torch.device, small: bool) -> Prepared:
        """With data; `small`: one input, of few tokens, for which the same kernel is compiled."""


# ------------------------------------------------------------------------------------------------ sites


@dataclass(frozen=True, kw_only=True)
class SiteCase(Case):
    n: int
    source: str = "plain"
    form: Form = "packed"

    def variants(self) -> list[Variant]:
        from flatquant.transforms import kronecker_split

        n1, n2 = kronecker_split(self.n)
        today = sites.settings(self.source, (n1, n2), self.tokens, _sms())
        more = [today._replace(ahead=not today.ahead), today._replace(ahead=False, stages=3 - today.stages)]
        if self.tokens <= _sms():
            more += [today._replace(warps=2 * today.warps)]
        elif today.warps == 4:
            more += [today._replace(programs=today.programs + i) for i in (-1, 1)]
            more += [today._replace(warps=8), today._replace(registers=None if today.registers else 128)]
        elif today.registers:
            more += [Settings(8, 2, False, 2, 128), Settings(8, 1, True), today._replace(grain=64)]
        else:
            more += [Settings(8, ahead=True), Settings(8, grain=64), Settings(8, ahead=True, stages=2)]
        return [{"how": how} for how in dict.fromkeys([today, *more])]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        site = bench.make_site(self.n, "kronecker", device)
        inputs = 2 if self.source == "gate" else 1
        moved = self.tokens * (4 * inputs * self.n + (self.n if self.form == "packed" else 2 * self.n)) // 2
        tokens = min(16, self.tokens) if small else self.tokens
        count = 1 if small else bench.copies(moved)
        gain = torch.rand(self.n, device=device).to(_dtype(device)) if self.source == "norm" else None

        def random(size: int) -> Tensor:
            return torch.randn(size, self.n, device=device, dtype=_dtype(device))

        pairs = [(random(tokens), random(tokens) if self.source == "gate" else gain) for _ in range(count)]

        def call(i: int, variant: Variant) -> Any:
            x, other = pairs[i]
            eps = 1e-5 if self.source == "norm" else 0.0
            return sites.launch(
                x, other, self.source, site.shape, *site.factors, site.ratios, 4, self.form, eps, **variant
            )

        def error(variant: Variant) -> float:
            x, other = pairs[0]
            integers = bench.in_order(call(0, variant)[0][:64], self.form)
            y = x[:64].double()
            if self.source == "gate" and other is not None:
                y = gated(x[:64], other[:64]).double()
            if self.source == "norm" and other is not None:
                y = rms_norm(x[:64], other, 1e-5).double()
            return bench.site_error(y, integers, site)

        baselines = {} if small else {"bytes": bench.moves(moved, count, device)}
        return Prepared(count, call, error, baselines)


# --------------------------------------------------------------------------------------------- products


@dataclass(frozen=True, kw_only=True)
class ProductCase(Case):
    o: int
    n: int

    def variants(self) -> list[Variant]:
        if self.tokens == 1:
            sizes = ((8, 256, 4), (4, 256, 2), (4, 256, 4), (2, 512, 4), (2, 1024, 8), (8, 512, 8), (16, 128, 4))
            return [{}, *({"rows": r, "words": k, "warps": w} for r, k, w in sizes)]
        if self.tokens <= 16:
            sizes = ((32, 128, 4, 5, 1), (32, 256, 4, 4, 1), (64, 128, 4, 4, None), (64, 256, 4, 4, None))
        else:
            sizes = ((64, 256, 4, 3, None), (64, 64, 4, 4, None), (128, 128, 8, 3, None), (32, 256, 4, 3, None))
        few: list[Variant] = [{"parts": n} for n in (1, 2, 4, 8)]
        few += [{"rows": r, "bytes": k, "warps": w, "stages": s, "parts": n} for r, k, w, s, n in sizes]
        return [{}, *few, {"expanded": True}][: None if self.tokens >= 16 else -1]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        packed, dense, scale = _weights(self.o, self.n, self.n // 2, device, small)
        x = torch.randint(-8, 8, (self.tokens, self.n), device=device, dtype=torch.int8)
        ordered = bench.in_order(x, "planes").to(torch.float8_e4m3fn)
        s = torch.rand(self.tokens, 1, device=device) + 0.5
        y = torch.randn(self.tokens, self.n, device=device, dtype=_dtype(device))
        scratch = torch.zeros(4 * int4_linear.scratch_bytes(self.o, self.n), dtype=torch.uint8, device=device)
        counters, room = int4_linear.cut(scratch, self.tokens, self.n, self.o)

        def call(i: int, variant: Variant) -> Tensor:
            given = (s, packed[i], scale, None, None)
            if "expanded" in variant:
                return int4_linear.int4_linear(ordered, *given, torch.bfloat16, scratch)
            if self.tokens == 1:
                return products.vector(x, *given, _dtype(device), **variant)
            return products.few(x, *given, _dtype(device), (room.view(torch.int32), counters), **variant)

        def error(variant: Variant) -> float:
            want = product_reference.int4_linear(x, s, packed[0], scale, None, None, torch.float32)
            return bench.relative_error(call(0, variant), want)

        linear = torch.nn.functional.linear
        products_bf16 = [partial(linear, y, w) for w in dense]
        moves = bench.moves(self.o * self.n // 2, len(packed), device)
        baselines = {} if small else {"bf16": products_bf16, "bytes": moves}
        return Prepared(len(packed), call, error, baselines)


@dataclass(frozen=True, kw_only=True)
class ExpandCase(Case):
    o: int
    n: int

    def variants(self) -> list[Variant]:
        return [{}, *({"block": b, "warps": w} for b, w in ((2048, 4), (4096, 4), (8192, 8), (1024, 4)))]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        packed, _, _ = _weights(self.o, self.n, self.n // 2, device, small)
        out = torch.empty((self.o, self.n), dtype=torch.float8_e4m3fn, device=device)

        def error(variant: Variant) -> float:
            got, want = products.expand(packed[0], out, **variant), product_reference.expand(packed[0], out.dtype)
            return float((got.float() != want.float()).any())

        moved = self.o * self.n * 3 // 2
        baselines = {} if small else {"bytes": bench.moves(moved, len(packed), device)}
        return Prepared(len(packed), lambda i, variant: products.expand(packed[i], out, **variant), error, baselines)


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    """An output layer in 8 bits."""

    o: int
    n: int

    def variants(self) -> list[Variant]:
        sizes = ((32, 256, 4, 2), (32, 256, 4, 4), (32, 256, 4, 5), (16, 256, 4, 4), (32, 512, 4, 3), (16, 512, 4, 3))
        sizes += ((32, 128, 4, 5), (32, 256, 8, 4), (16, 256, 2, 4), (64, 128, 4, 5))
        return [{}, *({"rows": r, "columns": k, "warps": w, "stages": s} for r, k, w, s in sizes)]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        packed, dense, scale = _weights(self.o, self.n, self.n, device, small)
        x = torch.randn(self.tokens, self.n, device=device, dtype=_dtype(device))

        def call(i: int, variant: Variant) -> Tensor:
            return heads_of_8_bits.few(x, packed[i], scale, None, **variant)

        def error(variant: Variant) -> float:
            return bench.relative_error(call(0, variant), head_reference.int8_linear(x.float(), packed[0], scale, None))

        moves = bench.moves(self.o * self.n, len(packed), device)
        products_bf16 = [partial(torch.nn.functional.linear, x, w) for w in dense]
        return Prepared(len(packed), call, error, {} if small else {"bf16": products_bf16, "bytes": moves})


@lru_cache(maxsize=1)
def _weights(o: int, n: int, row: int, device: torch.device, small: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Weights of `row` bytes a row, the same in 16 bits, and a scale for each row."""
    from flatquant import bench

    count, wide = (1, 0) if small else (bench.copies(o * row), bench.copies(2 * o * n))
    packed = [torch.randint(0, 256, (o, row), device=device, dtype=torch.uint8) for _ in range(count)]
    dense = [torch.randn(o, n, device=device, dtype=_dtype(device)) for _ in range(wide)]
    return packed, dense, torch.rand(o, device=device) * 0.01 + 0.01


# -------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    queries: int
    keys: int
    head_dim: int
    places: int

    def variants(self) -> list[Variant]:
        heads = self.tokens * self.keys
        parts = [max(1, min(self.places // 128, programs // heads)) for programs in (528, 264, 1056)]
        sizes = ((64, 2, 3), (64, 2, 2), (64, 2, 4), (64, 4, 4), (64, 4, 3), (32, 2, 3), (32, 1, 3), (128, 4, 3))
        grid = [{"parts": p, "block": b, "warps": w, "stages": s} for p in parts[:1] for b, w, s in sizes]
        grid += [{"parts": p, "block": 64, "warps": 2, "stages": 3} for p in parts[1:]]
        return [v for i, v in enumerate(grid) if v not in grid[:i]]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        b, s, d = self.tokens, self.places, self.head_dim
        moved = 2 * b * self.keys * s * (d // 2 + 5)
        count = 1 if small else bench.copies(moved)

        stores = [[bench.random_store(b, self.keys, s, d, device) for _ in range(2)] for _ in range(count)]
        q = torch.randn(b, self.queries, d, device=device, dtype=_dtype(device))
        last = torch.tensor([s - 1], device=device)
        start = torch.zeros(b, device=device, dtype=torch.int64)

        def call(i: int, variant: Variant) -> tuple[Tensor, Tensor]:
            return caching.attend(q, stores[i][0], stores[i][1], last, start, None, d**-0.5, **variant)

        def error(variant: Variant) -> float:
            keys, values = (cache_reference.Store(*(t[:1] for t in held)) for held in stores[0])
            want = merged(*cache_reference.attend(q[:1], keys, values, last, start[:1], None, d**-0.5))
            return bench.relative_error(merged(*call(0, variant))[:1], want)

        baselines = {} if small else {"bytes": bench.moves(moved, count, device)}
        return Prepared(count, call, error, baselines)


@dataclass(frozen=True, kw_only=True)
class AppendCase(Case):
    queries: int
    keys: int
    head_dim: int

    def variants(self) -> list[Variant]:
        sizes = ((64, 1, 8), (64, 2, 8), (64, 4, 4), (64, 1, 4), (32, 1, 4), (32, 4, 4), (16, 4, 4), (128, 1, 8))
        return [{}, *({"rows": r, "group": g, "warps": w} for r, g, w in sizes if self.keys % g == 0)]

    def prepare(self, device: torch.device, small: bool) -> Prepared:
        from flatquant import bench

        t, hq, hk, d = self.tokens, self.queries, self.keys, self.head_dim
        moved = t * (4 * (hq + 2 * hk) * d + hk * (d + 10))  # dense in and out, integers with their scales out
        count = 1 if small else bench.copies(moved)
        inputs = [torch.randn(1, t, (hq + 2 * hk) * d, device=device, dtype=_dtype(device)) for _ in range(count)]
        angle = torch.rand(1, t, d // 2, device=device).repeat(1, 1, 2) * 6
        cos, sin = angle.cos().to(_dtype(device)), angle.sin().to(_dtype(device))
        matrices = torch.linalg.qr(torch.randn(2, d, d, device=device)).Q.contiguous()
        heads = cache_reference.Heads(hq, hk, d, matrices, torch.full((2, 2), 0.95, device=device))

        def store() -> cache_reference.Store:
            shape = (1, hk, t)
            packed = torch.zeros((*shape, d // 2), device=device, dtype=torch.uint8)
            zero = torch.zeros(shape, device=device, dtype=torch.uint8)
            return cache_reference.Store(packed, torch.ones(shape, device=device), zero)

        keys, values = store(), store()
        at = torch.zeros(1, device=device, dtype=torch.int64)

        def call(i: int, variant: Variant) -> cache_reference.Appended:
            return caching.append(inputs[i], cos, sin, heads, keys, values, at, dense=True, **variant)

        def error(variant: Variant) -> float:
            want = cache_reference.append(inputs[0].float(), cos.float(), sin.float(), heads, store(), store(), at)
            return bench.relative_error(call(0, variant)[0], want[0])  # of queries: a key may be the next integer

        baselines = {} if small else {"bytes": bench.moves(moved, count, device)}
        return Prepared(count, call, error, baselines)


# ---------------------------------------------------------------------------------------------- running


@cache
def _sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 4


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter knows no bfloat16


def cases(tiny: bool) -> list[Case]:
    """What is tuned, most important first."""
    from flatquant.bench import PRODUCT_ERROR, SITE_ERROR

    if tiny:
        return [
            *(
                SiteCase(what="site", n=96, tokens=t, limit=SITE_ERROR, source=s)
                for t in (1, 6)
                for s in ("plain", "gate")
            ),
            *(ProductCase(what="product", o=32, n=64, tokens=t, limit=PRODUCT_ERROR) for t in (1, 4)),
            *(HeadCase(what="head", o=32, n=64, tokens=t, limit=PRODUCT_ERROR) for t in (1, 4)),
            ExpandCase(what="expand", o=32, n=64, tokens=0, limit=0),
            AttentionCase(what="attention", queries=4, keys=2, head_dim=16, places=256, tokens=2, limit=0.02),
            AppendCase(what="append", queries=4, keys=4, head_dim=16, tokens=40, limit=0.02),
        ]
    first, others = (4096, 11008, 14336), (5120, 8192, 18944, 28672)

    def site(n: int, tokens: int, source: str = "plain", form: Form = "packed") -> Case:
        return SiteCase(what=f"{source} {n}, {form}", n=n, tokens=tokens, limit=SITE_ERROR, source=source, form=form)

    shapes = ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096), (12288, 4096), (22016, 4096), (4096, 11008))
    heads = {"llama-3-8b": (32, 8), "llama-2-7b": (32, 32)}
    return [
        *(site(n, 8192) for n in first),
        *(site(n, 1) for n in first),
        *(site(n, 8192) for n in others),
        *(site(n, 1) for n in others),
        site(4096, 8192, "norm", "float8"),
        *(site(n, 8192, "gate", "float8") for n in (11008, 14336)),
        *(
            ProductCase(what=f"product {o} x {n}", o=o, n=n, tokens=t, limit=PRODUCT_ERROR)
            for o, n in shapes[:3]
            for t in _FEW
        ),
        *(
            AttentionCase(
                what=f"attention {name}", queries=q, keys=k, head_dim=128, places=CONTEXT, tokens=b, limit=0.02
            )
            for name, (q, k) in heads.items()
            for b in (1, 16, 64)
        ),
        *(
            HeadCase(what=f"head {o} x {n}", o=o, n=n, tokens=t, limit=PRODUCT_ERROR)
            for o, n in ((128256, 4096), (151936, 4096))
            for t in (1, 4)
        ),
        *(
            AppendCase(what=f"append {name}", queries=q, keys=k, head_dim=128, tokens=2048, limit=0.02)
            for name, (q, k) in heads.items()
        ),
        site(4096, 1, "norm", "planes"),
        site(14336, 1, "gate", "planes"),
        *(site(n, t) for t in (2048, 16) for n in first + others),
        *(ExpandCase(what=f"expand {o} x {n}", o=o, n=n, tokens=0, limit=0) for o, n in shapes[1:3]),
        *(
            ProductCase(what=f"product {o} x {n}", o=o, n=n, tokens=t, limit=PRODUCT_ERROR)
            for o, n in shapes[3:]
            for t in _FEW
        ),
    ]


_FEW = (1, 4, 16, 64)


def _compile(case: Case, variant: Variant) -> None:
    """Run in a process of its own: the compiled kernel stays in Triton's cache."""
    case.prepare(torch.device("cuda"), True).call(0, variant)
    torch.cuda.synchronize()


def compile_all(found: list[Case], workers: int) -> None:
    """Fill Triton's cache. What does not compile fails again, with a name, where it is timed."""
    jobs = {}
    for case in found:
        few = replace(case, tokens=min(case.tokens, 16)) if isinstance(case, SiteCase) else case
        for variant in case.variants():
            jobs[(few.what, few.tokens, str(variant))] = (few, variant)
    spawned(_compile, list(jobs.values()), workers)
    print(f"compiled {len(jobs)} kernels", flush=True)


def tune(case: Case, device: torch.device, seconds: float, small: bool) -> list[dict[str, Any]]:
    """Check and time all settings of a case."""
    from flatquant import bench

    ready = case.prepare(device, small)
    base = {name: bench.measure(calls, device, seconds=seconds).median for name, calls in ready.baselines.items()}
    rows = []
    for i, variant in enumerate(case.variants()):
        row: dict[str, Any] = {"what": case.what, "tokens": case.tokens, "settings": _plain(variant), "today": i == 0}
        try:
            row["error"] = ready.error(variant)
            row["correct"] = row["error"] <= case.limit
            if row["correct"]:
                calls = [partial(ready.call, i, variant) for i in range(ready.count)]
                row["ms"] = bench.measure(calls, device, seconds=seconds).median
        except Exception as problem:  # noqa: BLE001 - settings that a kernel cannot have are a result, too
            row |= {"correct": False, "problem": f"{type(problem).__name__}: {problem}"[:200]}
        rows.append(row | {"baselines": base})
    return rows


def _plain(variant: Variant) -> dict[str, Any]:
    return variant["how"]._asdict() if "how" in variant else variant


def line(rows: list[dict[str, Any]]) -> str:
    """A case in the table."""
    first = rows[0]
    title = f"{first['what']:28} {first['tokens']:5}"
    timed = [row for row in rows if "ms" in row]
    wrong = [str(list(row["settings"].values())) for row in rows if not row["correct"]]
    tail = f"  WRONG {', '.join(wrong)}" if wrong else ""
    if not timed:
        return title + tail
    best = min(timed, key=lambda row: row["ms"])
    today = f"{first['ms']:.4f}" if "ms" in first else "-"
    against = " ".join(f"{name} {ms:.4f} ({best['ms'] / ms:.2f}x)" for name, ms in first["baselines"].items())
    return f"{title} today {today} best {best['ms']:.4f} {best['settings'] or 'as today'} {against}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--name", default=NAME, help="of the results file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no case is started")
    parser.add_argument("--seconds", type=float, default=0.1, help="that one measurement takes")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose names begin with one of these, in order")
    parser.add_argument("--tokens", nargs="*", type=int, help="cases of so many tokens alone")
    parser.add_argument("--tiny", action="store_true", help="a dry run that measures nothing")
    args = parser.parse_args()
    start, path = time.perf_counter(), Path(args.out) / f"{args.name}.json"
    device = torch.device(args.device)
    found = [case for only in args.only for case in cases(args.tiny) if case.what.startswith(only)]
    found = [case for case in found if args.tokens is None or case.tokens in args.tokens]
    if device.type == "cuda":
        compile_all(found, args.workers)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for case in found:
        if time.perf_counter() - start > args.budget:
            left.append(f"{case.what}, {case.tokens}")
            continue
        made = tune(case, device, args.seconds, args.tiny)
        rows += made
        print(f"{time.perf_counter() - start:5.0f} s  {line(made)}", flush=True)
        write_result(path, args.name, seeds=[], metrics={"not_timed": left}, samples=rows)
    write_result(path, args.name, seeds=[], metrics={"not_timed": left}, samples=rows)
    if left:
        print("not timed:", "; ".join(left), flush=True)


if __name__ == "__main__":
    main()
