"""Damaged folders, by the thousand: a clear error or the very same model; never a crash, a hang or a wrong model.

Two kinds of damage. *Accidents* change bytes and leave the hashes as they are: whatever still loads must be the model
that was saved. *Forgeries* make all hashes right again: they may describe another model, but nothing else may come of
them than that model or an `ArtifactError`, in little time and memory.

A case is made from one number, which a failure prints. `FLATQUANT_FUZZ=10000` runs so many cases of each test; by
default there are few.
"""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import flatquant
from flatquant import spec
from flatquant.errors import ArtifactError, FlatQuantError, ModelError, SpecError
from flatquant.models import load_model
from flatquant.recipes import rtn
from flatquant.runtime.artifact import inspect, load, save
from flatquant.runtime.folder import content_hash
from flatquant.spec import Recipe, Scheme, from_dict
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

CASES = int(os.environ.get("FLATQUANT_FUZZ", "0"))
SEEDS = st.integers(0, 2**64 - 1)
SECONDS, KIB = 10.0, 300_000  # that one case may take

if CASES:
    pytestmark = pytest.mark.timeout(0)  # cases have limits of their own; so many take as long as they take


def few(n: int) -> settings:
    return settings(
        max_examples=CASES or n,
        deadline=None,
        derandomize=not CASES,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
        database=None,
    )


class Place(dict[str, Any]):
    """A folder, its files and what its model computes; a failure names it, and does not print it."""

    def __repr__(self) -> str:
        return f"<{self['path']}>"


@pytest.fixture(scope="module")
def place(quantised, tmp_path_factory) -> Place:
    """A folder to damage, its original bytes, and what its model computes."""
    q = quantised("w4a4kv4")
    path = tmp_path_factory.mktemp("fuzz") / "model"
    save(
        q.model,
        q.plan,
        path,
        recipe=spec.to_dict(q.recipe),
        report={"losses": [1.0]},
        tokenizer=tiny_tokenizer(),
        max_shard_bytes=15_000,
    )
    with torch.no_grad():
        return Place(path=path, files=contents(path), tokens=q.tokens, logits=q.model(q.tokens).logits)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def restore(place: Place) -> Path:
    path: Path = place["path"]
    for file in path.parent.rglob("*"):
        if file.is_file() and not (file.parent == path and file.name in place["files"]):
            file.unlink()
    for name, data in place["files"].items():
        if not (path / name).is_file() or (path / name).read_bytes() != data:
            (path / name).write_bytes(data)
    return path


def tried(read: Callable[[Path], Any], path: Path, *, expected: type[FlatQuantError] = ArtifactError) -> Any:
    """What `read` returns, or None after an error of ours, of one line; in little time and memory."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return read(path)
    except expected as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return None
    finally:
        assert time.perf_counter() - start < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIB


def forge(path: Path) -> None:
    """Make the hashes right, as far as there is something to hash."""
    try:
        config = json.loads((path / "config.json").read_text())
        listed = config["quantization_config"]["files"]
        for name in listed:
            if isinstance(name, str) and (path / name).is_file():
                listed[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        config["quantization_config"]["content_hash"] = content_hash(config)
        (path / "config.json").write_text(json.dumps(config))
    except (ValueError, KeyError, TypeError, OSError, AttributeError):
        pass


# --------------------------------------------------------------------------------------------- accidents


def accident(rng: random.Random, data: bytes) -> bytes:
    """A change of a file's bytes."""
    at, size, extra = rng.randrange(len(data)), rng.randrange(1, 65), rng.randbytes(rng.randrange(1, 65))
    match rng.choice(["flip", "flip", "cut", "grow", "zero", "insert", "swap"]):
        case "flip":
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "grow":
            return data + extra
        case "zero":
            return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
        case "insert":
            return data[:at] + extra + data[at:]
        case _:
            return data[:at] + data[at : at + size][::-1] + data[at + size :]


@few(60)
@given(seed=SEEDS)
def test_accidents_are_noticed_or_harmless(place, seed: int) -> None:
    rng = random.Random(seed)
    path = restore(place)
    names = sorted(set(place["files"]) - {"README.md"})
    for name in rng.sample(names, rng.randrange(1, 3)):
        (path / name).write_bytes(accident(rng, place["files"][name]))
    model = tried(load, path)
    tried(inspect, path)
    if model is not None:
        with torch.no_grad():
            assert torch.equal(model(place["tokens"]).logits, place["logits"])


