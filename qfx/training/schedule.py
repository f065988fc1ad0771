"""`qfx.QATSchedule`: when fake quantization begins, in how many bits, and what is frozen, by the number of steps.

schedule = qfx.QATSchedule(model, start_after=50, bits={0: 8, 100: 6, 200: 4}, freeze={300: "model.layers.0"})
for batch in batches:
    ...                                      # forward, backward, optimizer.step()
    schedule.step()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qfx.backends.qat.fake_quant import gradient_factor
from qfx.backends.qat.quantizers import InputQuantizer, Quantizer, RunTimeInput, WeightQuantizer
from qfx.errors import explain, nearest
from qfx.format import Format
from qfx.live.writeback import cut, oriented
from qfx.numerics import QParams, range_qparams
from qfx.qat import Training, check_own, quantizers, training_of
from qfx.rounding.scales import search
from qfx.training.fake_attention import FakeAttention
from qfx.training.fake_modules import FakeLinear, FakeWeight, weight_of
from qfx.training.fake_operands import FixedWeights

PLANNED = "planned"  # the attribute of what has another format than the plan's for a while
_LEAST, _MOST = 2, 8
_WITH_FORMATS = (Quantizer, RunTimeInput, FixedWeights)


class QATSchedule:
    """Switches a prepared model as `step()` is called, once after each step of the optimizer.

    start_after: steps that train in float. bits: step -> bits, falling, of all integer formats that have fewer in the
    plan, in which they stay at last; caches keep theirs. freeze: step -> names of parameters or of modules, or globs of
    these, that stand still from then on, with the observed ranges in these modules. steps: done before, by a model
    whose state was loaded already.
    Where fake quantization begins, and where bits change, scales of weights are searched anew
    (`qfx.rounding.scales.search`) and those of inputs span the range that they spanned.
    A switch costs torch.compile one compilation; other steps cost nothing. DistributedDataParallel has to be told
    find_unused_parameters=True, for scales and frozen parameters get no gradient. To resume, make the schedule, then
    load the state_dict of the model, the optimizer and the schedule; scales of other formats would not fit: choose a
    best checkpoint among those of the last formats. `qfx.convert` refuses a model whose schedule has not come to the
    plan's formats.
    Raises ValueError for a model that is not prepared and for steps, bits and names that cannot be.
    """

    def __init__(
        self, model: nn.Module, *, start_after: int = 0, bits: Mapping[int, int] | None = None,
        freeze: Mapping[int, str | Sequence[str]] | None = None, steps: int = 0,
    ) -> None:  # fmt: skip
        self.training = training_of(model)
        self.model, self.steps, self.start_after = model, steps, start_after
        self.bits, self.freeze = dict(sorted((bits or {}).items())), dict(sorted((freeze or {}).items()))
        _check_steps(start_after, self.bits, self.freeze, steps)
        if start_after and self.training.train == "scales":
            what = "a model prepared with train='scales' has nothing that learns in float"
            raise ValueError(explain(what, found=f"start_after={start_after}", next_step="leave it out"))
        self._learning = {name: p.requires_grad for name, p in model.named_parameters()}
        observed = [name for name, q in quantizers(model).items() if q.scales == "observed"]
        self._frozen = {step: _named(self._learning, observed, names) for step, names in self.freeze.items()}
        if self.bits:
            _check_bits(self.bits, [_planned(m) for m in _with_formats(model)])
        self._apply(began=True, scales=steps == 0)

    def step(self) -> None:
        """One step of the optimizer is done."""
        self.steps += 1
        if self.steps in (self.start_after, *self.bits, *self.freeze):
            self._apply(began=self.steps == self.start_after)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` takes; scales and formats' ranges are in that of the model."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a step. Scales are left to the model's state_dict. Raises ValueError for another state."""
        steps = state.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0 or len(state) != 1:
            raise ValueError(explain("the state of a schedule", expected="{'steps': a number}", found=dict(state)))
        self.steps = steps
        self._apply(began=False, scales=False)

    def unfreeze(self) -> None:
        """Let all learn again that did when the schedule was made."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._learning[name])
        for quantizer in quantizers(self.model).values():
            quantizer.still = False

    def _apply(self, *, began: bool, scales: bool = True) -> None:
        """Make the model what it is at this step. scales: find those anew of what begins or changes."""
        check_own(self.model, self.training)
        began = began and self.steps == self.start_after > 0
        for module in self.model.modules():
            if isinstance(module, FakeWeight | FakeLinear | FakeAttention):
                module.on = self.steps >= self.start_after
        stage = next((bits for step, bits in reversed(self.bits.items()) if step <= self.steps), 0)
        with torch.no_grad():
            for part, value in _weights(self.model, self.training):
                changed = _set_format(part, stage)
                part.factor = gradient_factor(value.numel() // max(1, part.initial_scale.numel()), part.format)
                if scales and (changed or began):
                    _restart(part, search(value.to(torch.float32), part.format), value)
            for module in _with_formats(self.model):
                old = module.format
                changed = not isinstance(module, WeightQuantizer) and _set_format(module, stage)
                if scales and changed and isinstance(module, InputQuantizer):
                    _restart(module, _same_range(module, old))
        frozen = {name for step, names in self._frozen.items() if step <= self.steps for name in names}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._learning[name] and name not in frozen)
            if name in frozen:
                parameter.grad = None
        for name, quantizer in quantizers(self.model).items():
            quantizer.still = name in frozen


def check_finished(model: nn.Module) -> None:
    """Raises ValueError for a model that a schedule has not brought to the formats of its plan."""
    for name, module in model.named_modules():
        what = ""
        if isinstance(module, FakeWeight | FakeLinear | FakeAttention) and not module.on:
            what = "fake quantization has not begun"
        elif isinstance(module, _WITH_FORMATS) and _planned(module) != module.format:
            what = f"{name!r} trains in {module.format}, and the plan says {_planned(module)}"
        if what:
            raise ValueError(explain(what, next_step="train on until the schedule has come to its end, then convert"))


def _with_formats(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, _WITH_FORMATS))


def _planned(module: Any) -> Format:
    found: Format = getattr(module, PLANNED, module.format)
    return found


def _weights(model: nn.Module, training: Training) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Each quantizer of a weight, once, with what it rounds."""
    seen: set[int] = set()
    for place in training.places:
        module = model.get_submodule(place.owner)
        fake, weight = weight_of(module, place.leaf), module._parameters[place.leaf]
        assert weight is not None
        if id(fake) not in seen:
            seen.add(id(fake))
            for part, (value, _, _) in zip(fake.parts, cut(oriented(weight.detach(), place), place), strict=True):
                if isinstance(part, WeightQuantizer):
                    yield part, value


