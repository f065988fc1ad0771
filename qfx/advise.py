"""`qfx.advise`: from what is wanted to recipes, with the reason for each step.

    advice = qfx.advise(model, batches, device="cpu.json", max_loss=5, context=2048)
    advice.show()

The way of the decision: does the model fit the device at this batch and context, and how much smaller must it be; what
binds it, memory or products; is there calibration data; how much loss is allowed. Each claim says what it stands on:
"given" by the user, "counted" on the model, "measured" on the model and its data, "predicted" by a roofline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from qfx import data as batches
from qfx.allocation.candidates import Candidate, Proposal, Wanted, doubtful, proposals
from qfx.allocation.costs import Asked, CacheFormats, Costs
from qfx.allocation.devices import Device
from qfx.allocation.devices import device as find_device
from qfx.allocation.model_costs import costs_of, formats_of_plan
from qfx.allocation.roofline import GAIN, Prediction, Roofline, crossover, predict, sentences
from qfx.data import Call
from qfx.errors import UnsupportedError, explain, first_line
from qfx.format import Format
from qfx.hf.hub import is_causal_lm
from qfx.kv.judge import over_cache
from qfx.kv.planning import plan_caches
from qfx.kv.plans import grown_formats
from qfx.measuring import compare
from qfx.measuring.matrix import bytes_of
from qfx.quantize import evaluating, plan, quantize
from qfx.recipe import Recipe
from qfx.storage.files import json_text

if TYPE_CHECKING:
    from rich.console import Console

WITHOUT_DATA = ("w8a8", "w8a16", "w4a16-hqq", "nf4")
WITH_DATA = ("w8a8", "w8a8-rotate", "w8a8-smooth", "w4a16-gptq", "w4a16-awq", "w3a16-gptq", "w2a16-gptq", "heads")
_BITS = (4.0, 3.0)  # budgets of recipes that plan bits, where no ratio is wanted
_BATCHES = (1, 4, 16, 64, 256)
_CACHE_SHARE = 0.2  # of what a token reads, from which on a smaller cache is worth a word


@dataclass(frozen=True)
class Claim:
    """A sentence, and what it stands on: "given", "counted", "measured" or "predicted"."""

    text: str
    basis: str

    def __str__(self) -> str:
        return f"[{self.basis}] {self.text}"


@dataclass(frozen=True)
class Advice:
    """claims: the way of the decision. proposals: the best first; candidates: all that were looked at. loss_of: what
    the loss is a rise of."""

    claims: tuple[Claim, ...]
    proposals: tuple[Proposal, ...]
    candidates: tuple[Candidate, ...]
    device: str
    loss_of: str

    def to_json(self) -> str:
        """All of it as JSON text; bytes, seconds, percent, nats."""
        return json_text(asdict(self))

    def show(self, console: Console | None = None) -> None:
        """Print it."""
        from qfx.reporting.render_advice import show

        show(self, console)


def advise(
    model: nn.Module, data: Iterable[Any] | None = None, *, device: str | Device, max_loss: float | None = None,
    ratio: float | None = None, batch: int = 1, sequence: int = 128, context: int | None = None,
    recipes: Sequence[str | Recipe] | None = None, told: Callable[[str], object] = lambda what: None,
) -> Advice:  # fmt: skip
    """Recipes for `model` on a device; the model stays as it is.

    data: batches as for qfx.quantize; the last quarter of them judges, the others calibrate. Without data no loss is
    measured, and recipes that need data are left out. device: "a100", "h100", "h200", "rtx4090", the .json of `qfx
    profile`, or a Device. max_loss: percent by which perplexity may rise (for other models: noise over signal of the
    main output). ratio: at least so many times smaller than in 16 bits. batch, sequence, context: sequences at once,
    tokens of a prompt, cached tokens while one more is decoded (left out: the prompt). recipes: which to try.
    Raises ValueError for what makes no sense, and where the data is one batch only.
    """
    on = find_device(device)
    wanted = Wanted(max_loss, ratio, batch, sequence, sequence if context is None else context)
    asked = None if recipes is None else [Recipe.parse(one) for one in recipes]
    if asked == []:
        raise ValueError("recipes holds no recipe\n  next step: leave it out for the usual ones")
    calibration, calls = _split(model, data)
    with evaluating(model):
        told("costs")
        costs = costs_of(model, calls[0][1] if calls and calls[0][1] else None)
        found = _Walk(model, costs, on, wanted, calibration, calls, told)
        return found.advice(asked)


def _split(model: nn.Module, data: Iterable[Any] | None) -> tuple[list[Any] | None, list[Call]]:
    """(batches that calibrate, calls that judge)."""
    if data is None:
        return None, []
    held = list(data)
    checked = batches.calls(model, held)
    if len(held) < 2:
        raise ValueError(
            explain(
                "one batch cannot both calibrate and judge", expected="two batches or more", found=f"{len(held)}",
                next_step="give smaller batches, or more of them",
            )
        )  # fmt: skip
    count = max(1, len(held) // 4)
    return held[:-count], checked[-count:]


class _Walk:
    """One decision, step by step."""

    def __init__(
        self, model: nn.Module, costs: Costs, device: Device, wanted: Wanted, calibration: list[Any] | None,
        calls: list[Call], told: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.model, self.costs, self.device, self.wanted = model, costs, device, wanted
        self.calibration, self.calls, self.told = calibration, calls, told
        self.claims: list[Claim] = []
        self.sizes: dict[str, Any] = {"batch": wanted.batch, "sequence": wanted.sequence, "context": wanted.context}
        self.base = self._predict({})
        self.half = costs.weights(rest=Format("f16"))
        self.by_perplexity = is_causal_lm(model)

    def advice(self, recipes: list[Recipe] | None) -> Advice:
        self._start()
        candidates, formats = [], {}
        tried = [pair for recipe in recipes or self._usual() for pair in self._budgeted(recipe)]
        for name, recipe in tried:
            candidate, asked = self._looked_at(name, recipe)
            if candidate is not None:
                candidates.append(candidate)
                formats[candidate.recipe] = asked
        good = [one for one in candidates if not one.misses]
        proposed = proposals(good)
        self._end(proposed, candidates, formats)
        loss_of = "perplexity" if self.by_perplexity else "noise over signal of the main output"
        return Advice(tuple(self.claims), tuple(proposed), tuple(candidates), self.device.name, loss_of)

    def say(self, text: str, basis: str) -> None:
        self.claims.append(Claim(text, basis))

    def _start(self) -> None:
        """What is given, whether it fits, and what binds it."""
        w, base, on = self.wanted, self.base, self.device
        asks = [f"batch {w.batch}", f"prompt {w.sequence}", f"context {w.context}"]
        asks += [f"at least {w.ratio:g}x smaller than 16 bits"] if w.ratio else []
        asks += [f"a loss of at most {w.max_loss:g} %"] if w.max_loss else []
        self.say(f"{on.name} ({on.source}); {', '.join(asks)}", "given")
        self.say(f"the weights have {_mega(self.half)} in 16 bits", "counted")
        what = f"in {on.dtype} the model needs {_mega(base.memory)}, {_mega(base.cache)} of it cache"
        what = f"{what}: it {'fits' if base.fits else 'does not fit'} the {_mega(on.memory)} of the device"
        self.say(what, "predicted")
        if base.decode is not None:
            self.say(f"a token takes {_time(base.decode.seconds)}, bound by {base.decode.bound}", "predicted")
        self.say(f"a prompt takes {_time(base.prefill.seconds)}, bound by {base.prefill.bound}", "predicted")
        if self.calibration is None:
            self.say("no data: recipes that need it are left out, and no loss is measured", "given")
        else:
            count = f"{len(self.calibration)} batches calibrate, {len(self.calls)} others judge"
            self.say(f"{count}, with {self._what()}", "given")

    def _what(self) -> str:
        return "the rise of perplexity" if self.by_perplexity else "noise over signal of the main output"

    def _usual(self) -> list[Recipe]:
        """What is tried where the user names nothing."""
        names = WITHOUT_DATA if self.calibration is None else WITH_DATA  # rotations are for decoders
        return [Recipe.parse(name) for name in names if self.by_perplexity or name != "w8a8-rotate"]

    def _budgeted(self, recipe: Recipe) -> list[tuple[str, Recipe]]:
        """A recipe that plans bits under the budgets that are wanted, by name; others as they are."""
        if recipe.allocation is None or recipe.allocation.budgets:
            return [(recipe.name, recipe)]
        ways: list[dict[str, Any]] = [{"avg_bits": bits} for bits in _BITS]
        if self.wanted.ratio is not None:
            ways = [{"max_bytes": int(self.half / self.wanted.ratio)}]
        return [
            (f"{recipe.name} {key}={value}", recipe.override(allocation={key: value}))
            for way in ways
            for key, value in way.items()
        ]

    def _looked_at(self, name: str, recipe: Recipe) -> tuple[Candidate | None, Asked]:
        """A candidate with its predictions and, where these do not rule it out, its measured loss."""
        asked, plans = self._rules(recipe), recipe.allocation is not None
        if recipe.needs_data and self.calibration is None:
            self.say(f"{name} needs calibration data and is left out", "given")
            return None, {}
        try:
            kv = grown_formats(plan_caches(self.model, recipe)[0], self.costs.grown)
            first = self._candidate(name, asked, None, kv)
            if first.misses and not plans:
                return first, asked
            self.told(f"quantize by {name}")
            example = [args or kwargs for args, kwargs in self.calls[:1]] or None
            given = self.calibration if recipe.needs_data or plans else example
            made_plan = plan(self.model, recipe, given, progress=False)
            made = quantize(copy.deepcopy(self.model), made_plan)
        except (ValueError, UnsupportedError) as error:
            self.say(f"{name} cannot be had: {first_line(error)}", "measured")
            return None, {}
        asked = formats_of_plan(made_plan, self.costs)
        candidate = self._candidate(name, asked, bytes_of(made), kv)
        if kv is None:
            return self._judged(candidate, made), asked
        over, why = self._over_cache(made, made_plan)
        text = "its loss is that of its weights and its cache, read back in steps"
        text = text if over else f"its cache is counted in memory and time; its loss is not measured{why}"
        self.say(f"{name}: {text}", "measured" if over else "predicted")
        return self._judged(candidate, over or made), asked

    def _over_cache(self, model: nn.Module, kv: Any) -> tuple[compare.Model | None, str]:
        """The model with that cache; None and the reason where the calls show nothing of it."""
        try:
            return (over_cache(model, kv, self.calls), "") if self.by_perplexity else (None, "")
        except ValueError as error:
            return None, f": {first_line(error)}"

    def _rules(self, recipe: Recipe) -> Asked:
        """Formats by the recipe's rules alone: what it asks for before anything is planned."""
        kinds: dict[str, set[str]] = {}
        for node in self.costs.nodes:
            if node.weight and node.kind in ("linear", "embedding", "experts", "conv"):
                kinds.setdefault(node.weight, set()).add(node.kind)
        found = {}
        for node in self.costs.nodes:
            if node.weight in kinds and node.kind in kinds[node.weight]:
                tied = {"linear", "embedding"} <= kinds[node.weight]
                columns = self.costs.stored[node.weight].shape[-1]
                found[node.name] = recipe.formats_for(node.kind, node.name, tied=tied, columns=columns)
        return {name: roles for name, roles in found.items() if roles}

    def _candidate(self, name: str, asked: Asked, nbytes: int | None, kv: CacheFormats) -> Candidate:
        told, base = self._predict(asked, kv), self.base
        size = told.weights if nbytes is None else nbytes
        ratio = self.half / size
        misses = []
        if self.wanted.ratio is not None and ratio < self.wanted.ratio:
            misses.append(f"{ratio:.2f}x smaller than 16 bits, {self.wanted.ratio:g}x is wanted")
        if not told.fits:
            misses.append(f"it needs {_mega(told.memory)}, the device has {_mega(self.device.memory)} (predicted)")
        both = told.decode is not None and base.decode is not None
        return Candidate(
            name, size, ratio, told.prefill.seconds, None if told.decode is None else told.decode.seconds,
            base.prefill.seconds / told.prefill.seconds,
            base.decode.seconds / told.decode.seconds if both else None,  # type: ignore[union-attr]
            told.memory, misses=tuple(misses),
        )  # fmt: skip

    def _judged(self, candidate: Candidate, made: compare.Model) -> Candidate:
        if not self.calls:
            return candidate
        self.told(f"loss of {candidate.recipe}")
        near = compare.accuracy(self.model, made, self.calls, next_token=self.by_perplexity)
        loss, error = 100 * 10 ** (-near.sqnr_db / 20), None
        if near.change is not None:
            loss, error = 100 * near.change, None if near.change_error is None else 100 * near.change_error
        return candidate.judged(loss, error, near.kld, self.wanted.max_loss)

    def _predict(self, asked: Asked, kv: CacheFormats = None) -> Prediction:
        return predict(self.costs, asked, self.device, cache=kv, **self.sizes)

    def _end(self, proposed: Sequence[Proposal], tried: Sequence[Candidate], formats: Mapping[str, Asked]) -> None:
        """What came out; where the first proposal is faster; and what the cache would give."""
        if not proposed:
            closest = min(tried, key=lambda c: (len(c.misses), c.loss or 0.0, c.nbytes), default=None)
            near = f"; nearest is {closest.recipe}: {'; '.join(closest.misses)}" if closest else ""
            self.say(f"no recipe fulfils all that is wanted{near}", "measured" if self.calls else "predicted")
        if self.wanted.max_loss is not None and not self.calls:
            self.say("whether the loss is allowed is not known: give data", "given")
        for line in doubtful(proposed, self.wanted.max_loss):
            self.say(line, "measured")
        if proposed:
            best = proposed[0].candidate.recipe
            contexts = (max(1, self.wanted.context),)
            crossings = crossover(self.costs, formats[best], self.device, batches=_BATCHES, contexts=contexts)
            for line in sentences(crossings):
                self.say(f"{best}: {line.removesuffix(' (predicted)')}", "predicted")
        self._cache(formats[proposed[0].candidate.recipe] if proposed else {})

    def _cache(self, asked: Asked) -> None:
        """A word about a smaller cache, where it is a good part of what a token reads."""
        if not self.costs.caches:
            return
        given, rest = {"batch": self.wanted.batch, "context": self.wanted.context}, Format(self.device.dtype)
        whole = self.costs.total(asked, rest, rest=rest).at(**given)
        share = whole.cache_moved / whole.traffic
        if share < _CACHE_SHARE:
            return
        now, then = (Roofline(self.costs, asked, self.device, f).phase(**given).seconds for f in (None, Format("i8")))
        gain = f", a token would be {now / then:.2f}x faster" if now / then >= GAIN else ""
        less = whole.cache - self.costs.total(asked, Format("i8"), rest=rest).at(**given).cache
        self.say(
            f"the cache is {share:.0%} of what a token reads: in 8 bits (+kv8) {_mega(less)} less{gain}", "predicted"
        )
        over, why = self._over_cache(self.model, "i8")
        near = None if over is None else compare.accuracy(self.model, over, self.calls, next_token=True).kld
        text = f"what a cache in 8 bits loses is not measured{why}"
        text = text if near is None else f"the cache in 8 bits alone costs {near:.2g} nats"
        self.say(text, "given" if near is None else "measured")


def _mega(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
