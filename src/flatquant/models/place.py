"""From what a user calls a model to where it lies."""

import hashlib
import re
from pathlib import Path

from flatquant.errors import ModelError, first_line
from flatquant.models.folder import check_folder, near
from flatquant.models.gguf import ALIASES, converted, smollm2_file

_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def resolve(name: str | Path) -> Path | str:
    """The folder that `name` is loaded from: a local one as a Path, a hub id as the str it is.

    A GGUF, or an alias of one, is converted on the first call and found in the cache on later ones.

    Raises:
        ModelError: a path that does not exist, an alias whose package is missing, or a file that is not a GGUF.
    """
    if name in ALIASES:
        return converted(smollm2_file())
    found = _placed(name)
    return converted(found) if isinstance(found, Path) and found.is_file() else found


def check(name: str | Path) -> None:
    """What can be said of a model at once: nothing is loaded, converted or fetched.

    Raises:
        ModelError: as `resolve`; or the folder cannot be a model's that is to be quantised.
    """
    if name in ALIASES:
        smollm2_file()
        return
    found = _placed(name)
    if isinstance(found, Path) and found.is_dir():
        check_folder(found)


def _placed(name: str | Path) -> Path | str:
    """The folder or GGUF file that a name means, or the hub id."""
    text = str(name)
    if not text.strip():
        raise ModelError("the model's name is empty; give a folder, a .gguf file or a hub id")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {path}; check the path")
        return path
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file; give a model folder, a .gguf file or a hub id")
    if isinstance(name, Path) or path.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"no such model folder: {text}{near(path)}; give a folder, a .gguf file or a hub id")
    return text


def identity(name: str | Path) -> str:
    """What tells a model from others: a hub id as it is, else the sha256 of a folder's config and weights.

    Raises:
        ModelError: as `resolve`; or a file cannot be read.
    """
    folder = resolve(name)
    if isinstance(folder, str):
        return folder
    digest = hashlib.sha256()
    try:
        for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
            with file.open("rb") as stream:
                digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {first_line(error)}") from error
    return digest.hexdigest()
