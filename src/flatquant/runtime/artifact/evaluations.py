"""Results of evaluations, kept in the folder of the model that they are of, and its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatquant import store
from flatquant.errors import ArtifactError
from flatquant.runtime.card import model_card, updated
from flatquant.runtime.folder import (
    CARD_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    REPORT_FILE,
    Folder,
    json_bytes,
    read_json,
)

_AGAINST_ORIGINAL = ("original", "divergence")  # results that depend on which model is the original
_EVALUATION_WAIT = 30.0  # seconds, for another process to end its writing


def keep_evaluation(path: Path, result: Mapping[str, Any]) -> bool:
    """Add what was measured to a folder's `flatquant_evaluation.json`, and to its card.

    Other processes may do so at the same time, and any of them may be killed: nothing that was kept is lost.

    Args:
        result: with `original.sha256` where it depends on the original: see `facing`.

    Returns:
        Whether the card has a place for it; one that its owner wrote anew is left alone.

    Raises:
        ArtifactError: the folder is not ours, or cannot be written.
    """
    folder = Folder.open(path)
    file = folder.path / EVALUATION_FILE
    try:
        with store.held(folder.path, wait=_EVALUATION_WAIT):
            kept = facing(read_evaluation(folder.path), result.get("original", {}).get("sha256"))
            store.write(file, json_bytes(merged(kept, result)))
            return write_card(folder.path)
    except OSError as error:
        raise ArtifactError(f"cannot write {file}: {error.strerror or error}") from error


def read_evaluation(folder: Path) -> dict[str, Any]:
    """`flatquant_evaluation.json`; empty if there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    file = folder / EVALUATION_FILE
    kept = read_json(file) if file.is_file() else {}
    if not isinstance(kept, dict):
        raise ArtifactError(f"{file} is damaged: not a JSON object; delete it, and evaluate again")
    return kept


def facing(kept: Mapping[str, Any], original: str | None) -> dict[str, Any]:
    """What is kept, seen from one original: results against others are put under `others`, its own taken from there.

    Args:
        original: its identity (`models.identity`), which stands in `original.sha256`; None changes nothing.
    """
    current = kept.get("original", {}).get("sha256")
    if original is None or current == original:
        return dict(kept)
    own = {k: v for k, v in kept.items() if k not in _AGAINST_ORIGINAL and k != "others"}
    others = dict(kept.get("others", {}))
    if against := {k: kept[k] for k in _AGAINST_ORIGINAL if k in kept}:
        others[current or "unknown"] = against
    own |= others.pop(original, {})
    return own | ({"others": others} if others else {})


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, entry by entry; the new one wins."""
    both = {**old, **new}
    return {
        k: merged(old[k], new[k]) if isinstance(old.get(k), Mapping) and isinstance(new.get(k), Mapping) else v
        for k, v in both.items()
    }


def write_card(folder: Path, owned: Path | None = None) -> bool:
    """Write README.md from the folder's own JSON files: the sections that are ours if it exists, else all of it.

    Args:
        owned: a card to go on from, where the folder has none.

    Returns:
        False: the card has no place for our sections, and is as it was.

    Raises:
        ArtifactError: one of the JSON files is damaged.
    """
    config, report = (read_json(folder / name) for name in (CONFIG_FILE, REPORT_FILE))
    new = card = model_card(config, report, read_evaluation(folder))
    for place in (folder / CARD_FILE, owned):
        if place is not None and place.is_file():
            data = place.read_bytes()  # bytes: the ends of its lines stay what they are
            card = updated(data.decode("utf-8", errors="surrogateescape"), new)
            store.write(folder / CARD_FILE, data if card is None else card.encode("utf-8", errors="surrogateescape"))
            return card is not None
    store.write(folder / CARD_FILE, new.encode())
    return True
