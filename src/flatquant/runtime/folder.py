"""The format of a quantised folder: which files it has, what `config.json` says, and how every byte is vouched for.

Layout, in the manner of Hugging Face folders:

    config.json                     the model's config, and under `quantization_config`:
        quant_method, format_version    "flatquant", 1
        scheme, recipe                  what was asked for
        plan                            what sits where; equal blocks are written once
        files                           sha256 of every other file but the report
        content_hash                    sha256 of this very file's content (without this entry)
    flatquant.safetensors           or flatquant-0000i-of-0000n.safetensors and flatquant.safetensors.index.json
    generation_config.json, tokenizer files
    README.md                       the model card; not hashed: its owner may add to it (see `card.py`)
    flatquant_report.json           how it was made: times, losses. Not read for serving, and not hashed, so that two
                                    runs that find the same model have the same content hash

The tensors do not lie in `model.safetensors`, on purpose. A transformers that has not imported flatquant warns of an
unknown quant_method, ignores it and goes on: it would leave all quantised layers random. Not finding the file that it
looks for, it stops.

A hash guards against damage, not against malice: whoever can rewrite a folder can rewrite its hashes. So numbers and
names are also checked before anything is allocated or opened: no pickle, no remote code, no file outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flatquant.errors import ArtifactError, SpecError, one_line
from flatquant.formats import kinds as storage
from flatquant.quantizers.choose import empty
from flatquant.spec import BlockPlan, HeadGrids, Plan, QuantSpec, SitePlan, from_dict, plain_weights, to_dict

METHOD = "flatquant"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
REPORT_FILE = "flatquant_report.json"
COLLECTION_FILE = "flatquant_collection.json"
EVALUATION_FILE = "flatquant_evaluation.json"
CARD_FILE = "README.md"
SINGLE_FILE = "flatquant.safetensors"
INDEX_FILE = "flatquant.safetensors.index.json"

_MAX_JSON_BYTES = 64 << 20  # of a JSON file that we parse; a thousand different blocks take about two million
_NAME = re.compile(r"[A-Za-z0-9_+\-][A-Za-z0-9_+\-. ]*")  # one part of a file name; never ".." or hidden
_SHA256 = re.compile(r"[0-9a-f]{64}")
# safetensors' names of the types that we write and read, in the order in which its writer places them: the last first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a shard's header says of one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A quantised folder whose `config.json` has been read and found whole."""

    path: Path
    config: Mapping[str, Any]  # the model's own, without `quantization_config`
    scheme: str
    recipe: Mapping[str, Any]
    plan: Plan
    files: Mapping[str, str]  # name -> sha256
    content_hash: str

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Read and check `config.json`; nothing else is opened.

        Raises:
            ArtifactError: not a folder of ours, another format version, damaged or edited.
        """
        if not path.is_dir():
            raise ArtifactError(f"{path} is not a folder")
        if not (path / CONFIG_FILE).is_file():
            raise ArtifactError(f"{path} has no {CONFIG_FILE}: it is not a quantised model")
        config = read_json(path / CONFIG_FILE)
        quantisation = config.get("quantization_config") if isinstance(config, dict) else None
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        if not isinstance(quantisation, dict) or method != METHOD:
            found = f"quantised by {one_line(method)}" if method else "not quantised"
            raise ArtifactError(f"{path} is {found}, not a {METHOD} folder; quantise the original model first")
        version = quantisation.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {one_line(version)}, this library reads {FORMAT_VERSION}; "
                "quantise the original model again, or use the version of flatquant that wrote it"
            )
        if quantisation.get("content_hash") != content_hash(config):
            raise ArtifactError(f"{path / CONFIG_FILE} is damaged or was edited: its content hash does not match")
        own = {k: v for k, v in config.items() if k != "quantization_config"}
        files, scheme, recipe = (quantisation.get(k) for k in ("files", "scheme", "recipe"))
        if not isinstance(scheme, str) or not isinstance(recipe, dict) or not isinstance(files, dict):
            raise ArtifactError(f"{path / CONFIG_FILE} is damaged: files, scheme or recipe are missing")
        for name, digest in files.items():
            check_name(name)
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise ArtifactError(f"{path / CONFIG_FILE} is damaged: {name} has no sha256")
        return cls(
            path=path,
            config=own,
            scheme=scheme,
            recipe=recipe,
            plan=plan_from_json(quantisation.get("plan")),
            files=files,
            content_hash=quantisation["content_hash"],
        )

    @property
    def shards(self) -> list[str]:
        """The files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    @property
    def companions(self) -> list[str]:
        """The files that came along and that loading the model does not read: the tokenizer's."""
        return sorted(name for name in self.files if name not in (*self.shards, INDEX_FILE, GENERATION_FILE))

    def damaged(self, skipped: Collection[str] = ()) -> dict[str, str]:
        """Files that are missing or differ from their hash, and why."""
        found = {name: self._damage(name, digest) for name, digest in sorted(self.files.items()) if name not in skipped}
        return {name: why for name, why in found.items() if why}

    def _damage(self, name: str, digest: str) -> str:
        if not (self.path / name).is_file():
            return "is missing"
        try:
            found = file_digest(self.path / name)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        return "" if found == digest else "is damaged: its sha256 does not match"

    def check_files(self, skipped: Collection[str] = ()) -> None:
        """Raise ArtifactError for the first file that is missing or damaged."""
        for name, why in self.damaged(skipped).items():
            hint = ", or pass verify=False if you replaced it" if name in self.companions else ""
            raise ArtifactError(f"{self.path / name} {why}; copy the folder again{hint}")

    def read_report(self) -> dict[str, Any]:
        """`flatquant_report.json`; empty if it is missing or no object."""
        file = self.path / REPORT_FILE
        report = read_json(file) if file.is_file() else None
        return report if isinstance(report, dict) else {}

    def tensors(self, damaged: Collection[str] = ()) -> dict[str, StoredTensor]:
        """Every stored tensor, from the shards' headers alone.

        Args:
            damaged: files known to be so: what cannot be read of them is left out.

        Raises:
            ArtifactError: a shard that is missing, cut short or no safetensors file; an index that says otherwise.
        """
        tensors: dict[str, StoredTensor] = {}
        if not self.shards:
            raise ArtifactError(f"{self.path} is damaged: {CONFIG_FILE} names no file of tensors")
        for file in self.shards:
            try:
                found = _header(self.path / file, file)
            except ArtifactError:
                if file not in damaged:
                    raise
                continue
            for name, tensor in found.items():
                if name in tensors:
                    raise ArtifactError(f"{self.path / file} is damaged: {one_line(name)} is also elsewhere")
                tensors[name] = tensor
        if not damaged and (len(self.shards) > 1 or INDEX_FILE in self.files):
            index = read_json(self.path / INDEX_FILE)
            where = index.get("weight_map") if isinstance(index, dict) else None
            if where != {name: tensor.file for name, tensor in tensors.items()}:
                raise ArtifactError(f"{self.path / INDEX_FILE} is damaged: it does not match the shards")
        return tensors


