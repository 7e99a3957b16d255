"""What a model is asked to read: token ids, lengths, conversations."""

import warnings
from collections.abc import Sequence
from typing import cast

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant.errors import DataError, PositionsWarning, first_line


def warn_of_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Warn of a text that is longer than what the model was made for.

    Args:
        what: the text, in the plural.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(factor := rope.get("factor"), int | float):  # a rotary embedding that is stretched
        positions = max(positions, int(factor * rope.get("original_max_position_embeddings", positions)))
    if tokens > positions:
        message = f"{what} of {tokens} tokens are longer than the {positions} positions that the model was made for"
        warnings.warn(message, PositionsWarning, stacklevel=3)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids a model has rows for."""
    return cast(int, model.get_input_embeddings().num_embeddings)


def check_ids(ids: Tensor, model: PreTrainedModel, what: str) -> None:
    """Refuse token ids that the model has no embedding for: on a GPU they would end the process.

    Args:
        ids: int64, of any shape.
        what: what they are of, for the message.

    Raises:
        DataError: an id outside the model's vocabulary.
    """
    rows = vocabulary_size(model)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise DataError(f"{what} with token ids outside the model's {rows}; use the model's own tokenizer")


def render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], way_out: str, *, before: str = ""
) -> str:
    """A conversation by the chat template, up to where the model's turn begins if the user's is the last.

    Args:
        turns: a role and what it says, each.
        way_out: what to do where the template refuses them.
        before: stands before the template.

    Raises:
        DataError: the template is damaged, or refuses a turn.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=before + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=turns[-1][0] == "user",
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:  # what a template may raise
        raise DataError(f"the tokenizer's chat template refuses a turn ({first_line(error)}); {way_out}") from error
    return cast(str, text)
