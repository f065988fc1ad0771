"""`qfx.prepare_qat`: training with fake quantization; `qfx.convert` then gives what was trained, quantized.

    model = qfx.prepare_qat(model, "w4a8")       # the same plan as qfx.quantize would make, weights stay float
    ...                                          # any training loop
    model = qfx.convert(model)                   # packed modules, as qfx.quantize gives them

The weights of a prepared model are its own parameters, and so are the scales (`scales="learned"`); a state_dict holds
both, and is loaded into a model prepared with the same recipe or plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qfx.annotation import show
from qfx.backends.qat.quantizers import InputQuantizer, Quantizer, RunTimeInput, Scales, WeightQuantizer
from qfx.errors import Note, check_flags, explain, listed
from qfx.format import Format
from qfx.hf.attach import mark_training
from qfx.kv.live import with_caches
from qfx.kv.planning import check_model
from qfx.kv.plans import Cached
from qfx.layouts import ALSO, READ
from qfx.live.attending import Spec
from qfx.live.modules import PREPARED, prepared_parts, without_fast_paths
from qfx.live.places import Place
from qfx.live.segments import along, in_order, segments
from qfx.live.writeback import cut, oriented, pointer_of, rewrite, twins_of
from qfx.numerics import QParams, dequantize, effective_scale, join, split, spread
from qfx.packing import Packed
from qfx.passes.rewrites import rotations
from qfx.pipeline import told
from qfx.plan import Plan
from qfx.quantize import RecipeLike, check_float, checked_places, made_for
from qfx.recipe import DATA_ROUNDINGS, is_static
from qfx.rounding import rounded
from qfx.training import fake_attention
from qfx.training.fake_attention import FakeAttention, prepare_attention
from qfx.training.fake_modules import FakeLinear, FakeWeight, prepare_module, prepare_parameter
from qfx.training.padding import watch

Train = Literal["all", "scales"]
KEPT = "qfx_training"  # the attribute of a prepared model
_CELL = 0.45  # of a step: how far a weight may begin from the code that a plan gave it


@dataclass(frozen=True)
class Training:
    """What a prepared model was prepared by. learning: names of the parameters that were not frozen before."""

    plan: Plan
    places: tuple[Place, ...]
    scales: Scales
    train: Train
    freeze_after: int | None
    learning: frozenset[str]


def prepare_qat(
    model: nn.Module, recipe: RecipeLike | Plan, data: Iterable[Any] | None = None, *, scales: Scales = "learned",
    train: Train = "all", freeze_after: int | None = None, strict: bool = False, **overrides: Any,
) -> nn.Module:  # fmt: skip
    """Let `model` compute, in place, with the formats that `qfx.quantize` would give it, and train so; returns it.

    recipe, data, strict, overrides: as for `qfx.quantize`; the recipe's rewrites are applied and its rounding says
    where training begins: the prepared model gives what the quantized one would.
    scales: "learned" with the weights (LSQ, LSQ+), or "observed": moving averages of ranges, which in train mode move
    with each forward, for `freeze_after` of them where that is given. Those of formats found at run time are found anew
    in each forward. train: "all", or "scales" alone (all other parameters are frozen until `qfx.convert`, and weights
    keep their codes, but below scales that are powers of two).
    Raises ValueError for a model that is prepared, quantized or compiled already, for frozen weights that should learn,
    under torch.inference_mode(), and whatever `qfx.quantize` raises.
    """
    check_flags(strict=strict)
    _check_options(scales, train, freeze_after)
    check_float(model, "prepare")
    if torch.is_inference_mode_enabled():
        step = "call qfx.prepare_qat outside of it"
        raise ValueError(explain("tensors made under torch.inference_mode() cannot train", next_step=step))
    plan = made_for(model, recipe, data, strict=strict, **overrides)
    with torch.no_grad():
        places = checked_places(model, plan, strict=strict)
        frozen = _check_trainable(model, places, train)
        attentions, notes = fake_attention.find(model, plan)
        check_model(model, plan.caches)
        told([*notes, *frozen], strict=strict)
        rewrite(model, plan)
        learning = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        if train == "scales":
            model.requires_grad_(False)
        _Preparation(model, Training(plan, tuple(places), scales, train, freeze_after, learning)).run(attentions)
    without_fast_paths(model)
    watch(model)
    mark_training(model, plan.recipe)
    return with_caches(model, plan.caches, strict=strict)


class _Preparation:
    """Prepares one place after the other; a weight that several modules share has one quantizer."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        self.model, self.training, self.plan = model, training, training.plan
        self.rotations = rotations(self.plan.rewrites)
        self.weights: dict[Any, FakeWeight] = {}
        self.twins = twins_of(model)

    def run(self, attentions: Mapping[str, tuple[Spec, Cached | None]]) -> None:
        """Prepare all places, and the attention of the modules of these names."""
        for place in self.training.places:
            module = self.model.get_submodule(place.owner)
            if hasattr(type(module), PREPARED) and (place.leaf in getattr(type(module), "qfx_fake_names", ("weight",))):
                continue  # a module under two names
            weight = module._parameters[place.leaf]
            assert weight is not None
            key = (*pointer_of(weight), show(place.w), place.transposed)
            shared = key in self.weights
            if not shared:
                self.weights[key] = self._weight(place, weight)
            self._put(place, module, self.weights[key], shared=shared)
            self._put_twins(place, weight, self.weights[key])
        given = self.training
        for owner, (spec, cached) in attentions.items():
            fake = FakeAttention(spec, cached, self.plan, given.scales, given.freeze_after)
            prepare_attention(self.model.get_submodule(owner), fake)
        setattr(self.model, KEPT, given)

    def _put(self, place: Place, module: nn.Module, fake: FakeWeight, *, shared: bool) -> None:
        if place.kind == "parameter" or place.layout.endswith(READ):
            prepare_parameter(module, place.leaf, fake, shared=shared)
            return
        own = FakeLinear(
            fake, self._inputs(place), shared=shared, smooth=self.plan.tensors.get(f"{place.fqn}/smooth"),
            rotation=self.rotations.get(place.fqn),
        )  # fmt: skip
        prepare_module(module, place.kind, own.train(module.training), read=place.layout.endswith(ALSO))

    def _put_twins(self, place: Place, weight: Tensor, fake: FakeWeight) -> None:
        """Modules that hold the weight, too, and have no name of their own in the plan, read what is packed in the end
        (see `Writer`)."""
        planned = {(one.owner, one.leaf) for one in self.training.places}
        for owner, leaf in self.twins.get(pointer_of(weight), ()):
            module = self.model.get_submodule(owner)
            names = getattr(type(module), "qfx_fake_names", ())
            done = leaf in names or (hasattr(type(module), PREPARED) and not names)
            if (owner, leaf) in planned or len(fake.parts) > 1 or done:
                continue
            prepare_parameter(module, leaf, fake, shared=True)  # of a table, too: another forward may read its weight

    def _inputs(self, place: Place) -> InputQuantizer | RunTimeInput | None:
        if place.x is None:
            return None
        if not is_static(place.x):
            return RunTimeInput(place.x)
        scale, zero = (self.plan.tensors.get(f"{place.fqn}/{leaf}") for leaf in ("x_scale", "x_zero"))
        assert scale is not None
        return InputQuantizer(
            place.x, QParams(scale, zero), self.training.scales, freeze_after=self.training.freeze_after
        )

    def _weight(self, place: Place, weight: nn.Parameter) -> FakeWeight:
        """Quantizers that begin as the plan rounds the weight; the weight itself moves into the cells of its codes."""
        plan, value = self.plan, oriented(weight.detach(), place)
        packed = [
            (part, rounded.pack(plan.tensors, part, fmt, plan.recipe.rounding, name=name))
            for part, fmt, name in cut(value, place)
        ]
        parts = [self._quantizer(part, found) for part, found in packed]
        if self.training.train == "all" and not weight.requires_grad:
            nn.ModuleList(parts).requires_grad_(False)  # a frozen table
        flat = place.layout.startswith("patch")
        if isinstance(place.w, Format):
            pieces = [_started(part, found) if self._planned else part for part, found in packed]
            value.copy_(pieces[0])
            return FakeWeight(parts, transposed=place.transposed, flat=flat)
        axis, found = along(place.w), segments(place.w, value.shape, place.fqn)
        if self._planned:
            value.copy_(in_order([_started(part, one) for part, one in packed], found, axis))
        return FakeWeight(parts, segments=found, axis=axis, transposed=place.transposed)

    @property
    def _planned(self) -> bool:
        """The plan's codes are not those of the nearest values."""
        return self.plan.recipe.rounding in DATA_ROUNDINGS

    def _quantizer(self, part: Tensor, packed: Packed) -> nn.Module:
        if packed.format.is_plain:
            return RunTimeInput(packed.format)
        given = self.training
        return WeightQuantizer(
            part, packed, given.scales, freeze_after=given.freeze_after, keep_codes=given.train == "scales"
        )


