"""Give a linear that shares the embedding's table (lm_head) a weight of its own, to be scaled and quantized alone.

    %linear: f32[2,9] = aten.linear(%x, @embed.weight)
    ->
    %linear: f32[2,9] = aten.linear(%x, @lm_head.weight)

In a transformers model `config.tie_word_embeddings` has to become False as well, or saving and loading ties them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from qfx import graph
from qfx.errors import Note
from qfx.passes import _sites as sites
from qfx.passes._sites import Record
from qfx.storage.spill import beside


@dataclass(frozen=True)
class Site(Record):
    """A linear (its FQN) that reads the table `table` and shall have the weight `weight`, a name of a live model."""

    NAME: ClassVar[str] = "untie"

    linear: str
    table: str
    weight: str

    def present(self, module: nn.Module) -> bool:
        """Whether a graph has the table. A live model is asked for it, whatever it holds."""
        return sites.holds(module, self.table) or not isinstance(module, fx.GraphModule)


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every linear whose weight is an embedding's table, and those whose module has no weight of its own to set."""
    tables = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and _is_table(n)}
    found, refusals = [], []
    for node in gm.graph.nodes:
        table = next((name for name in tables if _reads(node, name)), None)
        if table is None:
            continue
        module = str(node.meta.get("qfx_module", ""))
        if _is_linear_module(node):
            found.append(Site(graph.fqn_of(node), table, f"{module}.weight".lstrip(".")))
        else:
            reason = f"it reads the table {table} in a module that is no nn.Linear"
            refusals.append(sites.note(node, reason, "leave it tied, or give the model an nn.Linear for it"))
    return found, refusals


def apply(module: nn.Module, site: Site) -> None:
    """Copy the table into a weight of the linear's own, in a graph or a live model."""
    old = graph.get_tensor(module, site.table)
    copy = beside(old.detach().clone(), old)
    new = nn.Parameter(copy, old.requires_grad) if isinstance(old, nn.Parameter) else copy
    if not isinstance(module, fx.GraphModule):
        if graph.get_tensor(module, site.weight) is not old:
            raise ValueError(f"expected {site.weight!r} to be tied to {site.table!r}, it is another tensor")
        owner = module.get_submodule(site.weight.rpartition(".")[0])
        setattr(owner, site.weight.rpartition(".")[2], new)
        return
    for node in list(module.graph.nodes):
        if _reads(node, site.table) and graph.fqn_of(node) == site.linear:
            node.update_arg(1, graph.add_tensor(module, site.weight, new, node))
    graph.clean(module)


def _reads(node: fx.Node, table: str) -> bool:
    """Is it a linear with this weight?"""
    weight = node.args[1] if graph.schema_name(node) == "aten::linear" else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == table


def _is_table(node: fx.Node) -> bool:
    return any(graph.schema_name(user) == "aten::embedding" and user.args[0] is node for user in node.users)


def _is_linear_module(node: fx.Node) -> bool:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return False
    kind = list(stack.values())[-1][1]
    return (isinstance(kind, type) and issubclass(kind, nn.Linear)) or str(kind).rpartition(".")[2] == "Linear"
