"""A folder's tensors, read one by one under the names of a model's."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatquant.errors import ModelError, first_line
from flatquant.models.float8 import NARROW, SCALE, dequantized, float8_block, headers, unsaid
from flatquant.models.folder import (
    auto_class,
    check_config,
    check_folder,
    check_size,
    generation_config,
    read_config,
    read_tokenizer,
)
from flatquant.models.place import resolve
from flatquant.models.silence import quiet
from flatquant.modules import tied_names


class Checkpoint:
    """The safetensors of a folder, read tensor by tensor under the names of a model's tensors.

    A tensor is read when it is asked for, into memory of its own, in the model's dtype; no file stays open. Weights in
    float8 are multiplied by the scales of their blocks.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
        block: tuple[int, int] | None = None,
    ) -> None:
        """`files` says where a name's tensor is, `dtypes` as what it is read, where that is not as stored.

        `block` is what shares a scale of weights in float8, (rows, columns).
        """
        self.folder, self._files, self._dtypes, self._block = folder, files, dtypes, block

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor.

        Raises:
            ModelError: the file has gone, or is damaged.
        """
        tensor = self._stored(name, device)
        if tensor.dtype == torch.float8_e4m3fn:
            assert self._block is not None
            tensor = dequantized(tensor, self._stored(name + SCALE, device), self._block)
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def _stored(self, name: str, device: str | torch.device) -> Tensor:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, "pt") as stored:
                # A copy: what the file gives is a view of its pages.
                return stored.get_tensor(name).to(device, copy=True)
        except Exception as error:  # SafetensorError, for one, is no subclass of OSError
            raise ModelError(f"cannot read {name} from {path}: {first_line(error)}; fetch the model again") from error

    def fill(
        self, module: nn.Module, prefix: str, device: str | torch.device = "cpu", besides: str | None = None
    ) -> None:
        """Give a module that is on the meta device its tensors.

        Args:
            prefix: of the module's names in the model.
            besides: names with this prefix stay on the meta device.
        """
        wanted = [name for name in module.state_dict() if besides is None or not name.startswith(besides)]
        state = {name: self.read(prefix + name, device) for name in wanted if prefix + name in self._files}
        module.load_state_dict(state, assign=True, strict=False)


def open_model(
    name: str | Path, *, dtype: torch.dtype | None = None, lay_out: Callable[[nn.Module], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Checkpoint]:
    """A folder's model as `load_model` gives it, but with all tensors on the meta device; its tokenizer; its tensors.

    Buffers that no file holds are on the meta device too.

    Args:
        dtype: of the weights; None for that of the config.
        lay_out: changes the model, on the meta device, into the one that tensors are read into: experts one by one.

    Raises:
        ModelError: as `load_model` does; or the folder can only be loaded whole, because transformers would rename,
            convert or make up tensors on the way.
    """
    folder = resolve(name)
    if not isinstance(folder, Path):
        raise ModelError(f"{name} is on a hub, and only a local folder can be streamed; fetch it, and give its folder")
    check_folder(folder)
    with quiet():
        config = read_config(folder, name, False)
        check_config(config, name)
        block = float8_block(config, name)
        dtype = dtype or getattr(config, "dtype", None)
        if dtype is None or getattr(config, "quantization_config", None):
            raise _only_whole(name, "its config names no dtype, or a quantisation")
        check_size(folder, config)
        with torch.device("meta"):
            model = auto_class(config.model_type).from_config(config, dtype=dtype)
        if lay_out is not None:
            lay_out(model)
        keep_dtypes(model)
        checkpoint = _matched(folder, name, model, block)
        if model.can_generate():
            model.generation_config = generation_config(folder)
        tokenizer = read_tokenizer(folder, name, False)
    return model.eval().requires_grad_(False), tokenizer, checkpoint


def _only_whole(name: object, why: str) -> ModelError:
    return ModelError(f"{name} cannot be read tensor by tensor: {why}; load it whole (--no-stream)")


def _matched(folder: Path, name: object, model: PreTrainedModel, block: tuple[int, int] | None) -> Checkpoint:
    """The folder's tensors, which are exactly those of the model; what transformers ignores aside."""
    files, shapes = tensors_of(folder, name, block)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    needed = model.state_dict()
    shapes = {
        key: shape
        for key, shape in shapes.items()
        if key in needed or not any(pattern.search(key) for pattern in ignored)
    }
    if odd := sorted((needed.keys() - tied_names(model)) ^ shapes.keys()):
        raise _only_whole(name, f"{odd[0]} is not both in its files and in the model ({len(odd)} such)")
    for key, shape in shapes.items():
        if tuple(shape) != tuple(needed[key].shape):
            raise _only_whole(name, f"{key} has another shape in its file")
    return Checkpoint(folder, files, {key: t.dtype for key, t in needed.items()}, block)


def kept_dtype(model: PreTrainedModel, key: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is in when transformers loads the model in a dtype: the model names some that stay in float32."""
    wide = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        wide |= {*(model._keep_in_fp32_modules or ())}
    kept = any(re.search(pattern.replace("*", ".*"), key) for pattern in wide)
    return torch.float32 if kept and dtype.is_floating_point else dtype


def keep_dtypes(model: PreTrainedModel) -> None:
    """Put the tensors of a model that was made in one dtype into those of `kept_dtype`, in place."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(kept_dtype(model, key, tensor.dtype))


def tensors_of(
    folder: Path, name: object, block: tuple[int, int] | None
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The file of every tensor; the shapes, but for those of scales, which are checked."""
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    narrow: list[str] = []  # in float8
    try:
        for file, key, shape, dtype in headers(folder):
            if key in files:
                raise _only_whole(name, f"{key} is in two files")
            files[key], shapes[key] = file, shape
            narrow += [key] if dtype.startswith(NARROW) else []
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot load the weights of {name}: {first_line(error)}; fetch the model again") from error
    for key in narrow:
        if block is None:
            raise unsaid(key, name)
        scales = shapes.pop(key + SCALE, None)
        if scales is None:
            raise ModelError(f"{key} of {name} is in float8 without its scales, {key}{SCALE}; fetch the model again")
        wanted = tuple(-(-size // b) for size, b in zip(shapes[key], block, strict=False))
        if len(shapes[key]) != 2 or scales != wanted:
            raise ModelError(
                f"{key}{SCALE} of {name} has shape {scales}: blocks of {block[0]} x {block[1]} of a weight of shape "
                f"{shapes[key]} have {wanted}; fetch the model again"
            )
    return files, shapes
