"""A method: `Recipe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flatquant import formats
from flatquant.spec.convert import check
from flatquant.spec.grids import CUT_SITES, SITES
from flatquant.spec.parts import BranchSpec, DataSpec, EndToEndSpec, FitSpec, RoundingSpec, SolverSpec, Transforms
from flatquant.spec.scheme import Scheme

LARGEST_SEED = 2**32 - 1  # that goes with everything that draws numbers
# Where transforms start that need calibration text for it.
DATA_STARTS = ("absmax", "second_moment", "center")
_RATES = ("lr", "clip_lr", "rotation_lr", "weight_lr", "code_lr")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: a choice of parts.

    `transforms` maps a site to what sits there; besides the sites there are `qk`, the keys and queries, and `residual`,
    the stream that blocks read through their norms and add to.
    """

    name: str
    scheme: Scheme
    transforms: Mapping[str, Transforms] = field(default_factory=dict)
    fit: FitSpec | None = None
    end_to_end: EndToEndSpec | None = None
    solver: SolverSpec = field(default_factory=SolverSpec)
    branch: BranchSpec | None = None
    data: DataSpec = field(default_factory=DataSpec)

    def __post_init__(self) -> None:
        check(
            self.branch is None or self.branch.rounds == 1 or self.solver.codebook is None,
            f"recipe {self.name}: a branch is refined by rounding to a grid, which codebooks are not; use one round",
        )
        unknown = sorted(set(self.transforms) - {*SITES, "qk", "residual"})
        known = ", ".join((*SITES, "qk", "residual"))
        check(not unknown, f"recipe {self.name}: no site {', '.join(unknown)}; sites are {known}")
        qk = self.transforms.get("qk", ())
        fits_qk = all(t.kind == "matrix" or (t.kind, t.init) == ("diagonal", "identity") for t in qk)
        check(fits_qk and len(qk) <= 1, f"recipe {self.name}: qk takes one matrix, or one diagonal that starts at 1")
        clipped = [s for s in (self.scheme.weights, self.scheme.activations) if s and s.clip == "learned"]
        self._check_residual()
        self._check_levels()
        static = self.scheme.activations is not None and self.scheme.activations.scope == "tensor"
        tensors = static or (self.scheme.weights is not None and self.scheme.weights.scope == "tensor")
        check(
            not tensors or not self.fits,
            f"recipe {self.name}: one scale for a tensor is set before a fit could change what it covers",
        )
        for site, parts in self.transforms.items():
            places = [{"shift": 0, "diagonal": 1}.get(t.kind, 2) for t in parts]
            check(
                places == sorted(set(places)),
                f"recipe {self.name}, {site}: at most one shift, one diagonal, one matrix or the like, in this order",
            )
        check(
            self.fits or not clipped or bool(self.transforms),
            f"recipe {self.name}: learned clipping needs a fit; use clip='none' or give the recipe a fit",
        )
        named = ", ".join(sorted(self.scheme.named("weights")))
        if self.solver.updates_scales:
            blocks = named and (self.scheme.weights is None or self.scheme.weights.format)
            whole = not any(isinstance(o.weights, int) and o.weights < 16 for o in self.scheme.overrides.values())
            check(bool(blocks) and whole, f"recipe {self.name}: only scales of a format's blocks are updated")
        if self.solver.learns:
            check(
                self.scheme.weights is None or self.scheme.weights.scope == "row",
                f"recipe {self.name}: rounding is learned with scales by row or group, not with one for a tensor",
            )
            check(not named, f"recipe {self.name}: rounding is learned for integers, not for {named}")
        check(
            self.solver.codebook is None or not named,
            f"recipe {self.name}: weights in {named} are not in codebooks; use bits",
        )
        if self.solver.codebook is not None and self.scheme.weights is not None:
            check(not self.fits, f"recipe {self.name}: fits round weights to a uniform grid, which codebooks are not")
            check(
                self.scheme.weights.clip == "none"
                and self.scheme.weights.group_size is None
                and self.scheme.weights.scope == "row",
                f"recipe {self.name}: codebooks have neither clip nor groups; use clip='none' and w{{bits}}",
            )
        if fit := self.block_fit:
            check(
                fit.batch_size <= self.data.samples,
                f"recipe {self.name}: batch size {fit.batch_size} exceeds {self.data.samples} samples",
            )
        if whole := self.whole_fit:
            check(
                self.fit is None or self.fit.inputs == "original",
                f"recipe {self.name}: no block is quantised before an end-to-end fit, so a fit on quantised inputs "
                "cannot come before one",
            )
            weights = self.scheme.weights
            check(
                whole.round_weights or weights is None or weights.clip != "learned",
                f"recipe {self.name}: weights that are not rounded in the fit have no clip to learn",
            )
            check(
                whole.batch_size <= self.data.samples,
                f"recipe {self.name}: end-to-end batch size {whole.batch_size} exceeds {self.data.samples} samples",
            )

    def tuned(
        self,
        *,
        samples: int | None = None,
        seqlen: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
    ) -> Self:
        """The same method with other settings, where it has them; all learning rates keep their proportions to `lr`."""
        given = {"samples": samples, "seqlen": seqlen}
        data = dataclasses.replace(self.data, **{k: v for k, v in given.items() if v is not None})
        first = self.fit or self.end_to_end
        ratio = 1.0 if lr is None or first is None else lr / first.lr

        def steps(part: Any) -> dict[str, Any]:
            rates = {k: getattr(part, k) * ratio for k in _RATES if hasattr(part, k)}
            return rates if batch_size is None else rates | {"batch_size": batch_size}

        fit, end_to_end = self.fit, self.end_to_end
        if fit is not None:
            fit = dataclasses.replace(fit, **steps(fit), epochs=fit.epochs if epochs is None else epochs)
        if end_to_end is not None:
            end_to_end = dataclasses.replace(end_to_end, **steps(end_to_end))
        solver = self.solver
        if solver.learned is not None and batch_size is not None:
            solver = dataclasses.replace(solver, learned=dataclasses.replace(solver.learned, batch_size=batch_size))
        return dataclasses.replace(self, data=data, fit=fit, end_to_end=end_to_end, solver=solver)

    def for_ranks(self, ranks: int) -> Self:
        """The same method for tensor parallelism: left factors in so many blocks where each rank holds a part.

        Raises:
            SpecError: there are no left factors.
        """
        transforms = {
            site: tuple(dataclasses.replace(t, ranks=ranks) if t.kind == "kronecker" else t for t in parts)
            for site, parts in self.transforms.items()
            if site in CUT_SITES
        }
        found = any(t.kind == "kronecker" for parts in transforms.values() for t in parts)
        check(found, f"recipe {self.name}: nothing at {' and '.join(CUT_SITES)} mixes what ranks hold; leave out ranks")
        return dataclasses.replace(self, transforms={**self.transforms, **transforms})

    def _check_residual(self) -> None:
        residual = self.transforms.get("residual", ())
        if not residual:
            return
        where = f"recipe {self.name}, residual"
        rotates = residual[0].kind == "matrix" and residual[0].parameters in ("fixed", "rotation")
        check(
            rotates and len(residual) == 1,
            f"{where}: takes one matrix that is fixed or a rotation; only those commute with a norm",
        )
        check(
            residual[0].parameters == "fixed" or self.block_fit is None,
            f"{where}: a rotation that all blocks share is trained end to end, not block by block",
        )
        for site in ("attn_in", "mlp_in"):
            started = any(t.init in DATA_STARTS or t.kind == "shift" for t in self.transforms.get(site, ()))
            check(
                not started,
                f"{where}: the statistics that transforms at {site} start from are those of the unrotated stream; "
                "start diagonals from the identity, and leave out shifts",
            )

    def _check_levels(self) -> None:
        weights, activations = self.scheme.weights, self.scheme.activations
        where = f"recipe {self.name}"
        if activations is not None and activations.kind == "levels":
            sited = any(parts for site, parts in self.transforms.items() if site != "qk")
            check(not sited, f"{where}: levels of activations are those of untransformed ones; leave out transforms")
        if weights is None or weights.kind != "levels":
            return
        moved = any(t.parameters != "fixed" for parts in self.transforms.values() for t in parts)
        check(not moved, f"{where}: weights on levels train themselves; only fixed transforms may come before them")
        check(
            self.solver.kind == "rtn" and not self.solver.learns and self.branch is None,
            f"{where}: the fit chooses levels and codes of weights; use the solver rtn, and no branch",
        )
        released = self.end_to_end is not None and (self.end_to_end.weight_lr or not self.end_to_end.round_weights)
        check(not released, f"{where}: there are no weights besides those on levels; use weight_lr 0 and round them")

    @property
    def fits(self) -> bool:
        """Whether anything is fitted, block by block or end to end."""
        return self.block_fit is not None or self.whole_fit is not None

    @property
    def block_fit(self) -> FitSpec | None:
        """The fit block by block, if it has an epoch."""
        return self.fit if self.fit is not None and self.fit.epochs else None

    @property
    def whole_fit(self) -> EndToEndSpec | None:
        """The fit end to end, if it has a step."""
        return self.end_to_end if self.end_to_end is not None and self.end_to_end.steps else None

    @property
    def feeds_fit(self) -> bool:
        """Whether a block is fitted on what the quantised blocks before it give."""
        return self.block_fit is not None and self.block_fit.inputs == "quantised"

    @property
    def learned_rounding(self) -> RoundingSpec | None:
        """How rounding is learned, if there are weights to round and it has a step."""
        return self.solver.learned if self.solver.learns and self.scheme.weights is not None else None

    @property
    def hessian(self) -> str | None:
        """The Hessian that weights are rounded by, if by any."""
        return self.solver.hessian if self.solver.needs_hessian and self.scheme.weights is not None else None

    @property
    def sees_original(self) -> bool:
        """Whether Gram matrices are of the original model's inputs."""
        return self.hessian is not None and self.solver.inputs == "original"

    @property
    def quantised_stream(self) -> bool:
        """Whether a block waits for what the quantised blocks before it give."""
        grams = self.hessian is not None and not self.sees_original
        return self.feeds_fit or grams or self.learned_rounding is not None

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all: plain rounding needs none."""
        starts = any(t.init in DATA_STARTS for parts in self.transforms.values() for t in parts)
        inputs = self.scheme.activations
        static = inputs is not None and (inputs.scope == "tensor" or inputs.needs_rows)
        found = {name for tensors in ("activations", "keys", "values") for name in self.scheme.named(tensors)}
        static |= any(formats.facts(name).tensor_scale for name in found)
        offset = self.scheme.key_offset == "mean"
        return self.fits or starts or static or offset or (self.solver.needs_data and self.scheme.weights is not None)