@few(10)
@given(seed=SEEDS)
def test_accidents_are_noticed_by_transformers_too(place, seed: int) -> None:
    """Of the tensors and our part of the config; what transformers itself reads first is its own affair."""
    rng = random.Random(seed)
    path = restore(place)
    name = rng.choice([n for n in place["files"] if "safetensors" in n])
    (path / name).write_bytes(accident(rng, place["files"][name]))
    if (path / name).read_bytes() != place["files"][name]:
        with pytest.raises((ArtifactError, OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(path)


# --------------------------------------------------------------------------------------------- forgeries

NUMBERS = [0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**18), 0.5, 1e308]
NUMBERS += [math.nan, math.inf, -math.inf]
NAMES = ["../x", "/etc/passwd", "a/../../x", "..", "", ".", "C:\\x", "x\n", "\x00", "~", "x\x00.bin", "a" * 5000]


def text(rng: random.Random) -> str:
    """A short string of any characters, or a name that means harm."""
    highest = rng.choice([0x7F, 0xD800])
    return rng.choice([*NAMES, "".join(chr(rng.randrange(0x20, highest)) for _ in range(rng.randrange(8)))])


def junk(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 5:
        return [None, rng.random() < 0.5, text(rng)][kind - 2]
    if kind < 6:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng): junk(rng, depth - 1) for _ in range(rng.randrange(4))}


