"""Text in, windows of tokens out: for calibration at random places, for evaluation one after the other.

The rules are those behind every published figure, because a perplexity means nothing without them:

* WikiText-2 evaluation: each row keeps its newline, a blank row becomes the empty string, rows are joined with a blank
  line, the whole is tokenised once without special tokens and cut into windows that do not overlap.
* C4 evaluation: documents are joined with spaces; 1,100 of them, at most 256 windows.
* Calibration on WikiText-2 and on files: non-empty lines (documents of a .jsonl file), stripped, joined with a blank
  line; windows begin at random. A line of WikiText-2 is a paragraph, so that joined lines are the articles again.
* Calibration on C4: every window lies inside one document, drawn at random among those of at least `seqlen` tokens, as
  in GPTQ's code and all that took it over (QuaRot, SpinQuant, FlatQuant). Documents of C4 have nothing to do with one
  another, and a window of four of them teaches attention to ignore what came before. Here no document is drawn twice.
  Where fewer documents than windows are long enough, they are joined as those of a file are; the report says which.
  The documents that evaluation reads are left out: of a file in FLATQUANT_DATA, the first 1,100 or half of them.

Several texts make a mixture (`flatquant.mixture`): each is drawn by its own rule with the same seed, as if it were
alone. A text is looked for in the folder that the environment variable FLATQUANT_DATA names, else fetched with the
`datasets` library. `self` needs neither: the model writes it (`flatquant.writing`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant import writing
from flatquant.errors import DataError
from flatquant.mixture import SELF, Mixture, interleaved
from flatquant.texts import C4_JOINED_DOCUMENTS, calibration_pieces, datasets_for, evaluation_text, file_of, files_at

Progress = Callable[[int, int], None]

_C4_WINDOWS = 256
_SHORTEST_KEPT = 64  # tokens of a window that is kept back, where calibration takes longer ones

# How windows of a text are cut.
INSIDE, ACROSS, WRITTEN = "inside documents", "across documents", "written by the model"


@dataclass(frozen=True)
class Part:
    """Windows of one text: int64 `tokens` (n, seqlen), and `kept` back (k, at most seqlen) or None without room."""

    tokens: torch.Tensor
    kept: torch.Tensor | None
    cut: str  # `INSIDE`, `ACROSS` or `WRITTEN`


def calibration_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> torch.LongTensor:
    """Windows of text to calibrate on.

    Args:
        source: `wikitext2`, `c4`, `self` (the model writes it), a .txt, .raw or .jsonl file (field `text`), or a
            folder of such files; or several with their shares of the windows, `wikitext2:1,c4:3,self:1,FILE`.
        tokenizer: of the model; no special tokens are added.
        samples: number of windows.
        seqlen: tokens in a window.
        seed: the same seed draws the same windows. The global random state is left alone.
        model: for `self` only.
        progress: called with (tokens written, tokens to write); `self` only, as nothing else takes long.

    Returns:
        int64 token ids on the CPU, (samples, seqlen).

    Raises:
        DataError: a text that is missing, unreachable, unreadable or shorter than one window; a mixture that is none,
            or of more texts than windows.
    """
    return calibration_windows(
        source, tokenizer, samples=samples, seqlen=seqlen, seed=seed, model=model, progress=progress
    )[0]


def calibration_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    kept: int = 0,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> tuple[torch.LongTensor, torch.LongTensor | None]:
    """Windows to calibrate on, and windows of the same text that are kept back to measure the result on.

    Args:
        kept: windows to keep back. They overlap no calibration window. Where a text has no room for windows of
            `seqlen` tokens, they are shorter.

    Other arguments and errors are those of `calibration_tokens`. `kept` does not change the windows that are drawn from
    a text; the texts that a model writes for `self` are drawn together.

    Returns:
        What `calibration_tokens` returns, and int64 (kept, at most seqlen), or None if no window is left.
    """
    mixture = Mixture.parse(source)
    parts = read_parts(mixture, tokenizer, samples=samples, seqlen=seqlen, seed=seed, kept=kept)
    if mixture.writes:
        if model is None:
            raise DataError("calibration text 'self' is written by the model, and none was given; pass model=")
        own = written_part(
            mixture, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed, kept=kept, progress=progress
        )
        parts = [part or own for part in parts]
    return joined(cast(list[Part], parts))


def read_parts(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int, kept: int
) -> list[Part | None]:
    """The share of each text in `samples` and `kept` windows; None for `self`, which is not read but written.

    Raises:
        DataError: as `calibration_tokens`.
    """
    _check_sizes(samples=samples, seqlen=seqlen)
    _check_apart(mixture)
    shares = zip(mixture.sources, mixture.divided(samples), _kept_shares(mixture, kept), strict=True)
    return [
        None if source.text == SELF else _read(source.text, tokenizer, count, seqlen, seed, back)
        for source, count, back in shares
    ]


def written_part(
    mixture: Mixture,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    kept: int,
    progress: Progress | None = None,
) -> Part:
    """What the model writes of a mixture: the share of `self` in `samples` and `kept` windows."""
    count = mixture.written(samples)
    index = [source.text for source in mixture.sources].index(SELF)
    back = _kept_shares(mixture, kept)[index]
    both = writing.write(model, tokenizer, samples=count + back, seqlen=seqlen, seed=seed, progress=progress)
    return Part(both[:count], both[count:] if back else None, WRITTEN)


def joined(parts: Sequence[Part]) -> tuple[torch.LongTensor, torch.LongTensor | None]:
    """The windows of several texts as one batch, each text spread evenly over it, and those kept back likewise.

    The latter are cut to the length of the shortest; None where a text has none.
    """
    tokens = _interleaved([part.tokens for part in parts])
    kept = [part.kept for part in parts if part.kept is not None]
    if len(kept) < len(parts):
        return tokens, None
    length = min(windows.shape[1] for windows in kept)
    return tokens, _interleaved([windows[:, :length] for windows in kept])


def _interleaved(windows: Sequence[torch.Tensor]) -> torch.LongTensor:
    order = interleaved([len(part) for part in windows])
    return cast(torch.LongTensor, torch.stack([windows[source][i] for source, i in order]))


def _kept_shares(mixture: Mixture, kept: int) -> tuple[int, ...]:
    return mixture.divided(kept) if kept else (0,) * len(mixture.sources)


def _read(source: str, tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int, kept: int) -> Part:
    """Windows of a text that is not written by the model."""
    generator = torch.Generator().manual_seed(seed)
    pieces = calibration_pieces(source)
    if source == "c4":
        windows, rest = _inside(pieces, tokenizer, samples, seqlen, generator)
        if windows is not None:
            return Part(windows, _kept_documents(rest, tokenizer, seqlen, kept, generator), INSIDE)
        pieces = pieces[:C4_JOINED_DOCUMENTS]
    tokens = _tokenize(tokenizer, "\n\n".join(piece.strip() for piece in pieces if piece.strip()))  # (tokens,)
    _check_length(tokens, seqlen, source)
    starts = torch.randint(len(tokens) - seqlen + 1, (samples,), generator=generator)  # (samples,)
    windows = tokens[starts[:, None] + torch.arange(seqlen)]  # (samples, seqlen)
    return Part(windows, _kept_back(tokens, starts, seqlen, kept, generator), ACROSS)


def _inside(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int, generator: torch.Generator
) -> tuple[torch.Tensor | None, list[str]]:
    """A window at random inside each of `count` documents drawn at random, and the documents that were not drawn.

    None where fewer documents have `seqlen` tokens.
    """
    found: dict[int, torch.Tensor] = {}
    for index in torch.randperm(len(documents), generator=generator).tolist():
        text = documents[index].strip()
        if len(text.encode()) < seqlen:  # a token is at least a byte
            continue
        tokens = _tokenize(tokenizer, text)
        if len(tokens) >= seqlen:
            start = int(torch.randint(len(tokens) - seqlen + 1, (1,), generator=generator))
            found[index] = tokens[start : start + seqlen]
        if len(found) == count:
            rest = [document for i, document in enumerate(documents) if i not in found]
            return torch.stack(list(found.values())), rest
    return None, documents


def _kept_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, seqlen: int, count: int, generator: torch.Generator
) -> torch.Tensor | None:
    """A window inside each of `count` documents, as long as there are documents for; None without."""
    for length in _kept_lengths(seqlen) if count else ():
        windows, _ = _inside(documents, tokenizer, count, length, generator)
        if windows is not None:
            return windows
    return None


def _kept_lengths(seqlen: int) -> Iterator[int]:
    """Tokens of windows that are kept back, the best first."""
    length = seqlen
    while length >= min(_SHORTEST_KEPT, seqlen):
        yield length
        length //= 2


def _kept_back(
    tokens: torch.Tensor, starts: torch.Tensor, seqlen: int, count: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Windows that overlap neither those of `seqlen` tokens at `starts` nor each other; None without room for them."""
    for length in _kept_lengths(seqlen) if count else ():
        taken = [(int(start), seqlen) for start in starts]
        found: list[int] = []
        while len(found) < count and len(free := _free_starts(len(tokens), taken, length)):
            found.append(int(free[torch.randint(len(free), (1,), generator=generator)]))
            taken.append((found[-1], length))
        if len(found) == count:
            return torch.stack([tokens[start : start + length] for start in found])
    return None


