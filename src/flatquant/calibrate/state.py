"""What a run leaves behind after every block, so that a killed run can go on and end with the same bytes.

A state is a folder with one safetensors file per finished piece of work and a `run.json` that says which run it
belongs to. Files are complete or absent. One run at a time may use a state: whoever makes a `RunState` of a folder that
others could use holds it (`store.held`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatquant import store
from flatquant.errors import CalibrationError
from flatquant.modules import tensor_bytes

RUN_FILE = "run.json"


def fingerprint(module: nn.Module, read: Callable[[str], Tensor] | None = None) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's parameters and buffers.

    Args:
        read: gives tensors that are on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta and read is not None:
            tensor = read(name)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def recorded(folder: Path) -> dict[str, Any]:
    """What the run in a folder says it is; empty if there is none."""
    return _read_run(folder / RUN_FILE) if (folder / RUN_FILE).exists() else {}


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise CalibrationError(f"{path} is damaged; delete {path.parent} to start over")
    return found


def _unwritten(path: Path, error: Exception) -> CalibrationError:
    reason = getattr(error, "strerror", None) or error
    return CalibrationError(f"cannot write {path.name}: {reason}; free space and run again with --resume")


class RunState:
    """The folder of one run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or start a run.

        Args:
            folder: made if absent.
            identity: everything that decides the result (recipe, data, model, seed, ...), JSON-ready.
            resume: go on with what is there. Without it a folder that holds a run is refused.

        Raises:
            CalibrationError: a run is there and `resume` is not set, or it is another run.
        """
        self.folder = folder
        run_file = folder / RUN_FILE
        text = json.dumps(identity, indent=1, sort_keys=True)
        if run_file.exists():
            if not resume:
                raise CalibrationError(
                    f"an unfinished run is in {folder}; go on with --resume, or delete that folder to start over"
                )
            found = _read_run(run_file)
            differing = sorted(k for k in identity if found.get(k) != json.loads(text)[k])
            if differing:
                raise CalibrationError(
                    f"the unfinished run in {folder} differs in {', '.join(differing)}; "
                    "repeat it with its own settings, or delete that folder to start over"
                )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrationError(f"cannot make {folder}: {error.strerror or error}") from error
        try:
            store.write(run_file, text.encode())
        except OSError as error:
            raise _unwritten(run_file, error) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def names(self) -> list[str]:
        """All finished pieces of work."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def has(self, name: str) -> bool:
        """Whether a piece of work is finished."""
        return self._path(name).exists()

    def save(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Keep a finished piece of work, atomically, with a JSON note."""
        path = self._path(name)
        stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            with store.replacing(path) as temporary:
                save_file(stored, temporary, metadata={"note": json.dumps(note)})
        except (OSError, SafetensorError) as error:
            raise _unwritten(path, error) from error

    def tensor(self, name: str, key: str) -> Tensor:
        """One tensor of a finished piece of work, in memory of its own."""
        with self._opened(name) as f:
            return f.get_tensor(key).clone()

    def load(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """A finished piece of work and its note."""
        with self._opened(name) as f:
            return load_file(self._path(name)), json.loads((f.metadata() or {}).get("note", "null"))

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self._path(name)
        try:
            with safe_open(path, "pt") as f:
                yield f
        except Exception as error:
            raise CalibrationError(f"{path} is damaged ({error}); delete it and run again with --resume") from error
