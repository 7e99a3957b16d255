"""Models in: from a hub id, a folder, a GGUF file or an alias to a causal LM and its tokenizer.

Loading sits behind one function for two reasons. A GGUF is parsed in Python and takes a minute, so it is turned once
into ordinary safetensors in a cache folder and read from there afterwards. And everything that can be wrong with
somebody's folder becomes a `ModelError` of one line that says what to do.

Weights are read from safetensors only: a pickle can run code. Code that ships with a model runs only when asked for.
"""

from flatquant.models.cache import CacheShape, head_dim
from flatquant.models.checkpoint import Checkpoint, keep_dtypes, kept_dtype, open_model
from flatquant.models.device import find_device
from flatquant.models.folder import WRAPPERS, auto_class
from flatquant.models.gguf import ALIASES
from flatquant.models.load import load_model, load_tokenizer, loaded_bytes, processor_files
from flatquant.models.place import check, identity, resolve
from flatquant.models.silence import quiet
from flatquant.models.text import check_ids, render_chat, vocabulary_size, warn_of_positions

__all__ = [
    "ALIASES",
    "WRAPPERS",
    "CacheShape",
    "Checkpoint",
    "auto_class",
    "check",
    "check_ids",
    "find_device",
    "head_dim",
    "identity",
    "keep_dtypes",
    "kept_dtype",
    "load_model",
    "load_tokenizer",
    "loaded_bytes",
    "open_model",
    "processor_files",
    "quiet",
    "render_chat",
    "resolve",
    "vocabulary_size",
    "warn_of_positions",
]
