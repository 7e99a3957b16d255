"""What recipes share: how a scheme's text is read where no clip is learned, and which preset reads how much text."""

import dataclasses
from collections.abc import Mapping

from flatquant.errors import SpecError
from flatquant.spec import Clip, DataSpec, EndToEndSpec, Scheme

# Text of methods that need second moments or gradients of it, but fit nothing on it.
TEXT = {"reference": DataSpec(samples=128, seqlen=2048), "quick": DataSpec(samples=16, seqlen=512)}
TEXTS = {**TEXT, "best": TEXT["reference"]}  # of those whose `best` differs in something else


def of_preset(preset: str, texts: Mapping[str, DataSpec] = TEXT) -> DataSpec:
    """How much text a preset reads.

    Raises:
        SpecError: an unknown preset.
    """
    if preset not in texts:
        raise SpecError(f"unknown preset {preset!r}; known: {', '.join(texts)}")
    return texts[preset]


def trained(preset: str, fit: EndToEndSpec) -> tuple[EndToEndSpec, DataSpec]:
    """A fit on the model's cross entropy, of which `quick` takes 20 small steps, and how much text it reads.

    Raises:
        SpecError: an unknown preset.
    """
    data = of_preset(preset, {**TEXT, "quick": DataSpec(samples=40, seqlen=256)})
    return (dataclasses.replace(fit, steps=20, batch_size=2, checkpoint=False) if preset == "quick" else fit), data


def has_few_levels(scheme: str | Scheme) -> bool:
    """Whether this is the text of a scheme with weights of 2 or 3 bits."""
    weights = Scheme.parse(scheme).weights if isinstance(scheme, str) else None
    return weights is not None and weights.format is None and weights.bits <= 3


def fitting_few_levels(scheme: str | Scheme, clip: Clip = "search") -> Scheme:
    """A scheme as it is; read from a text, one with full ranges, but for weights of 2 and 3 bits.

    Those have a zero point, and ranges searched for the least error: of the four levels of a symmetric grid of 2 bits
    that covers its row, hardly a weight takes any but 0 (docs/experiments.md, "Weights at 2 to 4 bits").
    """
    read = unclipped(scheme)
    if not has_few_levels(scheme) or read.weights is None:
        return read
    return dataclasses.replace(read, weights=dataclasses.replace(read.weights, symmetric=False, clip=clip))


def searched_groups(scheme: str | Scheme) -> Scheme:
    """`fitting_few_levels`, and ranges searched of groups, whatever their bits, and of a format's blocks.

    With error compensation it helps.
    """
    read = fitting_few_levels(scheme)
    if not isinstance(scheme, str) or read.weights is None:
        return read
    if read.weights.group_size is None and read.weights.format is None:
        return read
    return dataclasses.replace(read, weights=dataclasses.replace(read.weights, clip="search"))


def signed_scales(scheme: str | Scheme) -> Scheme:
    """`fitting_few_levels`, and scales of either sign where weights have no zero point: all their levels are used."""
    read = fitting_few_levels(scheme)
    if not isinstance(scheme, str) or read.weights is None or not read.weights.symmetric or read.weights.format:
        return read
    return dataclasses.replace(read, weights=dataclasses.replace(read.weights, signed_scale=True))


def unclipped(scheme: str | Scheme) -> Scheme:
    """A scheme as it is; read from a text, one with full ranges."""
    return Scheme.parse(scheme, clip="none") if isinstance(scheme, str) else scheme
