"""Text in, windows of tokens out: for calibration at random places, for evaluation one after the other.

The rules are those behind every published figure, because a perplexity means nothing without them:

* WikiText-2 evaluation: each row keeps its newline, a blank row becomes the empty string, rows are joined with a blank
  line, the whole is tokenised once without special tokens and cut into windows that do not overlap.
* C4 evaluation: documents are joined with spaces; 1,100 of them, at most 256 windows.
* Calibration: non-empty lines, stripped, joined with a blank line; windows begin at random.

A text is looked for in the folder that the environment variable FLATQUANT_DATA names, else fetched with the `datasets`
library. `self` needs neither: the model writes its own calibration text.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flatquant import seams
from flatquant.errors import DataError

Progress = Callable[[int, int], None]

_SUFFIXES = (".txt", ".raw", ".jsonl")
_LOCAL = {
    ("wikitext2", "calibration"): "wikitext-2-raw/wiki.valid.raw",
    ("wikitext2", "evaluation"): "wikitext-2-raw/wiki.test.raw",
    ("c4", "calibration"): "c4/c4-en-sample.jsonl",
    ("c4", "evaluation"): "c4/c4-en-sample.jsonl",
}
_C4_EVALUATION_DOCUMENTS = 1100
_C4_CALIBRATION_DOCUMENTS = 5000
_C4_WINDOWS = 256
_SHORTEST_KEPT = 64  # tokens of a window that is kept back, where calibration takes longer ones

# Sampling from the model
_TEXT_TOKENS = 256
_NUCLEUS = 0.95
_CANDIDATES = 512
_CACHE_BYTES = 8 << 30
_MAX_ROWS = 256
_PREAMBLE = "\n\n"
_OPENINGS = ("The", "This", "These", "There", "They", "We", "When", "While", "Where", "What", "If", "Although")
_OPENINGS += ("Because", "Since", "Before", "After", "During", "Despite", "According", "However", "Many", "Most")
_OPENINGS += ("Some", "Several", "People", "Children", "Students", "Scientists", "Today", "Early")


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
            folder of such files.
        tokenizer: of the model; no special tokens are added.
        samples: number of windows.
        seqlen: tokens in a window.
        seed: the same seed draws the same windows. The global random state is left alone.
        model: for `self` only.
        progress: called with (tokens written, tokens to write); `self` only, as nothing else takes long.

    Returns:
        int64 token ids on the CPU, (samples, seqlen).

    Raises:
        DataError: a text that is missing, unreachable, unreadable or shorter than one window.
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
        kept: windows to keep back. They overlap no calibration window. Where the text has no room for windows of
            `seqlen` tokens, they are shorter.

    Other arguments and errors are those of `calibration_tokens`. `kept` does not change the windows that are drawn from
    a text; the texts that a model writes for `self` are drawn together.

    Returns:
        What `calibration_tokens` returns, and int64 (kept, at most seqlen), or None if no window is left.
    """
    _check_sizes(samples=samples, seqlen=seqlen)
    if source == "self":
        if model is None:
            raise DataError("calibration text 'self' is written by the model, and none was given; pass model=")
        both = _sample_from(model, tokenizer, samples=samples + kept, seqlen=seqlen, seed=seed, progress=progress)
        return cast(torch.LongTensor, both[:samples]), cast(torch.LongTensor, both[samples:]) if kept else None
    tokens = _tokenize(tokenizer, _calibration_text(source))  # (tokens,)
    _check_length(tokens, seqlen, source)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - seqlen + 1, (samples,), generator=generator)  # (samples,)
    windows = tokens[starts[:, None] + torch.arange(seqlen)]  # (samples, seqlen)
    return cast(torch.LongTensor, windows), _kept_back(tokens, starts, seqlen, kept, generator)


def _kept_back(
    tokens: torch.Tensor, starts: torch.Tensor, seqlen: int, count: int, generator: torch.Generator
) -> torch.LongTensor | None:
    """Windows that overlap neither those of `seqlen` tokens at `starts` nor each other; None without room for them."""
    length = seqlen
    while count and length >= min(_SHORTEST_KEPT, seqlen):
        taken = [(int(start), seqlen) for start in starts]
        found: list[int] = []
        while len(found) < count and len(free := _free_starts(len(tokens), taken, length)):
            found.append(int(free[torch.randint(len(free), (1,), generator=generator)]))
            taken.append((found[-1], length))
        if len(found) == count:
            return cast(torch.LongTensor, torch.stack([tokens[start : start + length] for start in found]))
        length //= 2
    return None


