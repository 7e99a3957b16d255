"""What each stage of a run costs beside the others, counted from shapes before it starts.

The unit is a multiply-add of a large product in the fit's dtype. Stages that are bound by memory are counted as the
products that take as long on a CPU. The count only says how the time will be shared among stages that have not begun;
what they take is then measured (`flatquant.progress`).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from flatquant.calibrate.memory import linear_weights
from flatquant.spec import Plan, Recipe
from flatquant.wiring.arch import submodule

# Multiply-adds that take as long as ...
_A_BYTE_HASHED = 30
_A_WEIGHT_FOLDED = 150
_A_WEIGHT_ROUNDED = 40
_A_WEIGHT_PACKED = 30
_A_WEIGHT_A_STEP = 300  # its transform, its grid and both their gradients
_A_TOKEN_WRITTEN = 6  # times those of its forward pass: one token at a time reads all weights
_A_STEP = 3.5  # forward passes


def work(
    model: PreTrainedModel,
    plan: Plan,
    recipe: Recipe,
    shape: tuple[int, int] | None,
    *,
    written: int = 0,
    saves: bool = True,
    recompute: bool = False,
    ranks: int = 1,
) -> dict[str, float]:
    """The cost of every stage that the run will have, by its name in progress.

    Args:
        shape: of the calibration tokens, (N, T); None for a recipe that reads none.
        written: how many of the windows the model writes.
        saves: to a folder.
        recompute: blocks in the backward pass of an end-to-end fit (`Estimate.recompute`).
        ranks: that divide the run.
    """
    blocks = list(submodule(model, plan.blocks_path).children())
    weights = sum(sum(linear_weights(block, p)) for block, p in zip(blocks, plan.blocks, strict=True))
    stored = sum(p.nbytes for p in model.parameters())
    config = model.config.get_text_config()
    hidden = config.hidden_size
    head = config.vocab_size * hidden
    tokens = 0 if shape is None else shape[0] * shape[1]
    forward = weights * tokens
    found: dict[str, float] = {"hash": _A_BYTE_HASHED * stored, "fold": _A_WEIGHT_FOLDED * weights}
    if written and shape is not None:
        found["text"] = _A_TOKEN_WRITTEN * written * shape[1] * (weights + head)
    if recipe.needs_data:
        second = recipe.fit is not None and recipe.fit.both_targets
        found |= {"capture": 50 * tokens * hidden, "full precision": forward * (2 if second else 1)}
    if (fit := recipe.block_fit) is not None and shape is not None:
        steps = max(1, shape[0] // fit.batch_size)
        found["fit"] = fit.epochs * (_A_STEP * forward + steps * _A_WEIGHT_A_STEP * weights)
    if (end := recipe.whole_fit) is not None and shape is not None:
        passes = end.batch_size * shape[1] * ((_A_STEP + recompute) * weights + 4 * head)
        found["end to end"] = end.steps * (passes + _A_WEIGHT_A_STEP * weights)
    found["solve"] = _A_WEIGHT_ROUNDED * weights + _solving(model, plan, recipe, forward)
    found["solve"] += _learning(recipe, weights, shape)
    if saves:
        found["save"] = _A_WEIGHT_PACKED * weights
    return {stage: cost / (ranks if stage in _divided(recipe) else 1) for stage, cost in found.items()}


def _divided(recipe: Recipe) -> set[str]:
    """The stages that ranks divide (docs/scale.md)."""
    found = {"end to end"} | (set() if recipe.feeds_fit else {"fit"})
    return found if recipe.whole_fit is not None or recipe.quantised_stream else found | {"fold", "solve"}


def _solving(model: PreTrainedModel, plan: Plan, recipe: Recipe, forward: float) -> float:
    """What a solver that uses a Hessian adds to rounding."""
    if recipe.hessian is None:
        return 0.0
    blocks = submodule(model, plan.blocks_path).children()
    solved = 0.0
    for block, p in zip(blocks, plan.blocks, strict=True):
        widths = [site.shape[0] * site.shape[1] for site in p.sites.values()]
        solved += sum(n**3 + n * w for n, w in zip(widths, linear_weights(block, p), strict=True))
    return solved + forward * (3 * len(plan.blocks) / 2 if recipe.hessian == "output_adaptive" else 3)


def _learning(recipe: Recipe, weights: int, shape: tuple[int, int] | None) -> float:
    """What learned rounding adds to that."""
    spec = recipe.learned_rounding
    if spec is None or shape is None:
        return 0.0
    step = weights * (_A_STEP * spec.batch_size * shape[1] + _A_WEIGHT_A_STEP)
    return spec.steps * step + (spec.checks + 1) * weights * shape[0] * shape[1]
