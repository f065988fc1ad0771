"""`qfx.convert`: the quantized model that a prepared one trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qfx.backends.qat.quantizers import InputQuantizer, WeightQuantizer
from qfx.errors import Note, explain, warn
from qfx.hf.attach import attach
from qfx.kv.live import with_caches
from qfx.live import attending
from qfx.live.modules import PREPARED
from qfx.live.places import Place
from qfx.live.writeback import Writer, cut, oriented
from qfx.plan import Plan
from qfx.qat import KEPT, quantizers, training_of
from qfx.reporting.told import remember
from qfx.rounding import rounded
from qfx.training.fake_attention import CHILD, put_trained
from qfx.training.fake_modules import restore, weight_of
from qfx.training.padding import unwatch
from qfx.training.schedule import check_finished
from qfx.training.wrapped import check_unwrapped


def convert(model: nn.Module) -> nn.Module:
    """The quantized model that a prepared one trained: weights packed with the trained scales, in place.

    What each layer gives is what it gave in the prepared model in eval mode: from equal weights and codes, but for the
    last bits of sums, which decide a few codes of the layers after it. `qfx.save`, `qfx.export_onnx` and
    torch.compile(backend="qfx") take it. Raises ValueError for a model that is not prepared or sharded over processes,
    and for weights or scales that became NaN or infinite, before anything is changed. Scales that have gradients and
    never moved are a QfxWarning.
    """
    training = training_of(model)
    check_unwrapped(model)
    _tell_still(model)
    with torch.no_grad():
        _check_finite(model)
        check_finished(model)
        plan = replace(training.plan, tensors=dict(training.plan.tensors), sensitivities={})
        unwatch(model)
        changed = [module for module in model.modules() if hasattr(type(module), PREPARED)]
        for place in training.places:
            _trained(model, place, plan)
        for module in changed:
            if CHILD in module._modules:
                put_trained(plan, module)
            restore(module)
        delattr(model, KEPT)
        if training.train == "scales":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in training.learning)
        attentions = attending.find(model, plan)[0]
        live = attending.attend(Writer(model, plan).write(list(training.places)), attentions)
        found = attach(with_caches(live, plan.caches), plan.recipe)
    remember(found, map(Note.parse, plan.notes))
    return found


def _trained(model: nn.Module, place: Place, plan: Plan) -> None:
    """Put the codes and scales of one place into the plan."""
    module = model.get_submodule(place.owner)
    weight = module._parameters[place.leaf]
    assert weight is not None
    fake = weight_of(module, place.leaf)
    for part, (value, _, name) in zip(fake.parts, cut(oriented(weight.detach(), place), place), strict=True):
        for leaf in ("codes", "scale", "zero"):
            plan.tensors.pop(f"{name}/{leaf}", None)
        if isinstance(part, WeightQuantizer):
            rounded.put(plan.tensors, name, part.pack(value))
    inputs = getattr(module._modules.get("fake_quant"), "inputs", None)
    if isinstance(inputs, InputQuantizer):
        scale, zero = inputs.qparams()
        plan.tensors[f"{place.fqn}/x_scale"] = scale
        if zero is not None:
            plan.tensors[f"{place.fqn}/x_zero"] = zero


def _tell_still(model: nn.Module) -> None:
    """A QfxWarning where gradients reached the scales and no step moved one of them."""
    learned = [q.log_scale for q in quantizers(model).values() if q.log_scale.requires_grad]
    if any(s.grad is not None and bool(s.grad.any()) for s in learned) and not any(bool(s.any()) for s in learned):
        step = "make the optimizer of model.parameters() after qfx.prepare_qat; to keep scales: requires_grad_(False)"
        warn(explain("the learned scales have gradients, but no step has moved any", next_step=step), stacklevel=3)


def _check_finite(model: nn.Module) -> None:
    """Raises ValueError naming the first parameter or observed scale that is not finite."""
    scales = ((f"{name}.{leaf}", b) for name, q in quantizers(model).items() for leaf, b in q.named_buffers())
    for name, tensor in (*model.named_parameters(), *scales):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                explain(
                    f"{name!r} holds NaN or Inf: the training went wrong",
                    expected="finite weights and scales",
                    next_step="load the last good checkpoint, and train at a lower rate or with gradients clipped",
                )
            )
