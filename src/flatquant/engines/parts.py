"""The serving modules of a folder, one by one, for an engine that has a model of its own.

An engine builds its model, and asks here for what computes a linear, the experts of a block, or the queries, keys and
values of an attention module: the very modules that `flatquant.load` would put there, filled from the folder's files.
So an engine computes what was calibrated, by the same arithmetic, and whatever a folder can hold can be served.

With tensor parallelism a rank holds some rows of a linear (all ranks read the same tensor, and each transforms it), or
some columns of one that reads what the ranks hold parts of. Where the left factor is block-diagonal and the number of
ranks divides that of its blocks, a rank transforms its part by itself; all that ranks tell one another are the ends of
a row, which its grid covers. Elsewhere the parts are gathered and transformed whole, and the rank goes on with its own
columns of the result. Weights were rounded before, and are cut, never rounded again.

`Parts.kernels` makes of linears that read one site the two operators that have kernels on CUDA; on a CPU these compute
the same bits as the modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flatquant.errors import ArtifactError, ModelError
from flatquant.formats import kinds
from flatquant.modules import Site, share_inputs
from flatquant.ops import int4_linear, kron_quantize
from flatquant.ops.kron_quantize.reference import of_rows, on_grid
from flatquant.qtensor import QTensor
from flatquant.quantizers import Dynamic
from flatquant.rotary import Angles
from flatquant.runtime import artifact
from flatquant.runtime.branch import BranchedLinear
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.experts import Experts
from flatquant.runtime.folder import Folder
from flatquant.runtime.kernels import KernelLinear, Product, kernel_site, packed_linear
from flatquant.runtime.keyvalue import FrozenKeyValue
from flatquant.runtime.linear import DenseLinear, FrozenLinear, FrozenSite, PackedLinear, SiteLinear
from flatquant.seams import attached
from flatquant.spec import Pairing, Plan, SitePlan

Linear = SiteLinear | BranchedLinear


class Joined(nn.ModuleList):
    """Linears that read one site, as one whose rows are theirs, one after another; the site computes once."""

    def __init__(self, linears: Iterable[Linear]) -> None:
        super().__init__(linears)
        share_inputs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(.., n) -> (.., o)"""
        return torch.cat([linear(x) for linear in self], dim=-1)


class Turning:
    """A rotary embedding of transformers, at positions that an engine names."""

    def __init__(self, rotary: nn.Module, kind: tuple[str, ...]) -> None:
        """
        Args:
            kind: of layers that are turned by it, where the model has several.
        """
        self._rotary, self._kind = rotary, kind
        self._tables: dict[tuple[int, torch.dtype, Pairing], Tensor] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Cosines and sines of positions (T,).  # (1, T, r)"""
        like = torch.empty(1, dtype=dtype, device=positions.device)
        return Angles(*self._rotary(like, positions[None], *self._kind))

    def table(self, length: int, dtype: torch.dtype, pairing: Pairing, device: torch.device) -> Tensor:
        """Of positions 0, 1, .., one cosine and one sine a pair of channels; computed once.  # (length, r)"""
        key = length, dtype, pairing
        if key not in self._tables:
            self._tables[key] = self(torch.arange(length, device=device), dtype).of_pairs(pairing)[0].contiguous()
        return self._tables[key]


