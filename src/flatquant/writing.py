"""Calibration text that the model writes itself: `self`.

Texts begin with prompts of many topics and forms: prose goes on from a heading and the first word of a sentence. A chat
model writes half of its windows so, and in the other half answers to user's turns in its own template: whole
conversations, special tokens included, as in use (docs/experiments.md, "What a model writes to calibrate on").

Tokens are sampled at temperature 1, as in LLM-QAT (arXiv 2305.17888). What was tried on SmolLM2-135M-Instruct, without
its template, reading the text:

* From BOS alone, an instruct model goes on with a chat turn; from its end-of-text token, or from a random token as in
  LLM-QAT, half of the texts are program code, tables or other languages. A word that opens an English sentence gives
  prose on one subject after another, but not as the very first token: that one serves the model as an attention sink,
  and what follows it is noise. So a blank line comes first, after BOS where the tokenizer itself would put one; neither
  is kept.
* The whole distribution at temperature 1 leaves the road after some fifty tokens in a model this small, as each step
  has a few per cent of chance of a token that no text would have. A nucleus of 0.95 keeps it on. It is taken of the 512
  likeliest tokens, since sorting the vocabulary costs a quarter of a step.
* A text is 256 tokens, and a window joins as many as it takes, as windows of real text join articles: many short texts
  in one batch cost a fraction of a few long ones, and are more diverse.
* Special tokens are never drawn, but for the end of a chat model's turn. After it another conversation begins, so that
  every text is full.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flatquant import seams
from flatquant.errors import DataError
from flatquant.mixture import interleaved
from flatquant.models import CacheShape, check_ids, render_chat

Progress = Callable[[int, int], None]

_TEXT_TOKENS = 256
_REPLY_TOKENS = 128  # room for a reply after the longest prompt, where a template's own words are long
_NUCLEUS = 0.95
_CANDIDATES = 512
_CACHE_BYTES = 8 << 30
_MAX_ROWS = 256
_PREAMBLE = "\n\n"
# Some templates tell the date, and a seed means one text. The last part keeps a line break at a template's beginning.
_NO_CLOCK = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}{{ '' }}"
_REPLY = "reply"  # stands for one, to see what a template puts after it

_TOPICS = """
the history of bridges; how vaccines work; sorting a list of numbers; a stormy night at sea; baking bread; black
holes; the rules of chess; learning a second language; a small town newspaper; electric cars; the French Revolution;
gardening in spring; prime numbers; a job interview; coral reefs; how a bill becomes law; jazz music; healthy sleep;
photography; a detective and a missing painting; database indexes; the water cycle; football tactics; paying off a
debt; the Silk Road; the human heart; a trip to Japan; volcanoes; writing a cover letter; the theory of evolution; a
painting robot; bicycle repair; inflation and interest rates; Shakespeare's plays; an argument between neighbours;
solar panels; parsing text files; ancient Egypt; raising a puppy; probability and dice; a lighthouse keeper's diary;
tea and coffee; wildfires; the printing press; a web page for a bakery; muscles and exercise; migration of birds;
court trials; the moon landing; cooking rice; climbing a mountain; encryption; a family dinner; antibiotics; the stock
market; folk tales; architecture of cathedrals; recycling plastic; a lost phone; space telescopes; fractions and
percentages; rivers of Africa; fashion of the 1920s; teaching children to read
"""
_REQUESTS = (
    "Explain {} to a beginner.",
    "Write a short story about {}.",
    "What are the most important facts about {}?",
    "Write a program that has to do with {}, and say how it works.",
    "Write a conversation between two people about {}.",
    "Give step-by-step advice on {}.",
    "Write a news report about {}.",
    "What do people often get wrong about {}?",
    "Make up a question about {} that needs some calculation, and solve it.",
    "Compare different views on {}.",
    "I have to give a talk about {}. Help me with an outline.",
)
_OPENINGS = ("The", "This", "These", "There", "They", "We", "When", "While", "Where", "What", "If", "Although")
_OPENINGS += ("Because", "Since", "Before", "After", "During", "Despite", "According", "However", "Many", "Most")
_OPENINGS += ("Some", "Several", "People", "Children", "Students", "Scientists", "Today", "Early")


@dataclass(frozen=True)
class _Script:
    """How texts go: what each begins with, what is not kept of it, and what follows the end of a turn.

    `prompts` are token ids in random order, every topic once before any comes again. `ends` are the tokens with which a
    model ends its turn, and `closing` is the template's end of a turn; both are empty without a template.
    """

    prompts: tuple[tuple[int, ...], ...]
    preamble: int  # tokens at the beginning of a text that are not kept
    ends: frozenset[int]
    closing: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of a text that are kept."""
        return max(_TEXT_TOKENS, max(map(len, self.prompts)) - self.preamble + _REPLY_TOKENS)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    topics: bool = True,
    progress: Progress | None = None,
) -> torch.LongTensor:
    """Windows cut out of texts that the model writes: int64 token ids on the CPU, (samples, seqlen).

    A chat model's first window, and every second from there, holds conversations.

    Args:
        topics: without, all is prose that begins with a word alone.

    On the CPU a half-precision model writes with a float32 copy of itself: six times as fast without bf16 units. The
    same seed gives the same prompts, and on the same kind of device the same text.

    Raises:
        DataError: the logits are not finite, the tokenizer's chat template refuses a user's turn, or its prompts have
            tokens that the model does not know.
    """
    device = torch.device(model.device)
    if device.type == "cpu" and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    chat = samples - samples // 2 if tokenizer.chat_template and topics else 0
    scripts = [_conversations(model, tokenizer, seed)] if chat else []
    scripts += [_prose(tokenizer, seed, topics)] if chat < samples else []
    for script in scripts:
        check_ids(torch.tensor([*chain(*script.prompts, script.closing)]), model, "prompts for the calibration text")
    jobs = list(zip(scripts, filter(None, (chat, samples - chat)), strict=True))
    total = sum(_texts(script, count, seqlen) * script.length for script, count in jobs)
    generator, done, parts = torch.Generator(device).manual_seed(seed), 0, []
    for script, count in jobs:
        banned = _banned(model, tokenizer, script.ends, device)  # (ids,)
        supply = cycle(script.prompts)
        texts, rows, out = _texts(script, count, seqlen), _rows_at_once(model, script.length + script.preamble), []
        for first in range(0, texts, rows):
            together = min(rows, texts - first)
            said = None if progress is None else _counting(progress, done, together, total)
            out.append(_written(model, script, together, supply, banned, generator, said))
            done += together * script.length
        parts.append(torch.cat(out).flatten()[: count * seqlen].view(count, seqlen))
    windows = [parts[source][i] for source, i in interleaved([len(part) for part in parts])]
    return cast(torch.LongTensor, torch.stack(windows))  # (samples, seqlen)


def _texts(script: _Script, windows: int, seqlen: int) -> int:
    """How many texts fill so many windows."""
    return -(-windows * seqlen // script.length)


def _counting(progress: Progress, before: int, rows: int, total: int) -> Callable[[int], None]:
    return lambda columns: progress(before + rows * columns, total)


@torch.no_grad()
def _written(
    model: PreTrainedModel,
    script: _Script,
    rows: int,
    supply: Iterator[Sequence[int]],
    banned: torch.Tensor,
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    """So many texts, written side by side: int64 on the CPU, (rows, length).

    Prompts differ in length, and there is no padding: a row that is still in its prompt takes the next token from there
    instead of the one drawn.
    """
    waiting = [deque(prompt) for prompt in islice(supply, rows)]  # tokens that a row has yet to take
    together = min(map(len, waiting))
    columns = [[row.popleft() for row in waiting] for _ in range(together)]
    step = torch.tensor(columns, dtype=torch.int64, device=model.device).T  # (rows, together)
    cache = DynamicCache(config=model.config)
    while len(columns) < script.preamble + script.length:
        logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{seams.CACHE: cache}).logits[:, -1]
        drawn = _draw(logits.float().index_fill(1, banned, -torch.inf), generator)  # (rows,)
        columns.append([_taken(token, row, script, supply) for token, row in zip(drawn.tolist(), waiting, strict=True)])
        step = torch.tensor(columns[-1], dtype=torch.int64, device=model.device)[:, None]  # (rows, 1)
        if progress is not None:
            progress(len(columns) - script.preamble)
    return torch.tensor(columns[script.preamble :], dtype=torch.int64).T  # (rows, length)


def _taken(drawn: int, waiting: deque[int], script: _Script, supply: Iterator[Sequence[int]]) -> int:
    """A row's next token. After the end of a turn, another conversation waits."""
    if waiting:
        return waiting.popleft()
    if drawn in script.ends:
        rest = script.closing[1:] if script.closing[:1] == (drawn,) else ()
        waiting.extend(chain(rest, next(supply)))
    return drawn


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row from the nucleus of (rows, vocab) float32 logits."""
    top, index = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=1)  # (rows, candidates), descending
    if not bool(torch.isfinite(top[:, 0]).all()):
        raise DataError("the model's logits are not finite, so it cannot write calibration text; load it in float32")
    chance = (top - logits.logsumexp(dim=1, keepdim=True)).exp()  # of the whole vocabulary, not of the candidates
    chance = chance.masked_fill(chance.cumsum(dim=1) - chance > _NUCLEUS, 0.0)  # the first token always stays
    return index.gather(1, torch.multinomial(chance, 1, generator=generator))[:, 0]


# --------------------------------------------------------------------------------------------------------- prompts


def _topics() -> list[str]:
    return [str(topic) for topic in " ".join(_TOPICS.split()).split("; ")]


def _prose(tokenizer: PreTrainedTokenizerBase, seed: int, topics: bool = True) -> _Script:
    """A heading and the first word of a sentence, or that word alone."""
    generator = torch.Generator().manual_seed(seed)
    heads = [f"{topic[0].upper()}{topic[1:]}\n\n" for topic in _topics()] if topics else [""]
    texts = [head + word for head, word in _pairs(heads, _OPENINGS, generator)]
    preamble = _preamble(tokenizer)
    return _Script(tuple((*preamble, *_ids(tokenizer, text)) for text in texts), len(preamble), frozenset(), ())


def _conversations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> _Script:
    """A user's turn by the chat template."""
    generator, topics = torch.Generator().manual_seed(seed), _topics()
    asked = [request.format(topic) for topic, request in _pairs(topics, _REQUESTS, generator)]
    prompts = tuple(_ids(tokenizer, _rendered(tokenizer, [("user", text)])) for text in asked)
    whole = _rendered(tokenizer, [("user", asked[0]), ("assistant", _REPLY)])
    closing = _ids(tokenizer, whole.rpartition(_REPLY)[2])
    special = _special_ids(tokenizer).intersection(closing[:1])
    return _Script(prompts, 0, frozenset(_end_ids(model) | special), closing)


def _pairs(topics: Sequence[str], forms: Sequence[str], generator: torch.Generator) -> list[tuple[str, str]]:
    """Every topic with every form, in random order: a round has each topic once, and all forms about as often."""
    order: list[int] = torch.randperm(len(topics), generator=generator).tolist()
    turn: list[int] = torch.randperm(len(forms), generator=generator).tolist()
    rounds = range(len(forms))
    return [(topics[t], forms[turn[(i + shift) % len(turn)]]) for shift in rounds for i, t in enumerate(order)]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """A conversation by the chat template, up to where the model's turn begins if the user's is the last."""
    return render_chat(tokenizer, turns, "set tokenizer.chat_template to None for prose", before=_NO_CLOCK)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))


