"""Where in a live model the weights of a plan lie and what shall stand there: checked before anything changes.

For layouts see `qfx.layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from qfx.annotation import Formats, show
from qfx.errors import Note, UnsupportedError, explain, listed
from qfx.format import Format
from qfx.layouts import ALSO, READ, bare, is_transposed
from qfx.live.segments import segments
from qfx.passes.rewrites import rotations
from qfx.plan import Plan
from qfx.recipe import Recipe, is_static
from qfx.rounding.parts import check_finite
from qfx.storage.hollow import filled, is_hollow_leaf

Kind = Literal["linear", "conv", "table", "parameter"]


@dataclass(frozen=True)
class Place:
    """One planned weight: parameter `leaf` of module `owner`, its layout, formats, and what stands there afterwards.

    w: several formats only for kind "linear". kind: a QuantLinear (QuantMixed), QuantConv or QuantEmbedding in the
    module's place, or the packed parameter in the same module.
    """

    fqn: str
    owner: str
    leaf: str
    layout: str
    w: Formats
    x: Format | None
    kind: Kind

    @property
    def transposed(self) -> bool:
        """The module knows the weight as [.., K, N]."""
        return is_transposed(self.layout)


def find(model: nn.Module, plan: Plan) -> tuple[list[Place], list[Note]]:
    """The places of every weight that the plan quantizes, and notes about what cannot be had as planned.

    Raises ValueError where the model has no such parameter, it holds NaN or Inf or cannot be cut into as many parts as
    it has formats, UnsupportedError where a plan cannot be carried out in a live model (several formats of an input,
    the input of a foreign forward divided).
    """
    places: list[Place] = []
    notes: list[Note] = []
    missing = []
    for fqn, roles in plan.annotations.items():
        if "w" not in roles:
            continue
        at = held(model, fqn)
        if at is None:
            missing.append(fqn)
            continue
        found = _place(model, fqn, *at, plan)
        if isinstance(found, Note):
            notes.append(found)
        else:
            places.append(found)
    if missing:
        raise _missing(model, missing)
    for place in places:
        check_finite(model.get_submodule(place.owner)._parameters[place.leaf], place.fqn)  # type: ignore[arg-type]
    notes += [*_weight_only(model, places), *_conflicts(model, places), *_drawn_along(model, places, plan.recipe)]
    return [_without_x(p) for p in places], notes


def is_own_linear(module: nn.Module, layout: str) -> bool:
    """Does the module compute x W^T + b and nothing else, W held [N, K] ("linear") or [K, N] ("transposed")?

    nn.Linear's own forward does. Another leaf module of a weight and a bias is tried on three random rows.
    """
    if "forward" in module.__dict__ or layout not in ("linear", "transposed"):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    if is_hollow_leaf(module):
        module = filled(module)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    known = set(module._parameters) <= {"weight", "bias"} and not list(module.children())
    if weight is None or weight.dim() != 2 or not known:
        return False
    matrix = weight.detach() if layout == "linear" else weight.detach().t()
    rows = torch.randn(3, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    with torch.no_grad():
        try:
            found = module.forward(rows)
            wanted = nn.functional.linear(rows, matrix, bias)
        except Exception:  # noqa: BLE001  (whatever a foreign forward raises, it is no linear of these rows)
            return False
    near = 1e-4 if matrix.dtype in (torch.float32, torch.float64) else 3e-2
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, near, near)


def held(model: nn.Module, fqn: str) -> tuple[str, str] | None:
    """Owner module and name of the tensor that a planned FQN means; None where the model has none."""
    head, _, leaf = fqn.rpartition(".")
    for owner, name in ((fqn, "weight"), (head, leaf)):
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(module.__dict__.get(name, module._parameters.get(name, module._buffers.get(name))), Tensor):
            return owner, name
    return None


def _place(model: nn.Module, fqn: str, owner: str, leaf: str, plan: Plan) -> Place | Note:
    module, layout = model.get_submodule(owner), plan.layouts.get(fqn, "linear")
    w, x = plan.formats(fqn)["w"], plan.formats(fqn).get("x")
    if not isinstance(x, Format | None):
        what = f"the input of {fqn!r} has several formats"
        raise UnsupportedError(explain(what, expected="one format", next_step="plan one format for role 'x'"))
    step = "leave it out of the recipe (Recipe.ignore), or quantize the graph with torch.compile(backend='qfx')"
    if layout == "unknown":
        return Note(fqn, "its weight is reshaped before it is used, and stays in float", step)
    if leaf not in module._parameters:
        return Note(fqn, "its weight is no parameter (nn.Parameter) of the module, and stays in float", step)
    kind = kind_of(module, leaf, layout)
    if not isinstance(w, Format):
        if kind != "linear" or layout.endswith(READ):
            reason = "only the weight of a linear layer of its own takes several formats: stays in float"
            return Note(fqn, f"w={show(w)} was asked, but {reason}", "give it one format")
        w = _joined(w, module, fqn, layout)
    changed = "divides" if f"{fqn}/smooth" in plan.tensors else "rotates" if fqn in rotations(plan.rewrites) else ""
    if changed and kind != "linear":
        raise UnsupportedError(
            explain(
                f"the plan {changed} the input of {fqn!r}, which {type(module).__name__} feeds by itself",
                expected="an nn.Linear or Conv1D that can be replaced",
                next_step="add the name to the recipe's ignore list and plan again",
            )
        )
    if x is not None and is_static(x) and f"{fqn}/x_scale" not in plan.tensors:
        raise ValueError(f"the plan has no scale for the static format x={x} of {fqn!r}; next step: plan with data")
    return Place(fqn, owner, leaf, layout, w, x, kind)


def _joined(w: Formats, module: nn.Module, fqn: str, layout: str) -> Formats:
    """The formats of a linear's weight; one format where all are equal. ValueError where they do not fit its shape."""
    shape = module._parameters["weight"].shape  # type: ignore[union-attr]
    found = segments(w, shape[::-1] if layout.startswith("transposed") else shape, fqn)
    return found[0].format if len(found) == 1 else w