def _free_starts(tokens: int, taken: list[tuple[int, int]], length: int) -> torch.Tensor:
    """Where a window of `length` may begin without touching the taken (start, length).  # (places,)"""
    free = torch.ones(max(0, tokens - length + 1), dtype=torch.bool)
    for start, width in taken:
        free[max(0, start - length + 1) : start + width] = False
    return free.nonzero()[:, 0]


def check_source(source: str | Path) -> None:
    """What can be said of a calibration text at once: nothing is read or fetched.

    Raises:
        DataError: it is missing, of an unknown kind, or what would fetch it is not installed.
    """
    if source == "self":
        return
    file = _file_of(source, "calibration")
    if file is None:
        _datasets(str(source))
    else:
        _files(file)


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
    tokens = _tokenize(tokenizer, _evaluation_text(source))  # (tokens,)
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


# --------------------------------------------------------------------------------------------------------- texts


def _calibration_text(source: str | Path) -> str:
    file = _file_of(source, "calibration")
    if file is not None:
        pieces = [piece for path in _files(file) for piece in _documents(path)]
    elif source == "wikitext2":
        pieces = _wikitext("train")
    else:  # the documents after those that evaluation reads
        pieces = _c4(_C4_EVALUATION_DOCUMENTS, _C4_EVALUATION_DOCUMENTS + _C4_CALIBRATION_DOCUMENTS)
    return "\n\n".join(piece.strip() for piece in pieces if piece.strip())


def _evaluation_text(source: str | Path) -> str:
    file = _file_of(source, "evaluation")
    if file is not None:
        return "\n\n".join(_joined(path) for path in _files(file))
    if source == "wikitext2":
        return _join_rows(_wikitext("test"))
    return " ".join(_c4(0, _C4_EVALUATION_DOCUMENTS))


def _joined(path: Path) -> str:
    return " ".join(_documents(path)) if path.suffix == ".jsonl" else _join_rows(_documents(path))


def _join_rows(rows: Sequence[str]) -> str:
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _file_of(source: str | Path, use: str) -> Path | None:
    """The local file or folder of a source; None: it has to be downloaded."""
    relative = _LOCAL.get((str(source), use))
    if relative is None:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"no such text: {source}; give wikitext2, c4, self, or a .txt, .raw or .jsonl file")
        return path
    root = os.environ.get("FLATQUANT_DATA")
    if not root:
        return None
    path = Path(root).expanduser() / relative
    if not path.is_file():
        raise DataError(f"FLATQUANT_DATA has no {relative} (looked for {path}); put it there, or unset FLATQUANT_DATA")
    return path


def _files(path: Path) -> list[Path]:
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
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}; it must be UTF-8 text") from error
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


def _datasets(source: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise DataError(
            f"downloading {source} needs the datasets package: pip install datasets; or set FLATQUANT_DATA to a folder "
            "that has the text, or calibrate with --calibration self"
        ) from error
    return datasets


def _download(source: str, path: str, **arguments: object) -> list[str]:
    datasets = _datasets(source)
    try:
        return list(datasets.load_dataset(path, **arguments)["text"])  # pyright: ignore
    except Exception as error:  # datasets, the hub client and the network each raise types of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"cannot download {source} ({reason}); set FLATQUANT_DATA to a folder that has the text, or calibrate with "
            "--calibration self"
        ) from error


# ----------------------------------------------------------------------------------------- text from the model itself


