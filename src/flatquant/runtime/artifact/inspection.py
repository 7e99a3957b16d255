"""`inspect`: what a folder holds, without its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any

from flatquant.errors import ArtifactError, one_line
from flatquant.runtime.artifact.read import text_config
from flatquant.runtime.artifact.write import files_of
from flatquant.runtime.folder import (
    CONFIG_FILE,
    FORMAT_VERSION,
    Folder,
    end_sites,
    left_in_16_bit,
    rounded_ends,
    stored_kinds,
    unquantised_bytes,
)
from flatquant.runtime.kvcache import token_bytes


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a folder holds and costs; JSON-ready through `spec.to_dict`.

    Attributes:
        parameters: of the original model, tied ones counted once; `quantised_parameters` lie on a weight grid.
        bytes_by_kind: of tensors: `packed` integers, `grids` (scales, zero points), `transforms` (online factors,
            clips) and `dense` (embeddings, norms, biases, unquantised layers). `unquantised_bytes` says what is in
            `dense`, `left_in_16_bit` which weights, activations, keys and values the scheme gives no grid.
        output_layer, embedding: of a rounded one, its `grids` and `bytes`; whether the layer is a copy of the
            embeddings, which stay in 16 bit (`tied`), or the embedding is the layer (`shared`). None otherwise.
        bits_per_quantised_weight: packed, grids and transforms over the quantised parameters; None if there are none.
        bits_per_parameter: all tensors over all parameters. `compression` is 16 bit over that.
        kv_bytes_per_token: of `QuantizedCache`, all layers, scales and zero points included, and the angles that keys
            with an offset need, if all layers turn by the same; `kv_bytes_per_token_16bit` of a plain cache.
        damaged: files that are missing or differ from their hash; empty for a whole folder. Numbers are then of the
            tensors whose files can still be read.
        report: `flatquant_report.json` without its lists (their lengths instead), with calibration text and verdict in
            full; None if it is missing.
    """

    scheme: str
    recipe: str
    architecture: str
    format_version: int
    content_hash: str
    blocks: int
    parameters: int
    quantised_parameters: int
    files: Mapping[str, int]
    bytes_by_kind: Mapping[str, int]
    unquantised_bytes: Mapping[str, int]
    left_in_16_bit: tuple[str, ...]
    output_layer: Mapping[str, Any] | None
    embedding: Mapping[str, Any] | None
    bits_per_quantised_weight: float | None
    bits_per_parameter: float
    compression: float
    kv_bytes_per_token: int
    kv_bytes_per_token_16bit: int
    damaged: tuple[str, ...]
    report: Mapping[str, Any] | None


def inspect(path: Path | str, *, verify: bool = True) -> Inspection:
    """Read a folder's headers and hashes; no model is built.

    Args:
        verify: compare every file with its hash (reads all of it); otherwise `damaged` only lists missing files.

    Raises:
        ArtifactError: `config.json` cannot be read, or a file whose hash is right is not what it should be.
    """
    folder = Folder.open(Path(path))
    damaged = folder.damaged() if verify else [n for n in sorted(folder.files) if not (folder.path / n).is_file()]
    stored = folder.tensors(damaged)
    kinds = stored_kinds(folder.plan)
    missing = sorted(kinds.keys() - stored.keys())
    if missing and not damaged:
        raise ArtifactError(f"{folder.path} lacks tensor {one_line(missing[0])} ({len(missing)} in all)")
    sizes: dict[str, int] = {"packed": 0, "grids": 0, "transforms": 0, "dense": 0}
    dense = 0
    for name, tensor in stored.items():
        sizes[kinds.get(name, "dense")] += tensor.nbytes
        dense += tensor.numel if name not in kinds else 0
    quantised = 0
    for index, block in enumerate(folder.plan.blocks):
        for site in block.sites.values():
            book = ("inner." if site.rank else "") + ("" if site.codebook is None else "books.main.")
            for reader in site.readers if site.weights else ():
                packed = stored.get(f"{folder.plan.blocks_path}.{index}.{reader}.{book}packed")
                rows = packed.shape[0] if packed is not None else 0
                rows *= 1 if site.codebook is None else site.codebook.length
                quantised += rows * site.shape[0] * site.shape[1]
    ends = []
    for site in end_sites(folder.plan):
        packed = stored.get(f"{site.readers[0]}.packed")
        ends.append((packed.shape[0] if packed is not None else 0) * site.shape[1])
    quantised += sum(ends)
    head, embedding = folder.plan.head, folder.plan.embedding
    # The matrix of both is there twice, unless they share their integers.
    copied = ends[0] if head is not None and head.tied and not (embedding and embedding.shared) else 0
    total, parameters = sum(sizes.values()), max(dense + quantised - copied, 1)
    ours = sizes["packed"] + sizes["grids"] + sizes["transforms"]
    kv, kv16 = _kv_bytes(folder)
    report = folder.read_report()
    return Inspection(
        scheme=folder.scheme,
        recipe=str(folder.recipe.get("name", "")),
        architecture=_architecture(folder.config),
        format_version=FORMAT_VERSION,
        content_hash=folder.content_hash,
        blocks=len(folder.plan.blocks),
        parameters=parameters,
        quantised_parameters=quantised,
        files={name: (folder.path / name).stat().st_size for name in files_of(folder.path) if name[0] != "."},
        bytes_by_kind=sizes,
        unquantised_bytes=unquantised_bytes({n: (len(t.shape), t.nbytes) for n, t in stored.items()}, folder.plan),
        left_in_16_bit=tuple(left_in_16_bit(folder.plan)),
        **rounded_ends({name: t.nbytes for name, t in stored.items()}, folder.plan),
        bits_per_quantised_weight=8 * ours / quantised if quantised else None,
        bits_per_parameter=8 * total / parameters,
        compression=2 * parameters / max(total, 1),
        kv_bytes_per_token=kv,
        kv_bytes_per_token_16bit=kv16,
        damaged=tuple(damaged),
        report=_summary(report) or None,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _kv_bytes(folder: Folder) -> tuple[int, int]:
    names = ("num_key_value_heads", "num_attention_heads", "n_head")
    config = text_config(folder.config)
    heads = next((found for name in names if (found := config.get(name))), None)
    if type(heads) is not int or heads < 1:
        raise ArtifactError(f"{folder.path / CONFIG_FILE} is damaged: no number of attention heads")
    blocks, borrowing = folder.plan.blocks, config.get("num_kv_shared_layers") or 0
    if type(borrowing) is not int or not 0 <= borrowing < len(blocks):
        raise ArtifactError(f"{folder.path / CONFIG_FILE} is damaged: {borrowing!r} blocks without keys of their own")
    blocks = blocks[: len(blocks) - borrowing]  # the last ones read what earlier ones have put into the cache
    copies = [1 if b.latent else heads for b in blocks]
    kv = [token_bytes(b.key_dim, b.keys) + token_bytes(b.value_dim, b.values) for b in blocks]
    plain = [2 * (b.key_dim + b.value_dim) for b in blocks]
    turned = [b.key_dim for b in blocks if b.key_offset is not None and b.key_offset.pairing != "none"]
    angles = max(turned, default=0) * (4 if folder.config.get("dtype") == "float32" else 2)
    return sum(map(mul, copies, kv)) + angles, sum(map(mul, copies, plain))


def _summary(data: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return len(value) if isinstance(value, list) else value

    return {k: v if k in ("data", "verdict") else short(v) for k, v in data.items()}
