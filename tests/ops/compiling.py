"""Compiles the runtime's kernels for a GPU, and needs none: what they launch with is recorded on meta tensors.

Run by `test_compiles.py` in a process of its own, since Triton decides at its import whether kernels are interpreted.
Prints a JSON object: by kernel and shape, the bytes of shared memory, and of registers that were spilled.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
TARGET = GPUTarget("cuda", CAPABILITY, 32)
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}[CAPABILITY]  # bytes that a program may have
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Usage(NamedTuple):
    """Bytes of shared memory a program, and of the stack a thread, where registers go that there is no room for."""

    shared: int
    stack: int


class Recorder:
    """Stands where a kernel stands; compiles it for what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.found: list[Usage] = []

    def __getitem__(self, grid: Any):
        def launch(*args: Any, **constants: Any) -> None:
            if "EMULATE" in constants:  # the way of the GPU: assembly instead of what stands for it in the interpreter
                constants["EMULATE"] = False
            options = {
                k: constants.pop(k) for k in ("num_warps", "num_stages", "maxnreg", "launch_pdl") if k in constants
            }
            signature, values, aligned = {}, {}, {}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            for i, name in enumerate(self.kernel.arg_names):
                value = given[name]
                if isinstance(value, Tensor):
                    signature[name] = f"*{TYPES[value.dtype]}"
                    aligned[(i,)] = [["tt.divisibility", 16]]
                elif value is None or name in constants:
                    signature[name] = "constexpr"
                    values[(i,)] = value
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32"
                    if value % 16 == 0:
                        aligned[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature=signature, constexprs=values, attrs=aligned)
            compiled: Any = triton.compile(source, target=TARGET, options=options)
            self.found.append(Usage(compiled.metadata.shared, stack_of(compiled.asm["cubin"])))

        return launch


def stack_of(cubin: bytes) -> int:
    """Bytes of stack that a thread of a compiled kernel needs."""
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1])