def positions(starts: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Of a batch's tokens in their requests; those that pad the batch have any.  # int64, (T,)

    Args:
        starts, lengths: vLLM's `query_start_loc`, (R + 1,), and `seq_lens`, (R,).
    """
    token = torch.arange(tokens, device=starts.device)
    request = torch.searchsorted(starts[1:].contiguous(), token, right=True).clamp(max=len(lengths) - 1)
    return (lengths[request] - starts[request + 1] + token).clamp(min=0).long()


class Parts:
    """The serving modules of one folder. Tensors are read when a part is asked for."""

    def __init__(self, folder: Folder) -> None:
        """
        Raises:
            ArtifactError: the config, the plan and the stored tensors do not fit one another.
            ModelError: something in it is none of these parts.
        """
        self.folder, self.plan = folder, folder.plan
        self._stored = folder.tensors()
        self._model = artifact.skeleton(folder, self._stored)
        check_parts(self._model, self.plan)
        self._held: Tensor | None = None
        self._turning: dict[tuple[str, ...], Turning] = {}

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> Linear:
        """A linear by its path in the model, with its site.

        Args:
            dtype: of an unquantised weight.
        """
        linear, site = self._filled(path, device), site_of(self.plan, path)
        assert site is not None, path
        self._filled(site[0], device)
        if isinstance(linear, DenseLinear):
            linear.weight = linear.weight.to(dtype)
        return linear

    def kernels(self, linears: list[Linear], where: str) -> KernelLinear:
        """Linears that read one site as operators; they may be a rank's part.

        Raises:
            Unsupported: there are none; ends with the reason.
        """
        packed = [packed_linear(linear, where) for linear in linears]
        device = packed[0].packed.device
        site, n = packed[0].site, packed[0].n
        cut = site if isinstance(site, Gathered | Own) else None
        if cut is not None:
            site, n = cut.site, n * (cut.ranks if isinstance(cut, Gathered) else 1)
        assert isinstance(site, FrozenSite)
        made = kernel_site(site, n, None, where, device)

        def quantize(x: Tensor, form: kron_quantize.Form) -> tuple[Tensor, Tensor]:
            if cut is not None and form == "either" and torch.compiler.is_compiling():
                form = "float8"  # outside of operators, "either" would be chosen by the number of rows that is traced
            match cut:
                case Gathered():
                    values, scale = kron_quantize.plain(cut.gather(x), made, form)
                    return cut.own_integers(values, form), scale
                case Own():  # no kernel: the scale is known when the other ranks have told
                    y = cut.site.transformed(x)
                    return on_grid(y, cut.ends(y), made.ratios, made.bits, form)
            return kron_quantize.plain(x, made, form)

        return KernelLinear(quantize, Product.of(packed), self._scratch(device))

    def _scratch(self, device: torch.device) -> Tensor | None:
        """Of all products of this model, which an engine computes one after another."""
        if self._held is None:
            self._held = int4_linear.scratch(self._scratch_bytes, device)
        return self._held

    @cached_property
    def _scratch_bytes(self) -> int:
        largest = 0
        for index, block in enumerate(self.plan.blocks):
            for site in (site for site in block.sites.values() if len(site.groups) == 1):
                paths = [f"{self.plan.blocks_path}.{index}.{reader}" for reader in site.readers]
                linears = [
                    linear for path in paths if isinstance(linear := self._model.get_submodule(path), PackedLinear)
                ]
                rows = sum(len(linear.packed) for linear in linears)
                largest = max(largest, int4_linear.scratch_bytes(rows, site.shape[0] * site.shape[1]))
        return largest

    def experts(self, path: str, device: torch.device, dtype: torch.dtype) -> Experts:
        """The experts of a block, with their sites."""
        experts = self._model.get_submodule(path)
        assert isinstance(experts, Experts)
        for index, expert in enumerate(experts):
            for name, _ in expert.named_children():
                self.linear(f"{path}.{index}.{name}", device, dtype)
        share_inputs(experts)
        return experts

    def key_value(self, block: int, device: torch.device) -> FrozenKeyValue:
        """What happens to the queries, keys and values of a block."""
        path = f"{self.plan.blocks_path}.{block}.{self.plan.attention}"
        kv = attached(self._model.get_submodule(path))
        assert isinstance(kv, FrozenKeyValue)
        self._fill(kv, f"{path}.flatquant_kv", device)
        return kv

    def angles(self, block: int, device: torch.device) -> Turning:
        """The model's own rotary embedding, as a block's attention is given it; blocks of one kind share it."""
        config: Any = self._model.config
        rotary = getattr(self._model.base_model, "rotary_emb", None)
        if rotary is None:
            raise ModelError(
                f"{config.model_type} has no rotary embedding where it is looked for; its keys have an offset"
            )
        several = "layer_type" in inspect.signature(rotary.forward).parameters
        kind = (config.layer_types[block],) if several else ()
        if kind not in self._turning:  # the skeleton's rotary embedding is on the meta device
            self._turning[kind] = Turning(type(rotary)(config=config).to(device), kind)
        return self._turning[kind]

    def _filled(self, path: str, device: torch.device) -> Any:
        module = self._model.get_submodule(path)
        self._fill(module, path, device)
        return module

    def _fill(self, module: nn.Module, path: str, device: torch.device) -> None:
        if not any(t.is_meta for t in module.state_dict().values()):
            return  # a site that another reader has asked for
        names = {f"{path}.{name}" for name in module.state_dict()}
        state = artifact.read_tensors(self.folder, {n: self._stored[n] for n in names}, device)
        module.load_state_dict({name.removeprefix(f"{path}."): t for name, t in state.items()}, assign=True)


def check_parts(model: nn.Module, plan: Plan) -> None:
    """Raise ModelError unless all that a plan quantises in a model are parts that an engine can ask for."""
    for index, block in enumerate(plan.blocks):
        root = f"{plan.blocks_path}.{index}"
        for path in (f"{root}.{reader}" for site in block.sites.values() for reader in site.readers):
            linear = model.get_submodule(path)
            if not isinstance(linear, Linear):
                raise ModelError(f"{path} is a {type(linear).__name__}, which no engine takes")
        if block.latent is not None:
            raise ModelError(f"block {index} caches latent vectors, which no engine takes")
        if block.attended and not isinstance(attached(model.get_submodule(f"{root}.{plan.attention}")), FrozenKeyValue):
            raise ModelError(f"nothing is attached to {root}.{plan.attention}, whose keys and values the plan rounds")


def site_of(plan: Plan, path: str) -> tuple[str, SitePlan] | None:
    """Path and plan of the site that a linear reads; None if it is not quantised."""
    index, _, reader = path.removeprefix(f"{plan.blocks_path}.").partition(".")
    sites = plan.blocks[int(index)].sites if index.isdecimal() and int(index) < len(plan.blocks) else {}
    found = ((f"{plan.blocks_path}.{index}.{SITES_SLOT}.{name}", site) for name, site in sites.items())
    return next((pair for pair in found if reader in pair[1].readers), None)


# --------------------------------------------------------------------------------------------- ranks


class Gathered(Site):
    """A site whose input the ranks hold parts of; gives the columns of one rank."""

    def __init__(self, site: Site, gather: Callable[[Tensor], Tensor], rank: int, ranks: int) -> None:
        """
        Args:
            gather: the whole of a tensor's last dimension from the rank's part of it.
        """
        super().__init__()
        self.site, self.gather, self.rank, self.ranks = site, gather, rank, ranks

    def forward(self, x: Tensor) -> Tensor | QTensor:
        """(.., n / ranks) -> (.., n / ranks)"""
        y = self.site(self.gather(x))
        if isinstance(y, QTensor):
            return QTensor(values=self._own(y.values), scale=y.scale, zero=y.zero, spec=y.spec)
        return self._own(y)

    def _own(self, y: Tensor) -> Tensor:
        return y.chunk(self.ranks, dim=-1)[self.rank]

    def own_integers(self, values: Tensor, form: kron_quantize.Form) -> Tensor:
        """This rank's columns of integers in a form, planes or one by one.  # (T, n) -> (T, n / ranks)"""
        planes = 2 if of_rows(form, len(values)) == "planes" else 1
        return self._own(values.unflatten(-1, (planes, -1))).flatten(-2).contiguous()

    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        return x[index]


class Own(Site):
    """A rank's part of a site that transforms what each rank holds by itself."""

    def __init__(self, site: FrozenSite, gather: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            site: with the rank's part of shift and left factor.
            gather: see `Gathered`.
        """
        super().__init__()
        self.site, self.gather = site, gather

    def forward(self, x: Tensor) -> Tensor | QTensor:
        """(.., n / ranks) -> (.., n / ranks)"""
        grid, y = self.site.activations, self.site.transformed(x)
        return grid.quantize(y, self.ends(y)) if isinstance(grid, Dynamic) else y.to(x.dtype)

    def ends(self, y: Tensor) -> Tensor:
        """Smallest and largest numbers of the parts of a row, whose extremes are the row's.  # (.., 2 ranks)"""
        return self.gather(torch.stack((y.amin(-1), y.amax(-1)), dim=-1))

    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        return x[index]


def cut_site(site: FrozenSite, plan: SitePlan, gather: Callable[[Tensor], Tensor], rank: int, ranks: int) -> Site:
    """A site of which a rank holds and gives a part: `Own` where that is enough, else `Gathered`.

    Raises:
        ArtifactError: the left factor is not in the blocks that the plan says it has.
    """
    apart = plan.ranks % ranks == 0 if site.left is not None else site.right is None or plan.shape[0] % ranks == 0
    if not apart or not isinstance(site.activations, Dynamic | None):
        return Gathered(site, gather, rank, ranks)
    left, shift = site.left, site.shift
    if left is not None:
        size = len(left) // ranks
        rows = left[rank * size : (rank + 1) * size]
        left = rows[:, rank * size : (rank + 1) * size]
        if rows.count_nonzero() != left.count_nonzero():
            raise ArtifactError(f"the left factor of {plan.readers[0]} is not in {plan.ranks} blocks, as its plan says")
    if shift is not None:
        shift = shift.chunk(ranks)[rank]
    return Own(FrozenSite(left, site.right, site.activations, shift=shift), gather)


def check_ranks(name: str, site: SitePlan, ranks: int, *, columns: bool) -> None:
    """Raise ModelError unless a site's linears can be cut for this many ranks.

    Args:
        name: of the site, for the message.
        columns: every rank has some columns, not rows.
    """
    weights, (n1, n2) = site.weights, site.shape
    group = (weights.group_size if weights is not None else None) or 1
    why = None
    if len(site.groups) > 1:
        why = "a mixture of experts"
    elif site.codebook is not None or site.rank or (weights is not None and kinds.of(weights) is not None):
        why = "weights in a codebook, on levels, in a format of floats, or beside a branch"
    elif any(reader.endswith(("qkv_proj", "gate_up_proj")) for reader in site.readers):
        why = "one matrix for several outputs"
    elif columns and site.activations is not None and site.activations.scope == "tensor":
        why = "activations on a grid that splits channels"
    elif columns and n1 * n2 % (ranks * group):
        why = f"{n1 * n2} columns" + (f" in groups of {group}" if group > 1 else "")
    if why is not None:
        raise ModelError(f"{name} cannot be cut for {ranks} ranks: it has {why}; use fewer")


def share(whole: int, own: int, rank: int, ranks: int) -> slice:
    """A rank's part of `whole` rows or heads, `own` in number; where there are fewer parts than ranks, that of its
    group."""
    start = rank * (whole // own) // ranks * own
    return slice(start, start + own)


def rows_of(linear: Linear, own: int, rank: int, ranks: int) -> Linear:
    """A rank's rows of a linear, `own` in number; see `share`."""
    if isinstance(linear, DenseLinear):
        rows = share(len(linear.weight), own, rank, ranks)
        return DenseLinear(linear.site, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    assert isinstance(linear, PackedLinear)
    rows = share(len(linear.packed), own, rank, ranks)
    bias = None if linear.bias is None else linear.bias[rows]
    return PackedLinear.of(FrozenLinear(linear.site, linear.qweight().rows(rows), bias))


def columns_of(linear: Linear, plan: SitePlan, gather: Callable[[Tensor], Tensor], rank: int, ranks: int) -> Linear:
    """A rank's columns of a linear that reads what ranks hold parts of; the sum over ranks is the linear's output.

    Args:
        plan: of the site that it reads.
        gather: the whole of a tensor's last dimension from the rank's part of it.
    """
    site: Any = cut_site(linear.site, plan, gather, rank, ranks)
    bias = linear.bias if rank == 0 else None
    if isinstance(linear, DenseLinear):
        return DenseLinear(site, linear.weight.chunk(ranks, dim=-1)[rank], bias)
    assert isinstance(linear, PackedLinear)
    w = linear.qweight()

    def own(grid: Tensor) -> Tensor:
        return grid if grid.shape[-1] == 1 else grid.chunk(ranks, dim=-1)[rank]

    values, zero = w.values.chunk(ranks, dim=-1)[rank], None if w.zero is None else own(w.zero)
    cut = QTensor(values=values, scale=own(w.scale), zero=zero, spec=w.spec)
    return PackedLinear.of(FrozenLinear(site, cut, bias))
