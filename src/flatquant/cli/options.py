"""A recipe from the options of `flatquant quantize`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flatquant.errors import SpecError

if TYPE_CHECKING:
    from flatquant.spec import Recipe


def recipe_of(
    method: str,
    scheme: str,
    preset: str,
    calibration: str | None,
    samples: int | None,
    seqlen: int | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    solver: str | None,
    hessian: str | None = None,
    key_offset: str | None = None,
    *,
    act_order: bool | None = None,
    update_scales: bool | None = None,
    damping: float | None = None,
    gram_inputs: str | None = None,
    weight_clip: str | None = None,
    activation_clip: str | None = None,
    rounding_steps: int | None = None,
    ranks: int | None = None,
    weight_memory: str | None = None,
) -> Recipe:
    """The method's recipe with what the options change; an option that would change nothing is an error."""
    from flatquant.recipes import recipe
    from flatquant.spec import Scheme, from_dict, to_dict

    base = recipe(method, scheme, preset)
    if ranks is not None:
        base = base.for_ranks(ranks)
    if key_offset is not None:
        if base.scheme.keys is None and not base.scheme.cache_overrides:
            raise SpecError(f"scheme {base.scheme} does not quantise keys: leave out --key-offset")
        base = replace(base, scheme=from_dict(Scheme, to_dict(base.scheme) | {"key_offset": key_offset}, "scheme"))
    steps = {"batch_size": batch_size, "lr": lr}
    steps = {name: value for name, value in steps.items() if value is not None}
    learns = base.solver.learned is not None if rounding_steps is None else rounding_steps > 0
    data = {name: value for name, value in (("samples", samples), ("seqlen", seqlen)) if value is not None}
    if steps and base.fit is None and base.end_to_end is None and not (learns and lr is None):
        raise SpecError(f"method {method} fits nothing: leave out {_options(steps)}")
    if epochs is not None and base.fit is None:
        raise SpecError(f"method {method} with preset {preset} has no block-wise fit: leave out --epochs")
    base = base.tuned(samples=samples, seqlen=seqlen, epochs=epochs, batch_size=batch_size, lr=lr)
    for tensors, clip in (("weights", weight_clip), ("activations", activation_clip)):
        if clip is not None:
            base = _with_clip(base, tensors, clip)
    if update_scales and act_order is None:
        act_order = False  # the recipes' default would refuse
    settings = {
        "act_order": act_order,
        "update_scales": update_scales,
        "damping": damping,
        "gram_inputs": gram_inputs,
    }
    changed = _with_solver(base, solver, hessian, {n: v for n, v in settings.items() if v is not None})
    if rounding_steps is not None:
        changed = _with_learned_rounding(changed, rounding_steps).tuned(batch_size=batch_size)
    if weight_memory is not None:
        changed = _with_memory(changed, weight_memory)
    if not changed.needs_data and (data or calibration is not None):
        given = data if calibration is None else {**data, "calibration": calibration}
        raise SpecError(f"method {method} at {changed.scheme} reads no calibration text: leave out {_options(given)}")
    return changed


def _with_solver(base: Recipe, solver: str | None, hessian: str | None, settings: dict[str, Any]) -> Recipe:
    """The recipe with another way to round, or with other settings of its own."""
    from flatquant.spec import SolverSpec, from_dict, to_dict

    kinds = {name: value for name, value in (("kind", solver), ("hessian", hessian)) if value is not None}
    if not kinds and not settings:
        return base
    own = to_dict(base.solver)
    if not base.transforms and any(own[name] != value for name, value in kinds.items()):
        given = _options({name: 0 for name, value in (("solver", solver), ("hessian", hessian)) if value})
        raise SpecError(f"method {base.name} rounds with {base.solver.kind}: leave out {given}, or change --method")
    kept = own if solver is None else {"learned": own["learned"]}
    fields = {"gram_inputs": "inputs", "update_scales": "updates_scales"}
    rounding = kept | kinds | {fields.get(name, name): v for name, v in settings.items()}
    scheme = base.scheme
    if solver == "codebook":
        rounding["codebook"] = {}  # its defaults, and no clip
        if scheme.weights is not None:
            scheme = replace(scheme, weights=replace(scheme.weights, clip="none"))
    made = from_dict(SolverSpec, rounding, "solver")
    if settings and not made.needs_hessian:
        raise SpecError(f"the solver {made.kind} uses no Hessian: leave out {_options(settings)}, or take gptq")
    return replace(base, solver=made, scheme=scheme)


def _with_clip(base: Recipe, tensors: str, clip: str) -> Recipe:
    """The recipe with other ranges of weights, or of activations in a format."""
    from flatquant.spec import QuantSpec, from_dict, to_dict

    spec, option = getattr(base.scheme, tensors), f"{tensors.removesuffix('s')}-clip"
    if spec is None or spec.clip == "learned" or (tensors == "activations" and not spec.format):
        raise SpecError(f"method {base.name} at {base.scheme} leaves no ranges to choose: leave out --{option}")
    if clip not in ("none", "search"):
        raise SpecError(f"unknown {option.replace('-', ' ')} {clip!r}; known: none, search")
    made = from_dict(QuantSpec, to_dict(spec) | {"clip": clip}, tensors)
    return replace(base, scheme=replace(base.scheme, **{tensors: made}))


def _with_learned_rounding(base: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps of learned rounding."""
    from flatquant.spec import RoundingSpec

    if base.scheme.weights is None:
        raise SpecError(f"scheme {base.scheme} does not quantise weights: leave out --rounding-steps")
    learned = base.solver.learned or RoundingSpec()
    return replace(base, solver=replace(base.solver, learned=replace(learned, steps=steps)))


def _with_memory(base: Recipe, memory: str) -> Recipe:
    """The recipe whose end-to-end fit holds weights so."""
    from flatquant.recipes import recipe
    from flatquant.spec import EndToEndSpec, from_dict, to_dict

    fit = base.end_to_end or EndToEndSpec()
    held = from_dict(EndToEndSpec, to_dict(fit) | {"memory": memory}, "end_to_end")  # which knows the words
    if base.end_to_end is None or not fit.weight_lr:
        best = recipe(base.name, str(base.scheme), "best").end_to_end
        hint = ", or take --preset best" if best is not None and best.weight_lr else ""
        raise SpecError(f"this recipe of {base.name} trains no weights end to end: leave out --weight-memory{hint}")
    return replace(base, end_to_end=held)


def _options(names: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