def _preamble(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What stands before a text and is not kept: BOS where the tokenizer puts one, and a blank line."""
    blank = _ids(tokenizer, _PREAMBLE)
    bos = tokenizer.bos_token_id
    ids = cast(list[int], tokenizer("a")["input_ids"])
    return (bos, *blank) if isinstance(bos, int) and ids[:1] == [bos] else blank


def _end_ids(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text, or a turn."""
    found: set[int] = set()
    for end in (
        model.config.get_text_config().eos_token_id,
        model.generation_config.eos_token_id if model.generation_config else None,
    ):
        found.update([end] if isinstance(end, int) else end or ())
    return found


def _banned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], device: torch.device
) -> torch.Tensor:
    """Ids that are never drawn: special tokens, ends of text, and embedding rows that no token has, but not `ends`."""
    vocab = model.config.get_text_config().vocab_size
    ids = _special_ids(tokenizer) | set(range(len(tokenizer), vocab)) | _end_ids(model)
    return torch.tensor(sorted(i for i in ids - ends if i < vocab), dtype=torch.int64, device=device)  # (ids,)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


# ---------------------------------------------------------------------------------------------------------- memory


def writing_bytes(model: PreTrainedModel, device: torch.device, samples: int, seqlen: int) -> int:
    """What writing calibration text takes on a device besides the model, counted from shapes."""
    rows = min(-(-samples * seqlen // _TEXT_TOKENS), _rows_at_once(model, _TEXT_TOKENS))
    config = model.config.get_text_config()
    copied = device.type == "cpu" and model.dtype != torch.float32
    item = torch.float32.itemsize if copied else model.dtype.itemsize
    cache = rows * _cache_row(model, _TEXT_TOKENS) * item
    logits = 4 * 4 * rows * config.vocab_size  # the head's, in float32, without what is banned, and in exponentials
    return cache + logits + (item * sum(p.numel() for p in model.parameters()) if copied else 0)


def _cache_row(model: PreTrainedModel, length: int) -> int:
    """Numbers in the KV cache of a row."""
    return model.config.get_text_config().num_hidden_layers * CacheShape.of(model.config).numbers * length


def _rows_at_once(model: PreTrainedModel, length: int) -> int:
    """Rows whose KV cache stays within 8 GiB; a rule without the machine in it, so that a seed means one text."""
    row = _cache_row(model, length) * model.dtype.itemsize
    return max(1, min(_MAX_ROWS, _CACHE_BYTES // row))
