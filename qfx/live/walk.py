"""A plan by module types alone, for a model whose graph cannot be had: what is seen is nn.Linear, Conv1D, nn.Embedding
and patch convolutions, not what a forward computes with parameters of its own.
"""

from __future__ import annotations

from torch import nn

from qfx.annotation import ALL_ROLES, to_json
from qfx.errors import Note, UnsupportedError, explain, listed
from qfx.layouts import READ
from qfx.live.places import is_own_linear
from qfx.plan import Plan
from qfx.recipe import Recipe

NO_GRAPH = "its graph cannot be had"  # how the note of such a plan begins


def walk(model: nn.Module, recipe: Recipe, reason: str, next_step: str) -> tuple[Plan, list[Note]]:
    """The plan of a recipe that needs neither data nor a graph, and one note: why, and which parameters were not seen.

    Raises UnsupportedError for recipes that need the graph.
    """
    if recipe.needs_data or recipe.rewrites:
        raise UnsupportedError(
            explain(
                f"recipe {recipe.name!r} needs the graph of the model, which cannot be had: {reason}",
                expected="a recipe without rewrites and static formats, such as 'w8a8'",
                next_step=next_step,
            )
        )
    made = Plan.of(model, recipe)
    seen: set[int] = set()
    tied = _tied(model)
    read = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for fqn, module in model.named_modules():
        found = _kind_and_layout(module)
        if found is None:
            continue
        kind, layout = found
        seen.add(id(module._parameters["weight"]))
        weight = module._parameters["weight"]
        assert weight is not None
        columns = weight.shape[0] if layout == "transposed" else weight.shape[1:].numel()
        formats = recipe.formats_for(kind, fqn, tied=id(weight) in tied, columns=columns)
        if "w" in formats:
            made.annotations[fqn or "weight"] = {r: to_json(formats[r]) for r in ALL_ROLES if r in formats}
            made.layouts[fqn or "weight"] = f"{layout}{READ}" if id(module) in read else layout
    unseen = [n for n, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point() and id(p) not in seen]
    rest = f"; not seen: {listed(unseen)}" if unseen else ""
    what = f"{NO_GRAPH} ({reason}), so its layers were found by their types{rest}"
    notes = [Note(type(model).__name__, what, next_step)]
    if any(recipe.formats_for("attention", rule.target) for rule in recipe.rules):
        notes.append(Note("attention", f"{NO_GRAPH} ({reason}): attention stays in float", next_step))
    return made, notes


def _tied(model: nn.Module) -> set[int]:
    """Weights that an embedding and a linear hold both, by id."""
    held: dict[str, set[int]] = {"embedding": set(), "linear": set()}
    for module in model.modules():
        found = _kind_and_layout(module)
        if found is not None:
            held[found[0]].add(id(module._parameters["weight"]))
    return held["embedding"] & held["linear"]


def _kind_and_layout(module: nn.Module) -> tuple[str, str] | None:
    """(op kind, layout) of a leaf module, as the graph of a model of such modules would say."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Embedding):
        return "embedding", "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = module.stride == module.kernel_size and module.groups == 1 and set(module.dilation) == {1}
        return ("linear", "patch") if plain and module.padding in ((0,) * len(module.stride), "valid") else None
    for layout in ("linear", "transposed"):
        if is_own_linear(module, layout):
            return "linear", layout
    return None
