"""A captured graph as one ONNX file: what an export is to do, and what is told of the file that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from qfx import graph
from qfx.capture import Captured
from qfx.errors import Note, UnsupportedError, explain
from qfx.graph import op_name
from qfx.live.segments import asked
from qfx.passes._match import arguments
from qfx.passes.annotate import kind_of
from qfx.pipeline import apply_plan, prepare, told
from qfx.plan import Plan, versions
from qfx.quantize import plan as make_plan
from qfx.recipe import Recipe
from qfx.reporting.rows import segment_of
from qfx.storage.spill import Spill, give_back

_ROLES = {role: f"{role}_format" for role in "xwqkvp"}


@dataclass(frozen=True)
class Order:
    """What an export is to do, its arguments checked. beside: notes on what it cannot do as asked."""

    recipe: Recipe | None
    plan: Plan | None
    data: Any
    runtime: str
    prefill: bool
    strict: bool
    external_bytes: int | None
    beside: tuple[Note, ...]

    def planned(self, model: nn.Module) -> Order:
        """The same with the plan that a recipe makes of data; a plan is checked against the model."""
        plan = self.plan
        if self.recipe is not None and self.recipe.needs_data:
            plan = make_plan(model, self.recipe, self.data, strict=self.strict)
        if plan is not None:
            plan.check(model, strict=self.strict)
        return replace(self, plan=plan)


@dataclass(frozen=True)
class Exported:
    """What was written. files: the model first. notes: what is not as asked. formats: by node, as in the metadata."""

    files: tuple[Path, ...]
    nbytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[Note, ...] = field(repr=False)
    formats: Mapping[str, Mapping[str, str]] = field(repr=False)
    shared_cache: bool = False  # a decoder whose cache grows where it lies

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.files[0]


def quantize(captured: Captured, order: Order, spill: Spill) -> list[Note]:
    """Bring the graph to the form in which plans speak of it, and quantize it where that is asked.

    Raises UnsupportedError for a graph that changes what it was given.
    """
    if captured.mutations:
        raise UnsupportedError(
            explain(
                "the model changes its inputs or buffers, which a file cannot",
                found=", ".join(sorted(captured.gm.meta["qfx_mutations"].values())),
                next_step="export a forward that returns what it changes",
            )
        )
    prepare(captured.gm)
    give_back()  # tracing makes much that goes
    if order.plan is None and order.recipe is None:
        return []
    recipe = order.recipe or Recipe.parse("w8a8")
    before = _readers(captured.gm)
    notes = apply_plan(captured.gm, order.plan, recipe, keep=spill.keep)
    return [*notes, *_stored_twice(before, _readers(captured.gm))]


def _readers(gm: fx.GraphModule) -> dict[str, set[str]]:
    """Float weight -> FQNs of the linears and embeddings that read it."""
    found: dict[str, set[str]] = {}
    for node in gm.graph.nodes:
        if kind_of(node) in ("linear", "embedding") and (weight := graph.weight_of(node)) is not None:
            found.setdefault(str(weight.target), set()).add(graph.fqn_of(node))
    return found


def _stored_twice(before: Mapping[str, set[str]], after: Mapping[str, set[str]]) -> list[Note]:
    """Layers that still read a float weight of which others read codes now. (A live model packs it for both.)"""
    notes = []
    for weight, names in after.items():
        if packed := before.get(weight, set()) - names:
            reason = (
                f"its weight is tied to {min(packed)!r}, which is packed, and no format was asked for it: stored twice"
            )
            step = "give both one format (a rule with target 'tied') to store it once"
            notes.append(Note(min(names), reason, step, minor=True))
    return notes


def write(
    captured: Captured, notes: Sequence[Note], target: Path, order: Order, spill: Spill,
    inputs: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    """Write a graph to `target`. notes: on what is not as asked so far; inputs: their names in the file, by those here
    (left out: those of the forward).

    Raises UnsupportedError for a graph without an ONNX form, and under `strict` for any note that is not minor; OSError
    where the file cannot be written.
    """
    from qfx.backends.onnx import export, lowering
    from qfx.backends.onnx.quant import is_float_product
    from qfx.backends.onnx.session_options import (
        FLOATS,
        FLOATS_KEY,
        INTEGERS,
        INTEGERS_KEY,
        float_note,
        has_integer_products,
    )

    gm = captured.gm
    outputs = _outputs(captured)
    give_back()
    builder, built = lowering.build(gm, runtime=order.runtime, prefill=order.prefill)
    give_back()
    _assert_no_floats(builder, gm)
    floats = order.runtime == "standard" and any(map(is_float_product, gm.graph.nodes))
    notes = (*notes, *built.notes, *([float_note(target.name)] if floats else []))
    told(notes, strict=order.strict)
    notes = (*_of_plan(order.plan, notes), *notes)
    formats = _formats(gm)
    pasts = [name for name in (inputs or {}).values() if name.startswith("past_key_values.")]
    shared_cache = bool(pasts) and _grows_in_place(built, len(pasts))
    metadata = {
        "qfx.formats": json.dumps(formats, sort_keys=True),
        "qfx.versions": json.dumps(versions(), sort_keys=True),
        "qfx.runtime": order.runtime,
        **({"qfx.cache": "shared" if shared_cache else "copied"} if pasts else {}),
        **({INTEGERS_KEY: INTEGERS} if has_integer_products(built.model.graph.node) else {}),
        **({FLOATS_KEY: FLOATS} if floats else {}),
        "qfx.notes": json.dumps([str(note) for note in notes]),
    }
    written = export.write(
        builder,
        built,
        target,
        outputs=outputs,
        documents={n.name: f"{graph.fqn_of(n)}: {graph.op_name(n)}" for n in gm.graph.nodes if n.op == "call_function"},
        metadata=metadata,
        external_bytes=export.EXTERNAL_BYTES if order.external_bytes is None else order.external_bytes,
        inputs=_own_names(gm, built) if inputs is None else inputs,
        rest=spill.rest,
    )
    names = tuple(i.name for i in built.model.graph.input)
    found = tuple(o.name for o in built.model.graph.output)
    return Exported(written.files, written.nbytes, written.opset, names, found, notes, formats, shared_cache)


def _of_plan(plan: Plan | None, notes: Sequence[Note]) -> list[Note]:
    """What was warned of when the plan was made, and is not among the notes of the file."""
    known = {(note.node, note.reason) for note in notes}
    made = [Note.parse(text) for text in plan.notes] if plan is not None else []
    return [note for note in made if (note.node, note.reason) not in known]


def _own_names(gm: fx.GraphModule, built: Any) -> dict[str, str]:
    """What the forward calls inputs that a graph calls otherwise: that takes no name of Python's, such as `input`."""
    taken = {tensor.name for tensor in built.model.graph.initializer}
    names = {node.name: op_name(node) for node in gm.graph.find_nodes(op="placeholder")}
    return {name: own for name, own in names.items() if own != name and own not in taken}


