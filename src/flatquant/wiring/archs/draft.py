"""A start for a new family: a description that fits the names in a model's blocks."""

from collections.abc import Mapping

from torch import Tensor, nn

from flatquant.runtime.experts import is_stacked

# What the linears of a site are called, in the families seen so far.
_NAMES = {
    "attn_in": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "key", "value"),
    "attn_out": ("o_proj", "out_proj", "dense", "wo"),
    "mlp_in": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h"),
    "mlp_mid": ("down_proj", "fc2", "w2", "dense_4h_to_h"),
}


def draft(model_type: str, model: nn.Module) -> str:
    """What a model's blocks hold, and a description that fits the names, or why there can be none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return f"There is no draft of a description: {type(model).__name__} has no list of blocks."
    path = max(lists, key=lambda name: len(list(lists[name].parameters())))
    block = max(lists[path], key=lambda block: sum(p.numel() for p in block.parameters()))  # one with experts, if any
    modules = {name: m for name, m in block.named_modules() if next(m.parameters(recurse=False), None) is not None}
    held = "".join(f"\n    {name}: {type(m).__name__} {_shape(m)}" for name, m in modules.items())
    edges, missing = _drafted_edges(modules)
    if missing:
        end = f"There is no draft of a description: no Linear of it is known as a reader of {' or '.join(missing)}."
    else:
        lines = "".join(f"\n        {edge}," for edge in edges)
        end = f"A draft: Arch(\n    model_types=({model_type!r},),\n    blocks={path!r},\n    edges=({lines}\n    ),\n)"
    return f"A block of {type(model).__name__} ({path}) holds{held}\n{end}"


def _drafted_edges(modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Literals of the edges of a block with these modules, and the sites that every description has and this lacks."""
    norms = [n for n, m in modules.items() if next(m.parameters(recurse=False)).ndim == 1 and "." not in n]
    experts = [name for name, m in modules.items() if is_stacked(m)]
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    linears += [f"{name}.*.{leaf}" for name in experts for leaf in ("gate_proj", "up_proj", "down_proj")]
    # Beside experts, whatever gives a number for each of them.
    routers = tuple(
        name
        for root in experts
        for name, m in modules.items()
        if _parent(name) == _parent(root) and _routes(m, modules[root])
    )
    edges, missing = [], []
    for site, names in _NAMES.items():
        readers = tuple(n for n in linears if n.split(".")[-1] in names and n not in routers)
        missing += [] if readers else [site]
        norm = f", norm={norms[site == 'mlp_in' and len(norms) > 1]!r}" if site.endswith("_in") and norms else ""
        chosen = f", routers={routers!r}" if site == "mlp_in" and routers else ""
        written = {"attn_out": ", writer='...', passes='per_head'", "mlp_mid": ", writer='...', passes='diagonal'"}
        edges.append(f"Edge(site={site!r}, readers={readers!r}{norm}{chosen}{written.get(site, '')})")
    return edges, missing


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shape(module: nn.Module) -> str:
    return "x".join(map(str, next(module.parameters(recurse=False)).shape))


def _routes(module: nn.Module, stacked: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    experts, _, hidden = stacked.get_parameter("gate_up_proj").shape
    return isinstance(weight, Tensor) and tuple(weight.shape) == (experts, hidden)
