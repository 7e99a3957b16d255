"""Where a run writes: the output folder, its state beside it, and the lock on both."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flatquant import store
from flatquant.api.report import run_hash
from flatquant.api.result import Quantized
from flatquant.calibrate.state import RUN_FILE
from flatquant.errors import CalibrationError
from flatquant.runtime import artifact
from flatquant.runtime.folder import REPORT_FILE, Folder, read_json


@dataclass(frozen=True)
class Place:
    """The output folder and the run state beside it."""

    output: Path
    state: Path

    @classmethod
    def of(cls, output: Path) -> Place:
        return cls(output, state_folder(output))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away from the output folder and the state.

        Raises:
            CalibrationError: another run is at work there, or the state's folder cannot be made.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(store.held(self.state))
            except BlockingIOError as error:
                raise CalibrationError(
                    f"another run is writing {self.output} ({error.strerror}); wait for it, or choose another output"
                ) from error
            except OSError as error:
                raise CalibrationError(f"cannot make {self.state}: {error.strerror or error}") from error
            yield

    def check(self, resume: bool) -> None:
        """Before any work: another run is writing there, or one is there that `resume` was not asked to go on with."""
        if self.state.is_dir():
            with self.held():
                pass
        if resume:
            return
        artifact.check_output(self.output)
        if (self.state / RUN_FILE).exists():
            raise CalibrationError(
                f"an unfinished run is in {self.state}; go on with --resume, or delete that folder to start over"
            )

    def finished(self, identity: Mapping[str, Any]) -> Quantized | None:
        """What this very run has saved, if it was killed between saving and tidying up."""
        if not (self.output / REPORT_FILE).is_file():
            return None
        report = read_json(self.output / REPORT_FILE)
        if not isinstance(report, dict) or report.get("run") != run_hash(identity):
            return None
        return Quantized(Folder.open(self.output).plan, report, partial(artifact.load, self.output))

    def tidy(self) -> None:
        """Remove the state, and what killed runs of this output folder were writing."""
        shutil.rmtree(self.state, ignore_errors=True)
        output = self.output.resolve()
        leftover = re.compile(re.escape(output.name) + r"\.tmp-(\d+)-[0-9a-f]+")
        for path in output.parent.iterdir():
            if (match := leftover.fullmatch(path.name)) and not _alive(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def state_folder(output: Path) -> Path:
    """Where a run with this output folder keeps its state."""
    named = output if output.name not in ("", "..") else output.resolve()
    return named.with_name(f"{named.name}.partial")


def check_output(output: Path, *, resume: bool) -> None:
    """Whether a run may write a folder, before any work.

    Raises:
        ArtifactError: something is in the way.
        CalibrationError: another run is at work there, or an unfinished one is there and `resume` is not set.
    """
    Place.of(output).check(resume)


def discard(output: Path) -> None:
    """Remove what an unfinished run with this output folder has left.

    Raises:
        CalibrationError: it is still at work.
    """
    place = Place.of(output)
    with place.held():
        place.tidy()