def _free_starts(tokens: int, taken: list[tuple[int, int]], length: int) -> torch.Tensor:
    """Where a window of `length` may begin without touching the taken (start, length).  # (places,)"""
    free = torch.ones(max(0, tokens - length + 1), dtype=torch.bool)
    for start, width in taken:
        free[max(0, start - length + 1) : start + width] = False
    return free.nonzero()[:, 0]


def check_source(source: str | Path) -> None:
    """What can be said of a calibration text, or of each in a mixture, at once: nothing is read or fetched.

    Raises:
        DataError: it is missing, of an unknown kind, or what would fetch it is not installed; or a mixture is not one.
    """
    mixture = Mixture.parse(source)
    for part in mixture.sources:
        if part.text == SELF:
            continue
        file = file_of(part.text, "calibration")
        if file is None:
            datasets_for(part.text)
        else:
            files_at(file)
    _check_apart(mixture)


def _check_apart(mixture: Mixture) -> None:
    """No file is of two texts, whose windows might then overlap."""
    seen: dict[Path, str] = {}
    for source in mixture.sources if len(mixture.sources) > 1 else ():
        file = None if source.text == SELF else file_of(source.text, "calibration")
        for path in files_at(file) if file is not None else ():
            other = seen.setdefault(path.resolve(), source.text)
            if other != source.text:
                raise DataError(f"calibration texts {other} and {source.text} share {path.name}; leave one of them out")