@torch.no_grad()
def _sample_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    progress: Progress | None,
) -> torch.LongTensor:
    """Windows cut out of texts that the model writes, sampled at temperature 1 as in LLM-QAT (arXiv 2305.17888).

    What was tried on SmolLM2-135M-Instruct, reading the text:

    * From BOS alone, an instruct model goes on with a chat turn; from its end-of-text token, or from a random token
      as in LLM-QAT, half of the texts are program code, tables or other languages. A word that opens an English
      sentence gives prose on one subject after another, but not as the very first token: that one serves the model
      as an attention sink, and what follows it is noise. So a blank line comes first, after BOS where the tokenizer
      itself would put one; neither is kept.
    * The whole distribution at temperature 1 leaves the road after some fifty tokens in a model this small, as each
      step has a few per cent of chance of a token that no text would have. A nucleus of 0.95 keeps it on. It is
      taken of the 512 likeliest tokens, since sorting the vocabulary costs a quarter of a step.
    * A text is 256 tokens, and a window joins as many as it takes, as windows of real text join articles: many short
      texts in one batch cost a fraction of a few long ones, and are more diverse.
    * Special tokens, end of text among them, are never drawn, so that every text is full.

    On the CPU a half-precision model writes with a float32 copy of itself: six times as fast without bf16 units.
    Raises DataError if the logits are not finite.
    """
    device = torch.device(model.device)
    if device.type == "cpu" and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    length = min(_TEXT_TOKENS, seqlen)
    texts = -(-samples * seqlen // length)
    generator = torch.Generator(device).manual_seed(seed)
    openings = _opening_tokens(tokenizer, texts, seed).to(device)  # (texts,)
    preamble = _preamble(tokenizer)
    banned = _banned(model, tokenizer, device)  # (ids,)
    done, out = 0, []
    for first in openings.split(_rows_at_once(model, length + len(preamble))):  # (rows,)
        prefix = torch.tensor(preamble, dtype=torch.int64, device=device).expand(len(first), -1)  # (rows, prefix)
        columns = [first]
        step, cache = torch.cat([prefix, first[:, None]], dim=1), DynamicCache(config=model.config)
        while len(columns) < length:
            logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{seams.CACHE: cache}).logits[:, -1]
            columns.append(_draw(logits.float().index_fill(1, banned, -torch.inf), generator))  # (rows,)
            step = columns[-1][:, None]  # (rows, 1)
            if progress is not None:
                progress(done + len(first) * len(columns), texts * length)
        done += len(first) * length
        out.append(torch.stack(columns, dim=1).cpu())  # (rows, length)
    tokens = torch.cat(out).flatten()[: samples * seqlen]
    return cast(torch.LongTensor, tokens.view(samples, seqlen))  # (samples, seqlen)


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row from the nucleus of (rows, vocab) float32 logits."""
    top, index = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=1)  # (rows, candidates), descending
    if not bool(torch.isfinite(top[:, 0]).all()):
        raise DataError("the model's logits are not finite, so it cannot write calibration text; load it in float32")
    chance = (top - logits.logsumexp(dim=1, keepdim=True)).exp()  # of the whole vocabulary, not of the candidates
    chance = chance.masked_fill(chance.cumsum(dim=1) - chance > _NUCLEUS, 0.0)  # the first token always stays
    return index.gather(1, torch.multinomial(chance, 1, generator=generator))[:, 0]


def _opening_tokens(tokenizer: PreTrainedTokenizerBase, texts: int, seed: int) -> torch.Tensor:
    """The first tokens of words that open sentences, in random order, over and over."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in _OPENINGS]
    first = torch.tensor([word[0] for word in cast(list[list[int]], ids) if word], dtype=torch.int64)  # (words,)
    generator = torch.Generator().manual_seed(seed)
    rounds = [first[torch.randperm(len(first), generator=generator)] for _ in range(-(-texts // len(first)))]
    return torch.cat(rounds)[:texts]  # (texts,)


def _preamble(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text and is not kept: BOS where the tokenizer puts one, and a blank line."""
    blank = cast(list[int], tokenizer(_PREAMBLE, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    ids = cast(list[int], tokenizer("a")["input_ids"])
    return [bos, *blank] if isinstance(bos, int) and ids[:1] == [bos] else blank


def _banned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    """Ids that are never drawn: special tokens, ends of text, and embedding rows that no token has."""
    config = model.config.get_text_config()
    vocab = config.vocab_size
    ids = set(tokenizer.all_special_ids) | set(range(len(tokenizer), vocab))
    ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for end in (config.eos_token_id, model.generation_config.eos_token_id if model.generation_config else None):
        ids.update([end] if isinstance(end, int) else end or ())
    return torch.tensor(sorted(index for index in ids if index < vocab), dtype=torch.int64, device=device)  # (ids,)


def writing_bytes(model: PreTrainedModel, device: torch.device, samples: int, seqlen: int) -> int:
    """What writing calibration text takes on a device besides the model, counted from shapes."""
    length = min(_TEXT_TOKENS, seqlen)
    rows = min(-(-samples * seqlen // length), _rows_at_once(model, length))
    config = model.config.get_text_config()
    copied = device.type == "cpu" and model.dtype != torch.float32
    item = torch.float32.itemsize if copied else model.dtype.itemsize
    cache = rows * _cache_row(model, length) * item
    logits = 4 * 4 * rows * config.vocab_size  # the head's, in float32, without what is banned, and in exponentials
    return cache + logits + (item * sum(p.numel() for p in model.parameters()) if copied else 0)


def _cache_row(model: PreTrainedModel, length: int) -> int:
    """Numbers in the KV cache of a row."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * length


def _rows_at_once(model: PreTrainedModel, length: int) -> int:
    """Rows whose KV cache stays within 8 GiB; a rule without the machine in it, so that a seed means one text."""
    row = _cache_row(model, length) * model.dtype.itemsize
    return max(1, min(_MAX_ROWS, _CACHE_BYTES // row))
