"""Choose a layout within limits."""

from __future__ import annotations

from itertools import product

import torch
from transformers import PreTrainedModel

from flatquant.calibrate.activations import Place
from flatquant.calibrate.memory import machine
from flatquant.calibrate.memory.layout import Estimate, needs_all_blocks, why_undivided
from flatquant.calibrate.memory.limits import Limits, size_text
from flatquant.calibrate.memory.run import Count
from flatquant.errors import CalibrationError
from flatquant.spec import FitMemory, Plan, Recipe

SPENT_ON_SPEED = 3  # an end-to-end fit keeps what blocks compute where that fits in a third of the free memory


def estimate(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    *,
    shape: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    streamed: bool = False,
    side_by_side: int | None = None,
    windows: int | None = None,
    memory: FitMemory | None = None,
    written: int = 0,
    copied: bool = False,
) -> Estimate:
    """Count what a run will need, and lay it out within limits.

    Args:
        shape: of the calibration tokens, (N, T); None for a recipe that reads none.
        dtype: of the fit's products.
        limits: what is not given is what is free now.
        side_by_side, windows, memory: fixed, where given.
        written: calibration windows that the model writes before anything else; no limit holds for that.
        copied: whether a float32 copy of the model writes the report's texts; nor for that.

    Raises:
        CalibrationError: a given limit is less than the least that the run needs; or ranks are to divide weights, and
            cannot.
    """
    device_limit = machine.free_device(device) if limits.device is None else limits.device  # first: this loads CUDA
    count = Count(model, plan, recipe, shape, device, dtype, streamed)
    most = count.batch if windows is None else windows
    parts = [most] if windows is not None else [w for w in range(most, 0, -1) if count.batch % w == 0]
    together = [side_by_side or count.together]
    if side_by_side is None:
        together = list(range(count.together, 0, -1))
    on_gpu = device.type == "cuda"
    if not on_gpu:  # all is the host's
        given = [limit for limit in (limits.device, limits.host) if limit is not None]
        limits = Limits(host=min(given, default=None))
        device_limit = None
    host_limit = limits.host
    if host_limit is None and (free := machine.free_host_bytes()) is not None:
        host_limit = free + machine.resident_bytes()
    places: tuple[Place, ...] = ("device", "host", "disk") if on_gpu else ("device", "disk")

    def with_text(layout: Estimate) -> Estimate:
        layout = count.with_text(layout, written) if written else layout
        return count.with_copy(layout) if copied else layout

    memories: list[FitMemory | None] = count.memories if memory is None else [memory]
    if memories[0] == "sharded" and (why := why_undivided(recipe)):
        raise CalibrationError(why)
    if count.recomputes:
        roomy = count.layout("device", parts[0], together[0], recompute=False, memory=memories[0])
        # What is free is for others too, unless a limit says otherwise.
        share = 1 if (limits.device if on_gpu else limits.host) is not None else SPENT_ON_SPEED
        fits = _within(share * roomy.device, device_limit) if on_gpu else _within(share * roomy.host, host_limit)
        if fits and _within(roomy.host, host_limit):
            return with_text(roomy)
    least: Estimate | None = None
    # What is given up first varies fastest.
    for held in memories:
        for w, place, k in product(parts, places, together):
            if place != "device" and k != together[-1]:
                continue  # blocks side by side read one another's rows: they would be brought twice
            least = count.layout(place, w, k, recompute=count.recomputes, memory=held)
            if _within(least.device, device_limit) and _within(least.host, host_limit):
                return with_text(least)
    assert least is not None
    # What is free is taken as a wish: an estimate must not stop a run that might go well.
    if not (_within(least.device, limits.device) and _within(least.host, limits.host)):
        raise CalibrationError(
            f"by an estimate from shapes the run needs at least {size_text(least.device)} on the device and "
            f"{size_text(least.host)} in host memory, more than was allowed; raise the limit, or use a smaller --seqlen"
            + ("" if streamed or needs_all_blocks(recipe) else ", or --stream")
        )
    return with_text(least)


def _within(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit
