"""Hugging Face: `AutoModelForCausalLM.from_pretrained(DIR)`, `save_pretrained` and `push_to_hub` of quantised models.

`import flatquant` registers the two classes below (`flatquant/registration.py`). transformers then builds the model on
the meta device, asks the quantiser to put serving modules in place, and reads tensors into them itself: sharded,
straight to the devices of a `device_map`. A folder of the hub's cache will do.

Without that import nothing can be loaded wrongly: the tensors lie in `flatquant*.safetensors`, where a transformers
that does not know us never looks. It warns of an unknown quant_method, and then fails for want of `model.safetensors`.

This module is imported while transformers itself is being imported, so it may import none of its models at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flatquant.errors import ArtifactError, ModelError
from flatquant.runtime.folder import (
    FORMAT_VERSION,
    INDEX_FILE,
    METHOD,
    SINGLE_FILE,
    Folder,
    plan_from_json,
)
from flatquant.versions import broken

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Methods of its quantisers that transformers calls, and we override. 5.17 shows the config to the first of two, later
# releases to the second.
_CONFIG_HOOKS = ("update_tp_plan", "update_attn_implementation")
_HOOKS = ("_process_model_before_weight_loading", "_process_model_after_weight_loading", "update_weight_conversions")


class FlatQuantConfig(QuantizationConfigMixin):
    """What stands under `quantization_config` in a quantised folder's `config.json` (see `runtime/folder.py`).

    It says how a model *was* quantised. FlatQuant fits transforms to calibration text, so that there is nothing that
    `from_pretrained(model_id, quantization_config=FlatQuantConfig(...))` could do on the way: it raises a ModelError
    which says what to call instead.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        recipe: Mapping[str, Any] | None = None,
        plan: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        content_hash: str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue] - ours is in no enumeration
        self.format_version = format_version
        self.scheme, self.recipe, self.plan = scheme, recipe, plan
        self.files, self.content_hash = files, content_hash

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From JSON; an entry that we do not know is an error."""
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise ArtifactError(f"quantization_config is damaged: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config


class FlatQuantizer(HfQuantizer):
    """Puts serving modules into a model that transformers has just built on the meta device."""

    requires_calibration = True
    quantization_config: FlatQuantConfig

    def __init__(self, quantization_config: FlatQuantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            scheme = quantization_config.scheme or "w4a4kv4"
            raise ModelError(
                "FlatQuant needs calibration text, so a model cannot be quantised while it is loaded; call "
                f"flatquant.quantize(model_id, flatquant.recipes.flatquant({scheme!r}), 'wikitext2', output=DIR), "
                "then from_pretrained(DIR) without a quantization_config"
            )
        super().__init__(quantization_config, **kwargs)
        self.folder: Folder | None = None
        self.prepared = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """What transformers calls first when it loads a quantised folder.

        Raises:
            ModelError: it will not call what we need to put serving modules in place.
        """
        lost = [name for name in _HOOKS if not hasattr(HfQuantizer, name)]
        if not any(hasattr(HfQuantizer, name) for name in _CONFIG_HOOKS):
            lost.append(" or ".join(_CONFIG_HOOKS))
        if lost:
            raise broken(f"a quantiser of transformers has no {lost[0]}")

    def _prepare(self, config: Any) -> Any:
        """The one look at the model's config before it is built and before any file is looked for."""
        files, plan = self.quantization_config.files, self.quantization_config.plan
        if not isinstance(files, Mapping) or not isinstance(plan, Mapping):
            raise ArtifactError("config.json is damaged: quantization_config lacks its plan or files")
        blocks = plan_from_json(plan).blocks
        layers = config.get_text_config().num_hidden_layers  # a number from a file: no model is built after it yet
        if layers != len(blocks):
            raise ArtifactError(f"config.json is damaged: {len(blocks)} blocks planned of {layers}")
        asked = getattr(config, "_attn_implementation_internal", None)
        if asked not in (None, "sdpa", METHOD):
            raise ModelError(f"quantised models bring their own attention; leave out attn_implementation={asked!r}")
        config.transformers_weights = INDEX_FILE if INDEX_FILE in files else SINGLE_FILE
        local = getattr(config, "_name_or_path", None)
        if local and INDEX_FILE in files and Path(local, INDEX_FILE).is_file():
            # transformers reads the index before it asks anyone, and stumbles over what is wrong with it.
            folder = Folder.open(Path(local))
            folder.check_files([name for name in folder.files if name != INDEX_FILE])
        self.prepared = True
        return config

    def update_tp_plan(self, config: Any) -> Any:  # what transformers 5.17 calls
        return self._prepare(config)

    def update_attn_implementation(self, config: Any) -> Any:  # what later versions call
        return self._prepare(config)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: tensors are stored under the names of the modules that hold them."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        from flatquant.runtime import artifact

        if not self.prepared:
            raise broken(f"from_pretrained called neither {' nor '.join(_CONFIG_HOOKS)}")
        if not checkpoint_files:
            raise ArtifactError("a quantised model is read from its folder; state_dict= cannot be given")
        self.folder = Folder.open(Path(checkpoint_files[0]).parent)
        self.folder.check_files(self.folder.companions)  # of a hub's repository, nothing else may be there
        tied = set(model.all_tied_weights_keys)  # will be tied, once tensors are loaded
        artifact.furnish(self.folder, model, tied, self.folder.tensors())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from flatquant import seams
        from flatquant.runtime import artifact, fused
        from flatquant.runtime.embedding import cast_embedding

        if self.folder is None:
            raise broken(f"from_pretrained did not call {_HOOKS[0]}")
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ModelError(
                "a quantised model cannot be offloaded: some of it would lie on the cpu or the disk; give device_map "
                "the memory that it needs, or load it on the cpu"
            )
        model.requires_grad_(False)
        del model.config.transformers_weights  # pyright: ignore[reportAttributeAccessIssue] - set by `_prepare`
        folder = self.folder
        cast_embedding(model)
        seams.use_attention(model, folder.plan.attention)
        artifact.adopt(model, artifact.Origin.of(folder))
        fused.attach(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# Called, not put on top of the classes: their decorator hides what it decorates from type checkers.
register_quantization_config(METHOD)(FlatQuantConfig)
register_quantizer(METHOD)(FlatQuantizer)
if AUTO_QUANTIZER_MAPPING.get(METHOD) is not FlatQuantizer:
    raise broken("register_quantizer did not register ours")
