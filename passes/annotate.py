"""Write the formats that a recipe asks for on the nodes that can take them.

%linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)
->
%linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=i8/tok w=i8/ch
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from qfx import annotation, graph
from qfx.annotation import Formats, each
from qfx.errors import Note, source_line
from qfx.format import Format
from qfx.layouts import READ, is_transposed, layout_of
from qfx.live.segments import segments
from qfx.names import is_within
from qfx.ops import heads as attention_heads
from qfx.ops.attention import reason_against
from qfx.passes.angles import becomes_angle
from qfx.passes.normalize import left_over
from qfx.recipe import Recipe

KIND_OF = {
    "aten::linear": "linear",
    "aten::embedding": "embedding",
    "aten::scaled_dot_product_attention": "attention",
    "qfx::attention": "attention",
    "qfx::grouped_linear": "experts",
    "aten::conv1d": "conv",
    "aten::conv2d": "conv",
    "aten::conv3d": "conv",
    "aten::convolution": "conv",
}


def kind_of(node: fx.Node) -> str | None:
    """The op kind of a node as recipes name it (linear, experts, embedding, attention, conv), or None."""
    return KIND_OF.get(graph.schema_name(node)) if node.op == "call_function" else None


def annotate(gm: fx.GraphModule, recipe: Recipe) -> list[Note]:
    """Annotate every linear, grouped linear, embedding, attention and convolution. Former annotations are replaced.

    Returns a note for each node that cannot have what the recipe asks: such a node is left in float. Raises ValueError
    where a weight's rows or columns cannot be cut into as many parts as it has formats.
    """
    notes = []
    tied = _tied(gm)
    for node in gm.graph.nodes:
        kind = kind_of(node)
        if kind is None:
            continue
        annotation.clear(node)
        fqn = graph.fqn_of(node)
        formats = recipe.formats_for(kind, fqn, tied=node in tied, columns=_columns(node))
        if not formats:
            continue
        refusal = _refusal(node, kind, formats)
        if refusal is not None:
            reason, next_step = refusal
            notes.append(Note(fqn, reason, next_step, source_line(node) or ""))
            continue
        if kind == "linear" and "w" in formats:
            segments(formats["w"], graph.val(node.args[1]).shape, fqn)
        for role, fmt in formats.items():
            annotation.set(node, role, fmt)
    return [*notes, *_no_layers(gm, recipe), *_no_lookups(gm, recipe)]


def _columns(node: fx.Node) -> int | None:
    """The last axis of a weight, along which groups lie; None for a node without a weight of such a shape."""
    operand = graph.weight_operand(node)
    shape = () if operand is None else graph.val(operand).shape
    return int(shape[-1]) if shape else None


def one_of_each_name(gm: fx.GraphModule, layouts: Mapping[str, str]) -> list[Note]:
    """Nodes for which a plan has no place lose formats and name: by a name it knows one weight, one way round, as do
    scales, rounded values and statistics. A note for each.

    They read a weight the other way round than it is stored for others of its name (the decoder of an autoencoder with
    one weight), or another weight than these (a forward that reads its own and another module's).

    layouts: FQN -> how it is stored; of others the module's own reading decides, else the first.
    """
    readers = [(n, graph.fqn_of(n), graph.weight_of(n)) for n in gm.graph.nodes if "w" in annotation.get(n)]
    known = [(node, fqn, str(weight.target)) for node, fqn, weight in readers if weight is not None]
    named: dict[str, str] = {}
    for _, fqn, target in known:
        if named.setdefault(fqn, target) != target and is_within(target, fqn):
            named[fqn] = target
    turned = {fqn: is_transposed(layout) for fqn, layout in layouts.items() if layout != "unknown"}
    rest = [(node, fqn) for node, fqn, target in known if named[fqn] == target and fqn not in turned]
    for node, fqn in sorted(rest, key=lambda reader: layout_of(reader[0]).endswith(READ)):  # the modules' own first
        turned.setdefault(fqn, _turns(node))
    notes = []
    for node, fqn, target in known:
        if named[fqn] != target:
            reason, name = f"it reads {target}, and another node of this name {named[fqn]}", target
        elif _turns(node) != turned[fqn]:
            reason, name = f"it reads {target} the other way round than it is stored", f"{fqn}.transposed"
        else:
            continue
        annotation.clear(node)
        node.meta[graph.NAMED] = name
        step = "nothing, or a layer for each"
        notes.append(Note(name, f"{reason}: stays in float", step, source_line(node) or ""))
    return notes


def _turns(node: fx.Node) -> bool:
    """Whether it reads its weight transposed, be the layout known or not (a convolution's kernel, reshaped)."""
    operand = graph.weight_operand(node)
    return operand is not None and graph.is_turned(operand)


def _no_layers(gm: fx.GraphModule, recipe: Recipe) -> list[Note]:
    """A note for each product with a float parameter to which a rule for linears or convolutions would apply."""
    notes = []
    for node in left_over(gm):
        held = [graph.val(n) for n in map(graph.parameter_behind, node.all_input_nodes) if n is not None]
        fqn, floats = graph.fqn_of(node), any(w.is_floating_point() and w.dim() > 1 for w in held)
        kind = "conv" if graph.op_name(node).startswith("conv") else "linear"
        if kind_of(node) is None and floats and "w" in recipe.formats_for(kind, fqn):
            what = (
                f"{graph.op_name(node)} multiplies by a parameter, and has no form with packed weights: stays in float"
            )
            step = "exclude it with Recipe.ignore, or express it by linear layers"
            notes.append(Note(fqn, what, step, source_line(node) or ""))
    return notes


def plain_tables(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """FQN -> who reads it, of each float matrix that is called `weight` and that no node reads which could have it
    packed: relative positions that a norm reads, a table that is cut. Those of which another weight is computed are
    told there."""
    known = set[object]()
    for node in gm.graph.nodes:
        operand = graph.weight_operand(node)
        known |= {constant.target for constant in _constants(operand)} if operand is not None else set()
    behind = (graph.parameter_behind(argument) for node in left_over(gm) for argument in node.all_input_nodes)
    known |= {weight.target for weight in behind if weight is not None}
    found: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        if node.op == "get_attr" and leaf == "weight" and node.users and node.target not in known:
            value = graph.val(node)
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and value.shape[0] > 1:
                found.setdefault(path, min(node.users, key=lambda user: user.op == "output"))
    return found


def _constants(operand: fx.Node) -> set[fx.Node]:
    """The constants that a value is computed of; where an input is among these, those that its call itself reads."""
    found = graph.above(operand)
    if any(node.op == "placeholder" for node in found):
        found = set(operand.all_input_nodes)
    return {node for node in found if node.op == "get_attr"}


def _no_lookups(gm: fx.GraphModule, recipe: Recipe) -> list[Note]:
    """A note for each of the plain tables to which a rule for embeddings or linears would apply."""
    notes = []
    for path, reader in plain_tables(gm).items():
        if any("w" in recipe.formats_for(kind, path) for kind in ("embedding", "linear")):
            how = "behind a graph break" if reader.op == "output" else f"by {graph.op_name(reader)}"
            what = f"its weight is read as a plain tensor ({how}), not looked up: stays in float"
            step = "exclude it with Recipe.ignore, or read it by nn.Embedding's own forward"
            notes.append(Note(path, what, step, source_line(reader) or ""))
    return notes


def _tied(gm: fx.GraphModule) -> set[fx.Node]:
    """Embeddings and linears that read one table."""
    readers: dict[str, dict[str, list[fx.Node]]] = {"embedding": {}, "linear": {}}
    for node in gm.graph.nodes:
        found = readers.get(kind_of(node) or "")
        weight = None if found is None else graph.weight_of(node)
        if found is not None and weight is not None:
            found.setdefault(str(weight.target), []).append(node)
    shared = readers["embedding"].keys() & readers["linear"].keys()
    return {node for found in readers.values() for name in shared for node in found[name]}


def _refusal(node: fx.Node, kind: str, formats: dict[str, Formats]) -> tuple[str, str] | None:
    """Why a node cannot have these formats and what to do, or None."""
    for role, fmt in formats.items():
        reason = attention_reason(role, fmt) if kind == "attention" else _bad_formats(fmt, role, kind)
        if reason:
            return f"{role}={annotation.show(fmt)} was asked, but {reason}", f"give role {role!r} another format"
    if kind == "attention" and (reason := attention_heads.reason_against(formats)):
        return reason, "give each operand a format that goes with the others"
    if kind == "attention" or ("w" not in formats and "x" not in formats):
        return None
    weight = graph.weight_of(node)
    if weight is None:
        return (
            "its weight is computed in the graph, not a parameter",
            "exclude it with Recipe.ignore, or bake the weight in (torch.nn.utils.parametrize.remove_parametrizations)",
        )
    if kind == "linear" and becomes_angle(node):
        return (
            "sin and cos are taken of its result: rounded, an angle of many turns means another place",
            "nothing, or exclude it with Recipe.ignore: it has too few columns to save anything",
        )
    value = weight.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        state = "which no format holds" if value.is_complex() else "quantized already"
        return f"its weight is {value.dtype}, {state}", "exclude it with Recipe.ignore"
    return None


def attention_reason(role: str, fmt: Formats) -> str | None:
    """Why no attention takes this format of an operand, or None."""
    if not isinstance(fmt, Format | tuple):
        return "attention has no columns"
    return next((reason for one in each(fmt) if (reason := reason_against(role, one))), None)


def _bad_formats(fmt: Formats, role: str, kind: str) -> str | None:
    if isinstance(fmt, Format):
        if kind == "experts" and fmt.nested:
            return "double-quantized scales go across experts"
        return _bad_weight_format(fmt) if role == "w" else _bad_activation_format(fmt)
    if role != "w" or kind != "linear":
        return "only the weight of a linear takes several formats"
    return next((reason for one in each(fmt) if (reason := _bad_weight_format(one))), None)


def _bad_weight_format(fmt: Format) -> str | None:
    if fmt.dynamic:
        return "a weight's scale is not found at run time"
    if fmt.granularity == "head":
        return "a weight has no axis of heads"
    return None


def _bad_activation_format(fmt: Format) -> str | None:
    if fmt.is_plain or fmt.dynamic:
        return None
    if fmt.group or fmt.block:
        return "an activation in groups needs scales found at run time (`/dyn`)"
    if fmt.granularity == "head":
        return "only attention has an axis of heads"
    return None