def _grows_in_place(built: Any, pasts: int) -> bool:
    """Does every layer's cache grow where it lies? pasts: how many inputs are keys or values of a layer."""
    from qfx.backends.onnx.branch import every_node

    nodes = built.model.graph.node
    fused = [node for node in nodes if any(n.op_type == "GroupQueryAttention" for n in every_node([node]))]
    return 2 * len(fused) == pasts


def _outputs(captured: Captured) -> list[str]:
    """The names of the graph's outputs. One tensor returned twice is two of them: programs count outputs, too."""
    results = captured.gm.graph.output_node().args[0]
    assert isinstance(results, Sequence)
    named = [name for result, name in zip(results, captured.outputs, strict=True) if isinstance(result, fx.Node)]
    if not named:
        raise UnsupportedError("expected a model that returns tensors, found none; next step: return at least one")
    return named


def _formats(gm: fx.GraphModule) -> dict[str, dict[str, str]]:
    """Formats of the quantized nodes by name."""
    found: dict[str, dict[str, str]] = {}
    parts: dict[str, list[tuple[str, int]]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("qfx."):
            continue
        given = arguments(node)
        roles = {r: str(given[k]) for r, k in _ROLES.items() if given.get(k)}
        fqn, segment = graph.fqn_of(node), segment_of(node)
        if segment is not None:
            axis, number, part = segment
            parts[fqn] = [*(parts[fqn] if number else []), part]
            roles["w"] = asked(parts[fqn], axis)
        if roles:
            found[fqn] = roles
    return found


def _assert_no_floats(builder: Any, gm: fx.GraphModule) -> None:
    """No quantized weight lies in the file as float32."""
    from qfx.backends.onnx.branch import read_by

    read = {name for node in builder.nodes for name in read_by(node)}
    weights = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and f"{n.target}.f32" in read]
    assert not weights, f"float copies of quantized weights: {weights[:3]}"