def kind_of(module: nn.Module, leaf: str, layout: str) -> Kind:
    """What shall stand in the place of a module's parameter of this layout."""
    if leaf != "weight":
        return "parameter"
    if isinstance(module, nn.Embedding):
        own = type(module).forward is nn.Embedding.forward and "forward" not in module.__dict__
        return "table" if own and module.max_norm is None and not layout.startswith("transposed") else "parameter"
    if layout.removesuffix(ALSO) == "patch":
        return "conv" if _is_own_conv(module) else "parameter"
    return "linear" if is_own_linear(module, bare(layout)) else "parameter"


def _is_own_conv(module: nn.Module) -> bool:
    own = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "forward" not in module.__dict__
    return own and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _reads_itself(place: Place) -> bool:
    return place.kind in ("parameter", "table") or place.layout.endswith(READ)


def _without_x(place: Place) -> Place:
    """An input is quantized only where qfx's own module reads the weight."""
    if place.x is None or not _reads_itself(place):
        return place
    return replace(place, x=None)


def _weight_only(model: nn.Module, places: list[Place]) -> list[Note]:
    """Weights that run weight-only, against what was asked."""
    step = "nothing, or a weight-only recipe for these names; torch.compile of the float model takes the format"
    notes = []
    for place in places:
        if place.x is not None and _reads_itself(place):
            kind = type(model.get_submodule(place.owner)).__name__
            reason = f"{kind}'s weight is read by a forward of its own: weight-only, not x={place.x}"
            notes.append(Note(place.fqn, reason, step))
    return notes


def _conflicts(model: nn.Module, places: list[Place]) -> list[Note]:
    """One weight in two formats is stored twice, and is not tied any more."""
    first: dict[int, Place] = {}
    notes = []
    for place in places:
        weight = model.get_submodule(place.owner)._parameters[place.leaf]
        assert weight is not None
        before = first.setdefault(weight.data_ptr(), place)
        if before.w != place.w:
            one, other = show(before.w), show(place.w)
            reason = f"its weight is tied to {before.fqn!r} (w={one}), and w={other} was asked: stored twice"
            notes.append(
                Note(place.fqn, reason, "give both one format (a rule with target 'tied') to store it once", minor=True)
            )
    return notes


def _drawn_along(model: nn.Module, places: list[Place], recipe: Recipe) -> list[Note]:
    """Tables whose weight is asked for as that of a linear alone, and the other way round: it is packed for both."""
    asked: dict[int, Place] = {}
    kinds: dict[int, set[bool]] = {}
    for place in places:
        module = model.get_submodule(place.owner)
        weight = module._parameters[place.leaf]
        assert weight is not None
        asked.setdefault(weight.data_ptr(), place)
        kinds.setdefault(weight.data_ptr(), set()).add(isinstance(module, nn.Embedding))
    notes = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        known = set() if weight is None or weight.is_meta else kinds.get(weight.data_ptr(), set())
        if weight is not None and known and isinstance(module, nn.Embedding) not in known:
            place, kind = asked[weight.data_ptr()], "embedding" if isinstance(module, nn.Embedding) else "linear"
            if not isinstance(place.w, Format) or "w" in recipe.formats_for(kind, path, tied=True):
                continue  # several formats are packed for the layer alone
            reason = (
                f"its weight is tied to {place.fqn!r} (w={show(place.w)}), and is rounded with it, though not asked"
            )
            notes.append(Note(path, reason, "give both a format (a rule with target 'tied'), or untie them ('untie')"))
    return notes


def _missing(model: nn.Module, names: list[str]) -> ValueError:
    return ValueError(
        explain(
            "the plan does not fit the model",
            expected=f"parameters of {type(model).__name__} named {listed(names)}",
            found="none of these names",
            next_step="plan again for this model",
        )
    )