def _set_format(module: Any, bits: int) -> bool:
    """Give it so many bits, no fewer than the plan does; whether that changed it."""
    planned = _planned(module)
    fmt = planned
    if planned.is_integer and not planned.is_plain and bits > planned.bits:
        fmt = replace(planned, type=f"{planned.type[0]}{bits}")
    if fmt == module.format:
        return False
    setattr(module, PLANNED, planned)
    module.format = fmt
    return True


def _restart(quantizer: Quantizer, params: QParams, weight: Tensor | None = None) -> None:
    """Begin again with these scales in the quantizer's format; buffers and parameters stay the same tensors."""
    fresh = Quantizer(quantizer.format, params, quantizer.scales)
    quantizer.initial_scale.copy_(fresh.initial_scale)
    for name in ("initial_zero", "whole"):
        held, new = getattr(quantizer, name), getattr(fresh, name)
        if held is not None:
            held.copy_(new)
    quantizer.log_scale.zero_()
    quantizer.log_scale.grad = None
    if quantizer.zero_shift is not None:
        quantizer.zero_shift.zero_()
    if isinstance(quantizer, WeightQuantizer) and quantizer.below is not None:
        quantizer.below.copy_(quantizer.current()[0])
    elif isinstance(quantizer, WeightQuantizer) and weight is not None:
        quantizer.begin_at_zeros(weight)
    if isinstance(quantizer, WeightQuantizer) and weight is not None and quantizer.scales == "observed":
        quantizer.extent.copy_(quantizer._extent(weight))


def _same_range(quantizer: InputQuantizer, old: Format) -> QParams:
    """Scales in the present format that span what they spanned in the old one."""
    new, quantizer.format = quantizer.format, old
    scale, zero = quantizer.current()
    quantizer.format = new
    low = (0 - zero) * scale if zero is not None else -old.qmax * scale
    return range_qparams(low, low + (old.qmax if zero is not None else 2 * old.qmax) * scale, new)


def _named(known: Mapping[str, bool], observed: Sequence[str], names: str | Sequence[str]) -> list[str]:
    """Parameters and observed quantizers of these names, or in modules of these names. known: parameter -> whether it
    learns. Raises ValueError for a name of none."""
    found: dict[str, None] = {}
    known = {**known, **dict.fromkeys(observed, True)}
    for pattern in [names] if isinstance(names, str) else names:
        own = [name for name in known if any(fnmatchcase(each, pattern) for each in _with_parents(name))]
        if not own:
            what = f"no parameter and no module of the model is called {pattern!r}"
            every = {each for name in known for each in _with_parents(name)}
            raise ValueError(explain(what, expected=nearest(pattern, sorted(every))))
        if not any(known[name] for name in own):
            raise ValueError(explain(f"all parameters of {pattern!r} are frozen already", next_step="leave it out"))
        found |= dict.fromkeys(own)
    return list(found)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _check_steps(start_after: object, bits: Mapping[int, int], freeze: Mapping[int, Any], steps: object) -> None:
    given = {"start_after": [start_after], "bits": bits, "freeze": freeze, "steps": [steps]}
    for what, step in ((what, step) for what, found in given.items() for step in found):
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"a step of {what} is a whole number, 0 or more, found {step!r}")


def _check_bits(bits: Mapping[int, int], formats: Sequence[Format]) -> None:
    values = list(bits.values())
    if any(isinstance(b, bool) or not isinstance(b, int) or not _LEAST <= b <= _MOST for b in values):
        raise ValueError(f"bits are {_LEAST} to {_MOST}, found {values}")
    if 0 not in bits or sorted(values, reverse=True) != values or len(set(values)) != len(values):
        raise ValueError(
            explain("bits begin at step 0 and fall", expected="such as {0: 8, 100: 6, 200: 4}", found=dict(bits))
        )
    planned = sorted({fmt.bits for fmt in formats if fmt.is_integer and not fmt.is_plain})
    if not planned or planned[0] >= values[0]:
        found = f"formats of {', '.join(map(str, planned))} bits" if planned else "no integer format"
        raise ValueError(explain("these bits change nothing", expected="integer formats of fewer bits", found=found))
    if planned[0] < values[-1]:
        raise ValueError(
            explain(
                f"bits end at {values[-1]}, and the plan has formats of {planned[0]}",
                next_step=f"add a step with {planned[0]}",
            )
        )