def _header(path: Path, file: str) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                part = f.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ArtifactError(f"{path}: {one_line(name)} is stored as {part.get_dtype()}")
                tensors[name] = StoredTensor(file=file, dtype=dtype, shape=tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({one_line(error)}); copy the folder again") from error
    return tensors


# --------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> Any:
    """Parse a file.

    Raises:
        ArtifactError: missing, not JSON, or absurdly large.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ArtifactError(f"{path} is damaged: a JSON file of {path.stat().st_size} bytes")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: not JSON ({one_line(error)})") from error


def json_bytes(data: Any) -> bytes:
    """Readable JSON, the same bytes for the same data."""
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a `config.json`, its own hash left out; independent of white space and the order of keys."""
    quantisation = {k: v for k, v in config["quantization_config"].items() if k != "content_hash"}
    text = json.dumps({**config, "quantization_config": quantisation}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_name(name: str) -> None:
    """Raise ArtifactError unless `name` is a plain path inside the folder."""
    parts = PurePosixPath(name).parts
    if "\\" in name or "/".join(parts) != name or not parts or not all(map(_NAME.fullmatch, parts)):
        raise ArtifactError(f"{CONFIG_FILE} is damaged: {one_line(repr(name))} is not a file of the folder")


# --------------------------------------------------------------------------------------------- plans


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan with equal blocks written once: `kinds` holds the different ones, `blocks` says which is where."""
    kinds: list[BlockPlan] = []
    blocks = []
    for block in plan.blocks:
        if block not in kinds:
            kinds.append(block)
        blocks.append(kinds.index(block))
    data = {"blocks_path": plan.blocks_path, "attention": plan.attention, "kinds": to_dict(kinds), "blocks": blocks}
    ends = {"head": plan.head, "embedding": plan.embedding}
    return data | {name: to_dict(part) for name, part in ends.items() if part is not None}


def plan_from_json(data: Any) -> Plan:
    """Undo `plan_to_json`.

    Raises:
        ArtifactError: not such a plan.
    """
    where = f"{CONFIG_FILE} is damaged: plan"
    ends = {"head", "embedding"}
    if not isinstance(data, dict) or set(data) - ends != {"blocks_path", "attention", "kinds", "blocks"}:
        raise ArtifactError(f"{where} has other entries than blocks_path, attention, kinds, blocks, head, embedding")
    kinds, blocks = data["kinds"], data["blocks"]
    if not isinstance(kinds, list) or not isinstance(blocks, list):
        raise ArtifactError(f"{where}: kinds and blocks are lists")
    if not all(type(i) is int and 0 <= i < len(kinds) for i in blocks):
        raise ArtifactError(f"{where}: blocks point outside kinds")
    try:
        read = [from_dict(BlockPlan, kind) for kind in kinds]
        paths = {key: data[key] for key in ("blocks_path", "attention")}
        plan = from_dict(Plan, {**paths, "blocks": [], **{end: data.get(end) for end in ends}})
    except SpecError as error:
        raise ArtifactError(f"{where}: {one_line(error)}") from error
    return replace(plan, blocks=tuple(read[i] for i in blocks))


def _grid_tensors(spec: QuantSpec | None) -> list[str]:
    """The tensors that a grid of activations, keys or values serves with."""
    return [] if spec is None else list(dict(empty(spec, 1).named_buffers()))


def stored_kinds(plan: Plan) -> dict[str, str]:
    """What a plan adds to a model, by tensor name: `packed`, `grids` (scales and zero points) or `transforms`."""
    kinds: dict[str, str] = {}
    for index, block in enumerate(plan.blocks):
        root = f"{plan.blocks_path}.{index}."
        for name, site in block.sites.items():
            for path in site.readers:
                kinds |= {f"{root}{path}.{part}": kind for part, kind in _reader_kinds(site).items()}
            if site.rank:
                kinds[f"{root}flatquant.{name}.down"] = "transforms"
            if site.shift == "online":
                kinds[f"{root}flatquant.{name}.shift"] = "transforms"
            for side in ("left", "right"):
                if getattr(site, side):
                    kinds[f"{root}flatquant.{name}.{side}"] = "transforms"
            kinds |= {f"{root}flatquant.{name}.activations.{n}": "transforms" for n in _grid_tensors(site.activations)}
        attention = f"{root}{plan.attention}.flatquant_kv."
        if block.qk:
            kinds |= {attention + "key_matrix": "transforms", attention + "query_matrix": "transforms"}
        if block.key_offset:
            kinds[attention + "key_offset"] = "transforms"
        for side in ("left", "right"):
            if block.latent and getattr(block.latent, side):
                kinds[attention + side] = "transforms"
        for name, spec in (("keys", block.keys), ("values", block.values)):
            kinds |= {f"{attention}{name}.{n}": "transforms" for n in _grid_tensors(spec)}
    for site in end_sites(plan):
        kinds |= {f"{site.readers[0]}.{part}": kind for part, kind in _reader_kinds(site).items()}
    return kinds


def end_sites(plan: Plan) -> list[SitePlan]:
    """Those outside blocks that store integers: of a rounded output layer, of a rounded embedding's own rows."""
    sites = [] if plan.head is None else [plan.head.site]
    return sites if plan.embedding is None or plan.embedding.shared else [*sites, plan.embedding.site]


def unquantised_bytes(sizes: Mapping[str, tuple[int, int]], plan: Plan) -> dict[str, int]:
    """Bytes of what a plan leaves as it was, by what it is; the largest first.

    `embeddings`, `output layer` (where it has a matrix of its own), `norms`, `biases`, a site's name for weights that
    the scheme leaves out, `others` (routers), and `other parts` of a wrapper (vision tower, projector).

    Args:
        sizes: (number of dimensions, bytes) of all stored tensors by name.
    """
    kinds = stored_kinds(plan)
    sites = {
        f"{plan.blocks_path}.{index}.{path}.weight": name
        for index, block in enumerate(plan.blocks)
        for name, site in block.sites.items()
        for path in site.readers
    }
    found: dict[str, int] = {}
    for name, (dimensions, nbytes) in sizes.items():
        if name not in kinds:
            kind = sites.get(name) or _role(name, dimensions, plan.blocks_path)
            found[kind] = found.get(kind, 0) + nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def rounded_ends(sizes: Mapping[str, int], plan: Plan) -> dict[str, dict[str, Any] | None]:
    """A rounded `output_layer` and a rounded `embedding`: `grids` as schemes have them, and `bytes`. None where one is
    not rounded. `tied`: the layer is a copy of embeddings that stay in 16 bit; `shared`: the embedding is the layer.

    Args:
        sizes: bytes of all stored tensors by name.
    """
    head, embedding = plan.head, plan.embedding
    found: dict[str, dict[str, Any] | None] = {"output_layer": None, "embedding": None}
    if head is not None:
        grids = str(HeadGrids(weights=head.weights, activations=head.site.activations))
        tied = head.tied and embedding is None
        found["output_layer"] = {"grids": grids, "bytes": _bytes_under(sizes, head.path), "tied": tied}
    if embedding is not None:
        grids, nbytes = plain_weights(embedding.weights), _bytes_under(sizes, embedding.path)
        found["embedding"] = {"grids": grids, "bytes": nbytes, "shared": embedding.shared}
    return found


def _bytes_under(sizes: Mapping[str, int], path: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(f"{path}."))


def _role(name: str, dimensions: int, blocks_path: str) -> str:
    """What a tensor is that no site holds."""
    base, root = blocks_path.rpartition(".")[0] + ".", blocks_path.partition(".")[0] + "."
    if name.startswith(root) and not name.startswith(base):
        return "other parts"
    if name.endswith(".bias"):
        return "biases"
    if dimensions == 1:
        return "norms"
    if not name.startswith(base):
        return "output layer"
    return "others" if name.startswith(blocks_path + ".") else "embeddings"


def left_in_16_bit(plan: Plan) -> list[str]:
    """What a scheme gives no grid: `weights`, or of some sites only `weights of mlp_mid`, `keys of block 0`."""
    found = []
    for part in ("weights", "activations"):
        at = [(index, name) for index, block in enumerate(plan.blocks) for name, site in block.sites.items()]
        bare = [place for place in at if getattr(plan.blocks[place[0]].sites[place[1]], part) is None]
        found += [] if not bare else [part] if len(bare) == len(at) else [f"{part} of {', '.join(_places(bare, at))}"]
    for part in ("keys", "values"):
        bare_blocks = [str(index) for index, block in enumerate(plan.blocks) if getattr(block, part) is None]
        if len(bare_blocks) == len(plan.blocks):
            found.append(part)
        elif bare_blocks:
            found.append(f"{part} of block{'s' if len(bare_blocks) > 1 else ''} {', '.join(bare_blocks)}")
    return found


def _places(some: list[tuple[int, str]], everywhere: list[tuple[int, str]]) -> list[str]:
    """Sites as a scheme names them: `mlp_mid` where it is meant in every block, else `0.mlp_mid`."""
    out = []
    for name in dict.fromkeys(name for _, name in some):
        blocks = [index for index, other in some if other == name]
        whole = len(blocks) == sum(other == name for _, other in everywhere)
        out += [name] if whole else [f"{index}.{name}" for index in blocks]
    return out


def _reader_kinds(site: SitePlan) -> dict[str, str]:
    """Of one reader's tensors, biases and dense weights left out."""
    if site.weights is None:
        return {}
    rows = 1 if site.codebook is None else math.lcm(site.codebook.length, site.codebook.outlier_length)
    try:
        layout = storage.layout(site.weights, site.codebook, rows, site.shape[0] * site.shape[1])
    except ValueError as error:
        raise ArtifactError(f"{CONFIG_FILE} is damaged: plan: {one_line(error)}") from error
    kinds: dict[str, str] = {name: part.kind for name, part in layout.items()}
    return {f"inner.{n}": kind for n, kind in kinds.items()} | {"up": "transforms"} if site.rank else kinds