def places(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """Paths of all entries of a JSON value."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [p for key, value in items for p in [(*prefix, key), *places(value, (*prefix, key))]]
    return []


def edit(rng: random.Random, tree: Any) -> None:
    """Replace, remove, add or copy an entry somewhere."""
    if not places(tree):
        return
    *path, last = rng.choice(places(tree))
    at = tree
    for key in path:
        at = at[key]
    match rng.choice(["replace", "replace", "replace", "remove", "add", "copy"]):
        case "replace":
            at[last] = junk(rng)
        case "remove":
            del at[last]
        case "copy":
            other = tree
            for key in rng.choice(places(tree)):
                other = other[key]
            at[last] = json.loads(json.dumps(other))
        case _ if isinstance(at, dict):
            at[text(rng)] = junk(rng)
        case _:
            at.append(junk(rng))


@few(150)
@given(seed=SEEDS)
def test_forged_configs(place, seed: int) -> None:
    rng = random.Random(seed)
    path = restore(place)
    config = json.loads(place["files"]["config.json"])
    part = rng.choice(["model", "quantization", "plan", "recipe", "files"])
    quantisation = config["quantization_config"]
    tree = {"model": config, "quantization": quantisation}.get(part) or quantisation[part]
    for _ in range(rng.randrange(1, 4)):
        edit(rng, tree)
    (path / "config.json").write_text(json.dumps(config))
    forge(path)
    model = tried(load, path)
    tried(inspect, path)
    if model is not None:  # then it is one that computes
        with torch.no_grad():
            model(place["tokens"][:1, :4])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Place:
    """`place`, of a mixture of experts."""
    model, tokens = tiny_family("mixtral"), torch.arange(8)[None]
    result = flatquant.quantize(model, rtn("w4a4kv4"), device="cpu")
    path = tmp_path_factory.mktemp("mixture") / "model"
    save(result.model, result.plan, path, recipe={}, report={}, scheme="w4a4kv4")
    return Place(path=path, files=contents(path), tokens=tokens)


@few(40)
@given(seed=SEEDS)
def test_forged_configs_of_a_mixture(mixture, seed: int) -> None:
    rng = random.Random(seed)
    path = restore(mixture)
    config = json.loads(mixture["files"]["config.json"])
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.5:
            key = rng.choice([k for k in config if "expert" in k or "router" in k or k == "hidden_act"])
            config[key] = junk(rng)
        else:
            edit(rng, config["quantization_config"]["plan"])
    (path / "config.json").write_text(json.dumps(config))
    forge(path)
    model = tried(load, path)
    tried(inspect, path)
    if model is not None:
        with torch.no_grad():
            model(mixture["tokens"])


@few(100)
@given(seed=SEEDS)
def test_forged_tensors(place, seed: int) -> None:
    """Edits of a shard's header: names, shapes, types and offsets."""
    rng = random.Random(seed)
    path = restore(place)
    shard = rng.choice(sorted(p.name for p in path.glob("*.safetensors")))
    old = place["files"][shard]
    (size,) = struct.unpack("<Q", old[:8])
    header = json.loads(old[8 : 8 + size])
    header.pop("__metadata__", None)
    for _ in range(rng.randrange(1, 3)):
        if not header:
            break
        name = rng.choice(sorted(header))
        match rng.choice(["dtype", "shape", "offsets", "rename", "remove", "reshape", "edit"]):
            case "dtype":
                header[name]["dtype"] = rng.choice(["U8", "I8", "F16", "BF16", "F64", "BOOL", "F4", ""])
            case "shape":
                header[name]["shape"] = [rng.choice(NUMBERS[:14]) for _ in range(rng.randrange(4))]
            case "reshape":
                header[name]["shape"] = [math.prod(header[name]["shape"])]
            case "offsets":
                header[name]["data_offsets"] = rng.choices([0, 8, 64, 10**4, 2**64], k=rng.choice([2, 2, 3]))
            case "rename":
                header[text(rng)] = header.pop(name)
            case "remove":
                del header[name]
            case _:
                edit(rng, header[name])
                break  # it may be of any form now
    raw = json.dumps(header).encode()
    length = rng.choice([len(raw)] * 6 + [0, 2**40, 2**63 + 1, len(raw) - 1])
    (path / shard).write_bytes(struct.pack("<Q", length) + raw + old[8 + size :])
    index = json.loads(place["files"]["flatquant.safetensors.index.json"])
    if rng.random() < 0.5:
        kept = {k: v for k, v in index["weight_map"].items() if v != shard}
        index["weight_map"] = {**kept, **dict.fromkeys(header, shard)}
        (path / "flatquant.safetensors.index.json").write_text(json.dumps(index))
    forge(path)
    model = tried(load, path)
    tried(inspect, path)
    if model is not None:
        with torch.no_grad():
            model(place["tokens"][:1, :4])


@few(25)
@given(seed=SEEDS)
def test_forged_values(place, seed: int) -> None:
    """Any numbers in place of the tensors': NaN scales, say. It may compute nonsense, not crash."""
    rng = random.Random(seed)
    path = restore(place)
    shard = rng.choice(sorted(p.name for p in path.glob("*.safetensors")))
    old = place["files"][shard]
    start = 8 + struct.unpack("<Q", old[:8])[0]
    at, values = rng.randrange(start, len(old)), rng.randbytes(rng.randrange(1, 65))
    new = old[:at] + values + old[at + len(values) :]
    (path / shard).write_bytes(new[: len(old)])
    forge(path)
    model = tried(load, path)
    assert model is not None
    with torch.no_grad():
        assert model(place["tokens"][:1, :4]).logits.shape == (1, 4, 128)


# --------------------------------------------------------------------------------------------- what is no folder


@few(60)
@given(seed=SEEDS)
def test_any_json_is_a_recipe_or_an_error(place, seed: int) -> None:
    rng = random.Random(seed)
    recipe = json.loads(place["files"]["config.json"])["quantization_config"]["recipe"]
    for _ in range(rng.randrange(1, 4)):
        edit(rng, recipe)
    try:
        again = from_dict(Recipe, recipe)
    except SpecError as error:
        assert error.args[0]  # noqa: PT017
    else:
        assert from_dict(Recipe, spec.to_dict(again)) == again


@few(100)
@given(
    text=st.text(max_size=20)
    | st.from_regex(r"(w[0-9]{1,3})?(g[0-9]{1,5})?(a[0-9]{1,3})?(kv?[0-9]{1,3})?(,[a-z_.]+=w?[0-9]+)*", fullmatch=True)
)
def test_any_text_is_a_scheme_or_an_error(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except SpecError as error:
        assert error.args[0]  # noqa: PT017
    else:
        assert str(Scheme.parse(str(scheme))) == str(scheme)


@few(15)
@given(seed=SEEDS)
def test_original_models_too(tmp_path_factory, seed: int) -> None:
    """A folder of anybody's, as `quantize` reads it."""
    rng = random.Random(seed)
    path: Path = tmp_path_factory.mktemp("plain")
    tiny_llama(layers=1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    if rng.random() < 0.5:
        config = json.loads((path / "config.json").read_text())
        edit(rng, config)
        (path / "config.json").write_text(json.dumps(config))
    else:
        name = rng.choice(["config.json", "model.safetensors", "tokenizer.json"])
        (path / name).write_bytes(accident(rng, (path / name).read_bytes()))
    tried(load_model, path, expected=ModelError)
    shutil.rmtree(path)