def evaluation_windows(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, seqlen: int = 2048, windows: int | None = None
) -> torch.LongTensor:
    """Consecutive windows of a test text, without overlap; the incomplete last one is dropped.

    Args:
        source: `wikitext2`, `c4`, a .txt, .raw or .jsonl file (field `text`), or a folder of such files.
        tokenizer: of the model; no special tokens are added.
        seqlen: tokens in a window.
        windows: at most so many, from the start; None takes all (of `c4`: 256).

    Returns:
        int64 token ids on the CPU, (windows, seqlen).

    Raises:
        DataError: a text that is missing, unreachable, unreadable or shorter than one window.
    """
    _check_sizes(seqlen=seqlen, windows=1 if windows is None else windows)
    if source == "self":
        raise DataError("a model is not evaluated on text it wrote itself; give wikitext2, c4 or a file")
    tokens = _tokenize(tokenizer, evaluation_text(source))  # (tokens,)
    _check_length(tokens, seqlen, source)
    count = len(tokens) // seqlen
    limit = _C4_WINDOWS if windows is None and source == "c4" else windows
    count = count if limit is None else min(count, limit)
    return cast(torch.LongTensor, tokens[: count * seqlen].view(count, seqlen))  # (windows, seqlen)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name} must be at least 1, not {size}")


def _check_length(tokens: torch.Tensor, seqlen: int, source: str | Path) -> None:
    if len(tokens) < seqlen:
        raise DataError(
            f"{source} has {len(tokens)} tokens, and one window needs {seqlen}; give more text or a smaller seqlen"
        )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    # verbose=False: no warning that the text is longer than the model's context; it is cut below that later
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