def record(module: Any, name: str) -> Recorder:
    """Put a recorder in a kernel's place."""
    recorder = Recorder(getattr(module, name))
    setattr(module, name, recorder)
    return recorder


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def main() -> None:
    sites, products, caching, paging = (
        importlib.import_module(f"flatquant.ops.{op}.triton")
        for op in ("kron_quantize", "int4_linear", "kv_cache", "paged_cache")
    )
    for module in (sites, products, caching, paging):
        module.early = lambda x, tokens, programs=0: CAPABILITY >= 90 and (tokens == 1 or 0 < programs < tokens)
    kv_cache = importlib.import_module("flatquant.ops.kv_cache")
    head = importlib.import_module("flatquant.ops.int8_linear.triton")
    heads_of, store_of = kv_cache.Heads, kv_cache.Store
    found: dict[str, Usage] = {}

    sites.shared_memory = lambda device: SHARED
    many = "float8" if CAPABILITY >= 89 else "planes"
    kernel = record(sites, "_kernel")
    ratios = meta(2, dtype=torch.float32)
    for n1, n2 in ((64, 64), (64, 80), (86, 128), (112, 128), (128, 148), (128, 224)):
        if sites.supports((n1, n2), True, True, 4, SHARED):
            continue
        left, right = (meta(n, n) for n in (n1, n2))
        kinds = ((1, "planes", "gate"), (4096, many, "gate"), (4096, "packed", "plain"))
        if n1 == 64:
            kinds += ((1, "planes", "norm"), (4096, many, "norm"))
        for tokens, form, source in kinds:
            x = meta(tokens, n1 * n2)
            other = {"gate": x, "norm": meta(n1 * n2), "plain": None}[source]
            sites.launch(x, other, source, (n1, n2), left, right, ratios, 4, form, 1e-5)
            found[f"{source} {n1} x {n2}, {tokens} tokens, {form}"] = kernel.found[-1]
    for n1, n2 in ((86, 128), (128, 224)):
        for tokens, form in ((4, "planes"), (4096, many)):
            x = meta(tokens, n1 * n2)
            sites.launch(x, x, "gate", (n1, n2), None, None, ratios, 4, form)
            found[f"gate {n1} x {n2}, {tokens} tokens, {form}, no factors"] = kernel.found[-1]
    parts, lse = meta(1, 32, 8, 128, dtype=torch.float32), meta(1, 32, 8, dtype=torch.float32)
    sites.launch(parts, lse, "merge", (32, 128), meta(32, 32), None, ratios, 4, "planes")
    found["merge 32 x 128"] = kernel.found[-1]

    # The recorder keeps the way of the GPU: assembly instead of what stands for it in the interpreter.
    for name, tokens in (("_vector", 1), ("_few", 16), ("_few", 64)):
        kernel = record(products, name)
        launch = kernel[(1,)]
        o, n = 4096, 14336
        vector = name == "_vector"
        words = {"words": n // 8} if vector else {"T": tokens, "N": n}
        kind = torch.int32 if vector else torch.int8
        given: dict[str, Any] = {
            "x_ptr": meta(tokens, n, dtype=kind),
            "xs_ptr": meta(tokens, dtype=torch.float32),
            "w_ptr": meta(o, n, dtype=torch.int32 if vector else torch.uint8),
            "ws_ptr": meta(o, dtype=torch.float32),
            "bias_ptr": None,
            "residual_ptr": meta(tokens, o),
            "y_ptr": meta(tokens, o),
            "sums_ptr": meta(4, 64, tokens, dtype=torch.int32),
            "done_ptr": meta(64, dtype=torch.int32),
            "O": o,
            **words,
        }
        few = {"R": 64, "TP": tokens, "K": 256 if tokens <= 16 else 128, "PARTS": 4}
        sizes = {"R": 4, "K": 512, "EARLY": CAPABILITY >= 90} if vector else few
        ordered = [given[a] for a in kernel.kernel.arg_names if a in given]
        launch(
            *ordered,
            num_warps=4,
            num_stages=3,
            launch_pdl=vector and CAPABILITY >= 90,
            BIAS=False,
            RESIDUAL=True,
            EMULATE=False,
            **sizes,
        )
        found[f"{name[1:]} {tokens}"] = kernel.found[-1]
        setattr(products, name, kernel.kernel)
    kernel = record(products, "_expand")
    wide = torch.float8_e4m3fn if many == "float8" else torch.int8
    products.expand(meta(64, 64, dtype=torch.uint8), meta(64, 128, dtype=wide))
    found["expand"] = kernel.found[-1]
    kernel = record(products, "_scaled")
    sums, x_scale, scale = meta(80, 64, dtype=torch.int32), *(meta(n, dtype=torch.float32) for n in (80, 64))
    products.scaled(sums, x_scale, scale, None, meta(80, 64), torch.bfloat16)
    found["scaled"] = kernel.found[-1]

    kernel = record(head, "_few")
    for tokens in (1, 64):
        head.few(meta(tokens, 4096), meta(128256, 4096, dtype=torch.uint8), meta(128256, dtype=torch.float32), None)
        found[f"few8 {tokens}"] = kernel.found[-1]

    pair = meta(2, 128, 128)
    back = meta(8, 128, 128, dtype=torch.float32)
    heads = heads_of(32, 8, 128, pair, meta(2, 2, dtype=torch.float32))
    less = heads._replace(offset=meta(8, 128, dtype=torch.float32), back=back)
    stores = [
        store_of(
            meta(1, 8, 2048, 64, dtype=torch.uint8),
            meta(1, 8, 2048, dtype=torch.float32),
            meta(1, 8, 2048, dtype=torch.uint8),
        )
        for _ in range(2)
    ]
    place = meta(1, dtype=torch.int64)
    kernel = record(caching, "_append")
    for tokens in (1, 2048):
        turn = meta(1, tokens, 128)
        caching.append(meta(1, tokens, 48 * 128), turn, turn, heads, *stores, place, dense=tokens > 1)
        found[f"append {tokens}"] = kernel.found[-1]
        caching.append(meta(1, tokens, 48 * 128), turn, turn, less, *stores, place, dense=tokens > 1)
        found[f"append {tokens}, offset"] = kernel.found[-1]
    kernel = record(caching, "_attend")
    caching.attend(meta(1, 32, 128), *stores, place, place, None, 0.1, parts=8)
    found["attend"] = kernel.found[-1]
    short = kv_cache.Shortage(
        meta(1, 32, 128, dtype=torch.float32),
        meta(1, 2048, 128, dtype=torch.float32),
        meta(kv_cache.STEPS, 128, dtype=torch.float16),
        meta(1, dtype=torch.int32),
    )
    caching.attend(meta(1, 32, 128), *stores, place, place, None, 0.1, short, parts=8)
    found["attend, offset"] = kernel.found[-1]

    paged_cache = importlib.import_module("flatquant.ops.paged_cache")
    pages = paged_cache.stores_of(meta(64, 8, 16, paged_cache.place_bytes(128), dtype=torch.uint8))
    batch = paged_cache.Batch(*(meta(*size, dtype=torch.int32) for size in ((2, 128), (2,), (3,))))
    lacking = paged_cache.Short(meta(2, 32, 128, dtype=torch.float32), meta(2048, 128, dtype=torch.float32))
    for name, less in (("paged", None), ("paged, offset", lacking)):
        paging.decode(meta(2, 32, 128), *pages, batch, None, 0.1, less)
        found[name] = kernel.found[-1]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
