"""Texts by their names: WikiText-2 and C4, a file, a folder of files. `flatquant.data` says what is read of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatquant.errors import DataError, first_line

_SUFFIXES = (".txt", ".raw", ".jsonl")
_LOCAL = {
    ("wikitext2", "calibration"): "wikitext-2-raw/wiki.valid.raw",
    ("wikitext2", "evaluation"): "wikitext-2-raw/wiki.test.raw",
    ("c4", "calibration"): "c4/c4-en-sample.jsonl",
    ("c4", "evaluation"): "c4/c4-en-sample.jsonl",
}
_C4_EVALUATION_DOCUMENTS = 1100
_C4_CALIBRATION_DOCUMENTS = 20_000  # few of them are as long as a window
C4_JOINED_DOCUMENTS = 5000


def calibration_pieces(source: str) -> list[str]:
    """Lines or documents."""
    file = file_of(source, "calibration")
    if file is None and source == "wikitext2":
        return _wikitext("train")
    if file is None:  # the documents after those that evaluation reads
        return _c4(_C4_EVALUATION_DOCUMENTS, _C4_EVALUATION_DOCUMENTS + _C4_CALIBRATION_DOCUMENTS)
    if source == "c4":
        documents = _documents(file)
        return documents[_evaluated(documents) :]
    return [piece for path in files_at(file) for piece in _documents(path)]


def evaluation_text(source: str | Path) -> str:
    """What a perplexity is measured on, as one text."""
    file = file_of(source, "evaluation")
    if file is None:
        return _join_rows(_wikitext("test")) if source == "wikitext2" else " ".join(_c4(0, _C4_EVALUATION_DOCUMENTS))
    if source == "c4":
        documents = _documents(file)
        return " ".join(documents[: _evaluated(documents)])
    return "\n\n".join(_joined(path) for path in files_at(file))


def _evaluated(documents: Sequence[str]) -> int:
    """How many documents of a C4 file are for evaluation: as published, and half of a file that is shorter."""
    return min(_C4_EVALUATION_DOCUMENTS, -(-len(documents) // 2))


def _joined(path: Path) -> str:
    return " ".join(_documents(path)) if path.suffix == ".jsonl" else _join_rows(_documents(path))


def _join_rows(rows: Sequence[str]) -> str:
    return "\n\n".join(row if row.strip() else "" for row in rows)


def file_of(source: str | Path, use: str) -> Path | None:
    """The local file or folder of a source; None: it has to be downloaded."""
    relative = _LOCAL.get((str(source), use))
    if relative is None:
        path = Path(source).expanduser()
        if not path.exists():
            own = "" if use == "evaluation" else " self,"
            raise DataError(f"no such text: {source}; give wikitext2, c4,{own} or a .txt, .raw or .jsonl file")
        return path
    root = os.environ.get("FLATQUANT_DATA")
    if not root:
        return None
    path = Path(root).expanduser() / relative
    if not path.is_file():
        raise DataError(f"FLATQUANT_DATA has no {relative} (looked for {path}); put it there, or unset FLATQUANT_DATA")
    return path


def files_at(path: Path) -> list[Path]:
    """A text file, or those of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} holds no .txt, .raw or .jsonl file")
        return files
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is of an unknown kind; give a .txt, .raw or .jsonl file")
    return [path]


def _documents(path: Path) -> list[str]:
    """Lines with their newlines of a text file; the `text` fields of a .jsonl file."""
    try:
        with path.open(encoding="utf-8-sig") as stream:  # some editors write a byte order mark, which is no text
            lines = list(stream)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}; it must be UTF-8 text") from error
    if path.suffix != ".jsonl":
        return lines
    documents: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object with a field 'text'") from error
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: the field 'text' is not a string")
        documents.append(text)
    return documents


def _wikitext(split: str) -> list[str]:
    return _download("wikitext2", "Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)


def _c4(first: int, last: int) -> list[str]:
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    return _download("c4", "allenai/c4", data_files=files, split=f"validation[{first}:{last}]")


def datasets_for(source: str) -> Any:
    """The `datasets` library, without which a source cannot be fetched."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise DataError(
            f"downloading {source} needs the datasets package: pip install datasets; or set FLATQUANT_DATA to a folder "
            "that has the text, or calibrate with --calibration self"
        ) from error
    return datasets


def _download(source: str, path: str, **arguments: object) -> list[str]:
    datasets = datasets_for(source)
    try:
        return list(datasets.load_dataset(path, **arguments)["text"])  # pyright: ignore
    except Exception as error:  # datasets, the hub client and the network each raise types of their own
        raise DataError(
            f"cannot download {source} ({first_line(error)}); set FLATQUANT_DATA to a folder that has the text, or "
            "calibrate with --calibration self"
        ) from error
