"""Which weights of an annotated graph are to be allocated, and which keep what the recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from qfx import annotation, graph
from qfx.allocation.budget import Stored
from qfx.analysis.units import Unit, by_weight, shape_of
from qfx.analysis.units import units as find_units
from qfx.errors import Note, explain
from qfx.format import Format
from qfx.live.segments import nbytes
from qfx.passes.annotate import kind_of
from qfx.recipe import KINDS, Recipe, Rule
from qfx.rounding.method_options import AllocationOptions

_ALLOCATED = ("linear", "embedding", "experts")


@dataclass
class Sites:
    """units: to be allocated. fixed: FQN -> (elements, bytes) of the others with a format; rules: why, of some of them.

    rest: bytes of everything else that the graph reads. skip: FQNs of calls whose weights are not allocated.
    """

    units: list[Unit] = field(default_factory=list)
    fixed: dict[str, tuple[int, int]] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    rest: int = 0
    skip: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def stored(self, candidates: Mapping[str, Sequence[Format]]) -> Stored:
        """What is stored, with the smallest of the candidates of each unit, or of the whole weight."""
        least = 0
        for fqn, own in by_weight(self.units).items():
            apart = sum(min(unit.nbytes(fmt) for fmt in candidates[unit.name]) for unit in own)
            common = [fmt for fmt in candidates[own[0].name] if all(fmt in candidates[unit.name] for unit in own)]
            least += min([apart, *(nbytes(fmt, shape_of(own), fqn) for fmt in common)])
        return Stored(least, sum(unit.elements for unit in self.units), self.rest, fixed=self.fixed, rules=self.rules)


def find(gm: fx.GraphModule, recipe: Recipe, options: AllocationOptions) -> Sites:
    """Weights that a rule for an op kind gives a format are allocated; a rule for a name keeps its own.

    So does, with a note, a weight that only some of its readers have in a format. Raises ValueError where nothing is to
    be allocated.
    """
    found = Sites()
    readers: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        weight = graph.weight_of(node) if kind_of(node) not in (None, "attention") else None
        if weight is not None:
            readers.setdefault(str(weight.target), []).append(node)
    shapes: dict[str, tuple[str, int, int]] = {}
    for held, nodes in readers.items():
        reason = _kept(nodes, recipe)
        if reason is None:
            continue
        found.skip += [graph.fqn_of(node) for node in nodes]
        formats = [(node, w) for node in nodes if (w := annotation.get(node).get("w")) is not None]
        if formats:
            node, w = formats[0]
            fqn, shape = graph.fqn_of(node), graph.val(node.args[0 if kind_of(node) == "embedding" else 1]).shape
            sizes = [int(size) for size in shape]
            shapes[held] = (fqn, int(shape.numel()), nbytes(w, sizes, fqn))
            found.rules[fqn] = reason
            if len(formats) < len(nodes):
                found.notes.append(Note(fqn, reason, "give all that read it a format, or none"))
    found.units, _, notes = find_units(gm, by=options.units, skip=found.skip)
    if not found.units:
        raise ValueError(
            explain(
                "there is no weight whose format is to be allocated",
                expected="a rule that gives weights of an op kind a format, such as target='linear', w='u4/g32/f16'",
                next_step="rules for names keep their formats; allocation takes the others",
            )
        )
    found.notes += notes
    found.fixed = {fqn: (count, size) for fqn, count, size in shapes.values()}
    partly = {held for held, nodes in readers.items() if any("w" not in annotation.get(node) for node in nodes)}
    found.rest = _rest(gm, {held for held in readers if held not in partly})
    return found


def candidates(unit: Unit, options: AllocationOptions) -> list[Format]:
    """The formats that a unit may have. Double-quantized scales go across experts, so that these have none of them."""
    texts = options.embeddings if unit.kind == "embedding" else options.formats
    return [fmt for text in texts if not ((fmt := Format.parse(text)).nested and unit.kind == "experts")]


def _kept(nodes: Sequence[fx.Node], recipe: Recipe) -> str | None:
    """Why the weight that these nodes read is not allocated, None where it is."""
    given = [node for node in nodes if "w" in annotation.get(node)]
    if not given:
        return "no rule gives it a format"
    if len(given) < len(nodes):
        other = next(node for node in nodes if node not in given)
        return f"its format is not allocated: {graph.fqn_of(other)}, which reads the same weight, has none"
    kinds = {str(kind_of(node)) for node in nodes}
    for node in nodes:
        rule = _rule(recipe, str(kind_of(node)), graph.fqn_of(node), tied={"linear", "embedding"} <= kinds)
        if rule is not None and rule.target not in KINDS:
            return f"the rule for {rule.target!r}, w={annotation.show(rule.formats('w'))},"
    return None if kinds.issubset(_ALLOCATED) else f"the format of a {'/'.join(sorted(kinds))}"


def _rule(recipe: Recipe, kind: str, fqn: str, *, tied: bool) -> Rule | None:
    """The rule that gives a node's weight its format."""
    matching = [r for r in recipe.rules if "w" in r.texts and r.matches(kind, fqn, tied=tied)]
    return matching[-1] if matching else None


def _rest(gm: fx.GraphModule, formatted: set[str]) -> int:
    """Bytes of the tensors that the graph reads, without those weights."""
    names = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"} - formatted
    tensors = {id(t): t for t in (graph.get_tensor(gm, name) for name in names)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
