"""A quantised model in memory, as transformers treats it: its own `save_pretrained`, `push_to_hub` and casts.

The quantiser is asked of transformers' table, where `import flatquant` put ours: that one reads folders, and knows this
module.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from flatquant.errors import ArtifactError, ModelError
from flatquant.runtime.artifact.write import save
from flatquant.runtime.folder import METHOD, Folder, plan_to_json
from flatquant.spec import Plan

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a quantised model came from.

    Attributes:
        recipe: as JSON: that of a loaded model may be one of a later version.
        source: the folder it was loaded from; its tokenizer goes along when the model is saved.
    """

    plan: Plan
    scheme: str
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    source: Folder | None = None

    @classmethod
    def of(cls, folder: Folder) -> Origin:
        """That of a model that is read from a folder. A damaged report is as good as none: serving needs no report."""
        report: Mapping[str, Any] = {}
        with suppress(ArtifactError):
            report = folder.read_report()
        return cls(
            plan=folder.plan,
            scheme=folder.scheme,
            recipe=folder.recipe,
            report=report,
            source=folder,
        )


def adopt(model: PreTrainedModel, origin: Origin) -> None:
    """Make a quantised model's `save_pretrained` and `push_to_hub` write our format, and its casts work."""
    said = {
        "quant_method": METHOD,
        "scheme": origin.scheme,
        "recipe": dict(origin.recipe),
        "plan": plan_to_json(origin.plan),
    }
    ours: Any = model  # these attributes are transformers' own, and it declares none of them
    ours.hf_quantizer = AutoHfQuantizer.from_config(said)
    ours.config.quantization_config = ours.hf_quantizer.quantization_config
    ours.is_quantized, ours.quantization_method = True, METHOD
    ours.flatquant_origin = origin
    # On the instance, since transformers offers no hook that could write packed tensors under other file names.
    ours.save_pretrained = MethodType(_save_pretrained, model)
    ours.push_to_hub = MethodType(_push_to_hub, model)
    # transformers refuses two of them for any quantised model, where a `to(dtype)` works.
    for name, dtype in _CASTS.items():
        setattr(ours, name, MethodType(partial(_cast, dtype=dtype), model))
    ours._apply = MethodType(_apply, model)


def _cast(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    return model.to(dtype)


def _apply(model: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
    """`nn.Module._apply`, but what no file stores (the frequencies of RoPE) keeps its dtype, as in `load(dtype=...)`.

    In half precision, they would turn positions far from the first by wrong angles.
    """
    exact = [
        (module._buffers, name, tensor)
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if (tensor := module._buffers.get(name)) is not None
    ]
    type(model)._apply(model, fn, recurse)
    for owner, name, tensor in exact:
        now = owner[name]
        if now is not None and now.dtype != tensor.dtype:
            owner[name] = tensor.to(now.device)
    return model


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained` of a quantised model; files of the same names are replaced."""
    if state_dict is not None or variant is not None:
        raise ModelError("a quantised model is saved as it is: leave out state_dict and variant")
    origin: Origin = model.flatquant_origin
    if is_main_process:
        save(
            model,
            origin.plan,
            Path(save_directory),
            scheme=origin.scheme,
            recipe=origin.recipe,
            report=origin.report,
            companions=origin.source,
            max_shard_bytes=_bytes(max_shard_size),
            replace=True,
        )
    if push_to_hub:
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        model.push_to_hub(repo_id, max_shard_size=max_shard_size, **kwargs)


def _push_to_hub(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
) -> Any:
    """`PreTrainedModel.push_to_hub`, with the model card that `save_pretrained` writes instead of an empty one."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a flatquant model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _bytes(size: int | str) -> int:
    """`5GB` as a number, in transformers' spelling."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", size.strip().upper())
    if match is None:
        raise ModelError(f"max_shard_size {size!r}: give bytes, or something like '5GB'")
    return int(float(match[1]) * _SIZES[match[2]])
