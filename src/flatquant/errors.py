"""Errors a user can act on.

Each message is one line that says what is wrong and what to do about it; a note (`add_note`) has what does not fit on
it. The command line prints the line, and notes below it, and exits with code 1; nothing else is caught there, so a
traceback always means a defect of ours.
"""


class FlatQuantError(Exception):
    """Base of every error that a user's input or machine can cause."""


class SpecError(FlatQuantError, ValueError):
    """A scheme, transform, fit setting or recipe that contradicts itself."""


class FamilyError(SpecError):
    """A method that does not go with this family of models."""


class ModelError(FlatQuantError):
    """A model that cannot be found, read or wired."""


class DataError(FlatQuantError):
    """Calibration or evaluation text that cannot be found, read or is too short."""


class CalibrationError(FlatQuantError):
    """Calibration that went wrong: NaN in a block, a state that does not belong to this run."""


class RankError(FlatQuantError):
    """A rank of a run over several devices that has ended before its time."""


class ArtifactError(FlatQuantError):
    """A quantised folder that is incomplete, damaged, of another format version, or in the way."""


class FitWarning(UserWarning):
    """A fit that ended worse than it began, and was undone."""


class StreamingWarning(UserWarning):
    """A model larger than the memory that cannot be streamed, and is loaded whole."""


class PositionsWarning(UserWarning):
    """A text that is longer than the model's positions."""


class QualityWarning(UserWarning):
    """A quantised model whose verdict is degraded or destroyed."""


def one_line(value: object) -> str:
    """A value as one short line, for messages: what a file says may be anything."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:200] + "..."


def first_line(error: BaseException) -> str:
    """An error's message as one line without its final stop."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:;") if lines else "") or type(error).__name__
