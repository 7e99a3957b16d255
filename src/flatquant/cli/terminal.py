"""What all commands share: errors as one line, tables, JSON, devices and dtypes by name."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from flatquant.errors import FitWarning, FlatQuantError, PositionsWarning, RankError, SpecError, StreamingWarning

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@contextmanager
def errors(interrupted: str = "interrupted") -> Iterator[None]:
    """One line on stderr for whatever the user can act on, and for what is only to be known."""
    try:
        with _warnings():
            yield
    except FlatQuantError as error:
        if (ranks := _ranks()) is not None and isinstance(error, RankError):
            ranks.await_end()
        raise failure(str(error), 1, getattr(error, "__notes__", ())) from error
    except ExceptionGroup as group:
        if group.split(FlatQuantError)[1] is not None:
            raise
        raise [failure(str(error), 1, getattr(error, "__notes__", ())) for error in group.exceptions][-1] from group
    except KeyboardInterrupt as error:
        raise failure(interrupted, 130) from error
    except Exception as error:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            message = (
                "the device is out of memory; try --max-memory with less than it has, a smaller --seqlen, or another"
            )
            raise failure(message, 1) from error
        if _ranks() is not None:
            failure(f"{type(error).__name__}: {error}", 1)
        raise


def _ranks() -> ModuleType | None:
    """`flatquant.distributed` in a process that torchrun has started beside others."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from flatquant import distributed

    return distributed if distributed.launched() else None


@contextmanager
def _warnings() -> Iterator[None]:
    """Our own warnings as lines on stderr, each once."""
    told: set[str] = set()
    with warnings.catch_warnings():
        ours = (PositionsWarning, FitWarning, StreamingWarning)
        for kind in ours:
            warnings.simplefilter("always", kind)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, ours):
                others(message, category, *where)
            elif str(message) not in told:
                told.add(str(message))
                typer.echo(f"warning: {message}", err=True)

        warnings.showwarning = show
        yield


class Mistakes:
    """Checks that are all made, so that a user hears of every mistake at once."""

    def __init__(self) -> None:
        self.found: list[FlatQuantError] = []

    def __call__(self, check: Callable[..., T], *args: Any) -> T | None:
        try:
            return check(*args)
        except FlatQuantError as error:
            self.found.append(error)
            return None

    def tell(self) -> None:
        """Raise what was found."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ExceptionGroup("several mistakes", self.found)


def failure(message: str, code: int, notes: Iterable[str] = ()) -> typer.Exit:
    """Say what went wrong: of several ranks, the first that asks says it, and its number."""
    rank = ""
    if (ranks := _ranks()) is not None:
        if not ranks.speaks():
            return typer.Exit(code)
        rank = f"rank {ranks.rank()}: "
    typer.echo(f"error: {rank}{' '.join(message.split())}", err=True)
    for note in notes:
        typer.echo(note, err=True)
    return typer.Exit(code)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def say(*parts: Any) -> None:
    Console(highlight=False, soft_wrap=True).print(*parts, markup=False)


def print_table(title: str | None, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def write_json(file: str, data: Any) -> None:
    """JSON into a file; `-` is stdout."""
    if file == "-":
        print_json(data)
        return
    try:
        Path(file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FlatQuantError(f"cannot write {file}: {error.strerror or error}") from error


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name is not None and name not in known:
        raise SpecError(f"unknown dtype {name!r}; known: {', '.join(known)}")
    return None if name is None else known[name]


def device_of(name: str | None) -> torch.device:
    import torch

    from flatquant.models import find_device

    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for whatever asks for the current device's stream, in other libraries too
    return device


@contextmanager
def divided(devices: int | None, device: torch.device) -> Iterator[bool]:
    """Run the body on the ranks that torchrun has started, or else on `devices` of this host.

    Gives whether this is the first rank, which writes and speaks. The command that has started the ranks waits for
    them, and exits as they do.
    """
    from flatquant import distributed

    if devices is not None and devices > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(devices, "flatquant", sys.argv[1:]))
    with distributed.joined(device):
        yield distributed.leads()


def check_devices(devices: int | None, device: torch.device | None) -> None:
    """Whether there are so many ranks, or so many GPUs for them.

    Raises:
        SpecError: there are not.
    """
    import torch

    from flatquant import distributed

    if devices is None:
        return
    if distributed.launched():
        if devices != distributed.local_size():
            raise SpecError(f"--devices {devices}, and torchrun has started {distributed.local_size()} processes here")
    elif device is not None and device.type == "cuda" and devices > torch.cuda.device_count():
        raise SpecError(f"--devices {devices}: this host has {torch.cuda.device_count()} GPUs")
