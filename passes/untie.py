"""Give a linear that shares the embedding's table (lm_head) a weight of its own, to be scaled and quantized alone.

    %linear: f32[2,9] = aten.linear(%x, @embed.weight)
    ->
    %linear: f32[2,9] = aten.linear(%x, @lm_head.weight)

Where the table goes by the linear's name (its module stands first in the model), it gets the embedding's:

    %embedding: f32[2,4] = aten.embedding(@lm_head.weight, %ids)
    ->
    %embedding: f32[2,4] = aten.embedding(@embed.weight, %ids)

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
        own = _held_by(node)
        if not _is_module(node, nn.Linear):
            reason = f"it reads the table {table} in a module that is no nn.Linear"
            refusals.append(sites.note(node, reason, "leave it tied, or give the model an nn.Linear for it"))
        elif own == table and not all(_is_module(other, nn.Embedding) for other in _others(gm, table, node)):
            reason = f"the table {table}, which is its own weight, is read in a module that is no nn.Embedding"
            refusals.append(sites.note(node, reason, "leave it tied, or give the model an nn.Embedding for it"))
        else:
            found.append(Site(graph.fqn_of(node), table, own))
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
    linears = [n for n in module.graph.nodes if _reads(n, site.table) and graph.fqn_of(n) == site.linear]
    if site.table == site.weight:
        for other in _others(module, site.table, *linears):
            table = next(n for n in other.all_input_nodes if n.op == "get_attr" and n.target == site.table)
            other.replace_input_with(table, graph.add_tensor(module, _held_by(other), old, other))
        graph.set_tensor(module, site.weight, new)
    else:
        for node in linears:
            node.update_arg(1, graph.add_tensor(module, site.weight, new, node))
    graph.clean(module)


def _others(gm: fx.GraphModule, table: str, *linears: fx.Node) -> list[fx.Node]:
    """What else reads a table."""
    tables = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == table]
    return [user for node in tables for user in node.users if user not in linears]


def _held_by(node: fx.Node) -> str:
    """The name of the weight of the module that a node is called in."""
    return f"{node.meta.get('qfx_module', '')}.weight".lstrip(".")


def _reads(node: fx.Node, table: str) -> bool:
    """Is it a linear with this weight?"""
    weight = node.args[1] if graph.schema_name(node) == "aten::linear" else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == table


def _is_table(node: fx.Node) -> bool:
    return any(graph.schema_name(user) == "aten::embedding" and user.args[0] is node for user in node.users)


def _is_module(node: fx.Node, wanted: type[nn.Module]) -> bool:
    """Whether a node is called in a module of this class."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return False
    kind = list(stack.values())[-1][1]
    return (isinstance(kind, type) and issubclass(kind, wanted)) or str(kind).rpartition(".")[2] == wanted.__name__