def _started(weight: Tensor, packed: Packed) -> Tensor:
    """The value nearest to each weight that rounds to the code in `packed`."""
    fmt = packed.format
    if fmt.is_plain or not fmt.is_integer:
        return packed.dequantize(weight.dtype)
    params = packed.params()
    scale = spread(effective_scale(*params, fmt), fmt).abs()
    middle = split(dequantize(packed.codes(), fmt, *params), fmt)
    # the cast to the weight's dtype may move it by this much; where that is more than a cell has room, from the middle
    room = (_CELL * scale - middle.abs() * torch.finfo(weight.dtype).eps / 2).clamp(min=0)
    found = split(weight.to(torch.float32), fmt).clamp(middle - room, middle + room)
    return join(found, fmt, weight.shape).to(weight.dtype)


def training_of(model: object) -> Training:
    """What a model was prepared by. Raises ValueError for one that is not prepared, for parts of one that is,
    and where adapters or wrappers stand around its modules."""
    if not isinstance(model, nn.Module):
        raise ValueError(explain("a model is needed", expected="a torch.nn.Module", found=type(model).__name__))
    found = model.__dict__.get(KEPT)
    if isinstance(found, Training):
        check_own(model, found)
        return found
    inner = next((name for name, m in model.named_modules() if KEPT in m.__dict__), None)
    if inner is not None:
        what = f"the prepared model lies inside {type(model).__name__}, under {inner!r}"
        part = "merge_and_unload()" if hasattr(model, "merge_and_unload") else inner
        step = f"qfx.convert(model.{part})"
        wrapped = [m for m in model.modules() if hasattr(type(m._modules.get("base_layer")), PREPARED)]
        if any(type(module).__module__.startswith("peft.") for module in wrapped):
            step += ", which rounds what these adapters learned beside the fake quantization (qfx.add_adapters: inside)"
        raise ValueError(explain(what, next_step=step))
    parts = prepared_parts(model)
    what = f"{type(model).__name__} is not prepared for training"
    if parts:
        what = f"{type(model).__name__} is a part of a prepared model"
    raise ValueError(explain(what, next_step="qfx.prepare_qat(model, recipe), train, and convert that model"))


def check_own(model: nn.Module, training: Training) -> None:
    """Raises ValueError where something else stands in the place of a prepared module or of its weight."""
    for place in training.places:
        module = model.get_submodule(place.owner)
        if not hasattr(type(module), PREPARED):
            step = "adapters: model = peft_model.merge_and_unload(); another wrapper: put the module itself back"
            what = "something stands around a prepared module"
            raise ValueError(explain(what, found=type(module).__name__, node=place.owner, next_step=step))
        if module._parameters.get(place.leaf) is None:
            what = f"{place.leaf!r} of a prepared module is computed from other parameters"
            step = f"torch.nn.utils.parametrize.remove_parametrizations(module, {place.leaf!r}), or prune.remove"
            raise ValueError(explain(what, expected="the parameter itself", node=place.owner, next_step=step))


def _check_options(scales: object, train: object, freeze_after: object) -> None:
    for name, value, known in (("scales", scales, get_args(Scales)), ("train", train, get_args(Train))):
        if value not in known:
            raise ValueError(f"{name} is {' or '.join(map(repr, known))}, found {value!r}")
    if scales == "observed" and train == "scales":
        raise ValueError("observed scales have nothing to train; next step: scales='learned'")
    if freeze_after is None:
        return
    if scales == "learned":
        raise ValueError(
            "freeze_after is for scales='observed'; next step: learned scales are frozen by requires_grad_(False)"
        )
    if isinstance(freeze_after, bool) or not isinstance(freeze_after, int) or freeze_after < 0:
        raise ValueError(f"freeze_after is a number of forwards, 0 or more, found {freeze_after!r}")


def _check_trainable(model: nn.Module, places: list[Place], train: Train) -> list[Note]:
    """Notes about frozen tables and float16. Raises ValueError for other frozen weights that should learn."""
    if train != "all":
        return []
    held = [p for p in places if not model.get_submodule(p.owner).get_parameter(p.leaf).requires_grad]
    frozen = [p.fqn for p in held if p.kind != "table"]  # models themselves freeze tables of positions (Whisper)
    if frozen:
        raise ValueError(
            explain(
                f"weights that should learn are frozen: {listed(frozen)}",
                expected="requires_grad=True",
                next_step="unfreeze them, put them into the recipe's ignore list, or train='scales' alone",
            )
        )
    what, step = "its table is frozen: it is rounded and does not learn", "unfreeze it where it should"
    notes = [Note(p.fqn, what, step, minor=True) for p in held]
    if small := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]:
        what = f"{len(small)} parameters learn in float16, where Adam's mean squares of gradients become 0: NaN follows"
        step = "prepare model.float(), and compute in 16 bits by torch.autocast"
        notes.append(Note(type(model).__name__, what, step, minor=True))
    return notes


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers with scales of their own, by name: of weights, and of inputs with static formats."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}


def check_loss(loss: Tensor, step: int, model: nn.Module) -> None:
    """Raises ValueError that names the step where a loss is NaN or infinite, and the first parameter that is.

    loss: of one value. It waits for the device, so call it where the loss is read anyway.
    """
    if bool(torch.isfinite(loss.detach()).all()):
        return
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    raise ValueError(
        explain(
            f"the loss of step {step} is {float(loss.detach())}",
            expected="a finite loss",
            found=f"{bad[0]!r} holds NaN or Inf, {len(bad)} parameters in all" if bad else "all parameters are finite",
            next_step="load the last good checkpoint, and train at a lower rate or with gradients clipped",
        )
    )
