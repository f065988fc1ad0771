"""SmoothQuant: a linear's input is divided by a factor per channel, the weight's columns are multiplied by it.

    %layer_norm: f32[2,4] = aten.layer_norm(%x, [4], @norm.weight, @norm.bias)      where linears alone read the norm,
    %linear: f32[2,3] = aten.linear(%layer_norm, @fc.weight, @fc.bias)              the factor goes into its weights

    %gelu: f32[2,4] = aten.gelu(%x)                                                 elsewhere
    ->
    %div: f32[2,4] = aten.div.Tensor(%gelu, @fc.input_smooth)
    %linear: f32[2,3] = aten.linear(%div, @fc.weight, @fc.bias)

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), one s for all linears that read the same input (Xiao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.calibration.importance import Importance
from qfx.calibration.observers import Observer, create
from qfx.calibration.sample import Sample
from qfx.errors import Note
from qfx.format import Format
from qfx.numerics import fake_quantize, range_qparams
from qfx.passes import _edits as edits
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._build import call
from qfx.passes._sites import Norm, Record, Weight
from qfx.rounding.scales import rounded, search
from qfx.storage.spill import give_back, is_mapped, rest

ALPHAS: tuple[float, ...] = tuple(step / 10 for step in range(11))
_ROWS = 2048  # output channels that the search looks at, of all experts together
_SEARCHED_ROWS = 512  # the same where scales are searched for each factor
_OF_AN_EXPERT = 8  # the fewest of one
_LEAST, _GREATEST = 1e-4, 1e4  # of a factor

Tie = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site(Record):
    """Linears that read one input. norm: the norm that takes the factor, None where the input itself is divided."""

    NAME: ClassVar[str] = "smooth"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor",)
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"norm": Norm.of, "linears": Weight.of}

    norm: Norm | None
    linears: tuple[Weight, ...]
    channels: int

    @property
    def explicit(self) -> bool:
        """The input is divided in the graph, or by the packed linear's `smooth` operand."""
        return self.norm is None


def find(gm: fx.GraphModule) -> tuple[list[Site], list[Note]]:
    """Every group of linears that read one input, in graph order, and those that have to stay as they are."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if sites.is_linear(node) and isinstance(node.args[0], fx.Node):
            groups.setdefault(sites.origin(node.args[0]), []).append(node)
    found, refusals = [], []
    for value, linears in groups.items():
        site = _site(value, linears)
        if isinstance(site, Site):
            found.append(site)
        else:
            refusals.append(site)
    return found, refusals


def _site(value: fx.Node, linears: list[fx.Node]) -> Site | Note:
    weights: list[Weight] = []
    for node in linears:
        weight = sites.weight_of(node)
        if isinstance(weight, str):
            return sites.note(node, f"its input cannot be smoothed: {weight}")
        weights.append(weight)
    channels = m.shape(linears[0].args[0])[-1]
    if not isinstance(channels, int):
        return sites.note(linears[0], "its number of input channels is not fixed")
    norm = sites.norm_of(value)
    reached, others = sites.readers(value)
    if isinstance(norm, Norm) and not others and set(reached) == set(linears):
        return Site(norm, tuple(weights), channels)
    if any(graph.schema_name(node) != "aten::linear" for node in linears):
        why = norm if isinstance(norm, str) else f"%{others[0].name} reads it, too" if others else "no norm makes it"
        return sites.note(linears[0], f"the input of experts is smoothed only inside a norm, and {why}")
    return Site(None, tuple(weights), channels)


def apply(module: nn.Module, site: Site, factor: Tensor) -> None:
    """Divide the input by `factor` [channels] and multiply the weights' columns by it, in a graph or a live model.

    An explicit division is put into a graph; in a live model it is left to the caller, who packs the linears with
    `smooth=factor` (see `explicit_factors`).
    """
    edits.check_factor(factor, site.channels, site.linears[0].name)
    if site.explicit:
        factor = factor.to(graph.get_tensor(module, site.linears[0].weight).dtype)
        if isinstance(module, fx.GraphModule):
            _divide(module, site, factor)
    else:
        assert site.norm is not None
        edits.scale_norm(module, site.norm, 1.0 / factor.to(torch.float64))
    for linear in site.linears:
        edits.scale(module, linear.weight, factor, linear.inp)


def explicit_factors(site: Site, factor: Tensor) -> dict[str, Tensor]:
    """FQN of a linear -> the `smooth` operand that its packed form needs; empty where the norm took the factor."""
    return {linear.name: factor for linear in site.linears} if site.explicit else {}


def _divide(gm: fx.GraphModule, site: Site, factor: Tensor) -> None:
    names = {linear.name for linear in site.linears}
    nodes = [n for n in gm.graph.nodes if sites.is_linear(n) and graph.fqn_of(n) in names]
    divided: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if x not in divided:
            name = f"{site.linears[0].name}.input_smooth".lstrip(".")
            held = graph.add_tensor(gm, name, factor, nodes[0])
            with gm.graph.inserting_before(node):
                divided[x] = call(gm, torch.ops.aten.div.Tensor, x, held, like=node)
            annotation.clear(divided[x])
        node.replace_input_with(x, divided[x])


class Chooser(Protocol):
    """Finds the factor [channels] for linears that read one input, or None; see `choose`."""

    def __call__(
        self, gm: fx.GraphModule, linears: Sequence[Weight], inputs: Sequence[Sample], *, tie: Tie = ...
    ) -> Tensor | None: ...


def choose(
    gm: fx.GraphModule,
    linears: Sequence[Weight],
    inputs: Sequence[Sample],
    alpha: float | Literal["search"] = 0.5,
    observer: str = "minmax",
    percentile: float = 99.99,
    tie: Tie = lambda absmax: absmax,
) -> Tensor | None:
    """The factor [channels] for linears that read one input; None where no smoothing is best.

    alpha: SmoothQuant's exponent, or "search": of `ALPHAS` and of no smoothing, the one with the least error of the
    layer's result on the sampled rows, under the formats annotated and ranges found by `observer`, which takes
    `percentile`. tie: makes channels equal that must have one factor, by the greatest magnitude among them.
    """
    x_absmax = tie(torch.stack([i.absmax() for i in inputs]).amax(0))
    w_absmax = tie(weight_absmax(gm, linears))
    if alpha == "search":
        nodes = {graph.fqn_of(n): n for n in gm.graph.nodes if sites.is_linear(n)}
        layers = [Layer.of(gm, nodes[w.name], w, observer, percentile) for w in linears]
        best = _search(layers, inputs, lambda absmax, a: factors(tie(absmax), w_absmax, a))
        factor = None if best is None else factors(x_absmax, w_absmax, best)
        if any(is_mapped(graph.get_tensor(gm, w.weight)) for w in linears):
            del layers
            give_back()  # of weights that wait in files no copies stay
    else:
        factor = factors(x_absmax, w_absmax, alpha)
    return factor if factor is not None and bool((factor != 1).any()) else None


def smooth(
    gm: fx.GraphModule, stats: Mapping[str, Sample], *, skip: Iterable[str] = (), fold_only: Iterable[str] = (),
    chooser: Chooser = choose,
) -> tuple[list[tuple[Site, Tensor]], list[Note]]:  # fmt: skip
    """Choose factors for every group of linears whose inputs are to be quantized. Nothing is changed; see `apply`.

    stats: FQN of a linear -> what its input looks like (see `watch`). skip: names of linears to leave; fold_only: of
    those whose input cannot be divided, so that only a norm can take their factor. Returns pairs of site and f32 factor
    [channels] in graph order, and notes about what cannot be smoothed.
    """
    found, refusals = find(gm)
    left, undivided = set(skip), set(fold_only)
    chosen = []
    for site in found:
        names = [linear.name for linear in site.linears]
        inputs = [stats[name] for name in names if name in stats and stats[name].seen]
        if not inputs or left.intersection(names) or (site.explicit and undivided.intersection(names)):
            continue
        factor = chooser(gm, site.linears, inputs)
        if factor is not None:
            chosen.append((site, factor))
    return chosen, [r for r in refusals if r.node in stats]


def watch(node: fx.Node, role: str) -> Observer | None:
    """For `insert_observers`: sample the inputs of linears that are to be quantized."""
    return Sample() if role == "x" and sites.is_linear(node) else None


def factors(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s = x^alpha / w^(1 - alpha) per channel, f32; 1 where either is zero."""
    x, w = x_absmax.to(torch.float64), w_absmax.to(torch.float64)
    alive = (x > 0) & (w > 0)
    raw = torch.where(alive, x, 1.0).pow(alpha) / torch.where(alive, w, 1.0).pow(1 - alpha)
    return torch.where(alive, raw.clamp(_LEAST, _GREATEST), 1.0).to(torch.float32)


def weight_absmax(module: nn.Module, linears: Iterable[Weight]) -> Tensor:
    """The greatest magnitude of each input channel over the weights of several linears, f32 [channels]."""
    found = []
    for linear in linears:
        weight = graph.get_tensor(module, linear.weight).detach()
        found.append(weight.abs().movedim(linear.inp, -1).flatten(0, -2).amax(0).to(torch.float32))
        rest(weight)
    return torch.stack(found).amax(0)


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear as the search sees it.

    weight: f32 [N, K] or [E, N, K], of many output channels only some, see `_some`. x, w: formats.
    observer, percentile: how the range of its input is found. searched: the weight is judged with scales that are
    searched, errors weighted by the energy of its inputs; else with those of its extremes.
    """

    weight: Tensor
    x: Format | None
    w: Format | None
    observer: str
    percentile: float
    searched: bool = False

    @classmethod
    def of(
        cls, gm: fx.GraphModule, node: fx.Node, weight: Weight, observer: str, percentile: float, searched: bool = False
    ) -> Layer:
        formats: dict[str, Any] = annotation.get(node)
        x, w = formats.get("x"), formats.get("w")
        if w is not None and not isinstance(w, Format):  # of several the one that rounds the most
            w = min(annotation.each(w), key=lambda fmt: fmt.bits)
        whole = graph.get_tensor(gm, weight.weight).detach()
        value = whole.movedim((weight.out, weight.inp), (-2, -1))
        rows = _SEARCHED_ROWS if searched else _ROWS
        some = _some(value, rows).to(torch.float32)
        rest(whole)
        return cls(some, x if isinstance(x, Format) else None, w, observer, percentile, searched)

    def energy(self, rows: Tensor) -> float:
        """The sum of squares of the float result."""
        return float(sum((rows @ part.mT).square().sum() for part in self._parts()))

    def error(self, rows: Tensor, low: Tensor, high: Tensor, factor: Tensor, energy: float) -> float:
        """Squared error of the quantized result relative to the float one, inputs divided by `factor`.

        energy: what `energy` gives for these rows, which is the same for each factor.
        """
        inputs = self._rounded(rows / factor, low / factor, high / factor)
        wrong = rows.new_zeros(())
        for part in self._parts():
            weight = part * factor
            w = weight if self.w is None else self._as_stored(weight, self.w, inputs)
            # Inputs that are not rounded meet the difference of the weights: one product instead of two.
            difference = rows @ (w / factor - part).mT if self.x is None else inputs @ w.mT - rows @ part.mT
            wrong += difference.square().sum()
        return float(wrong) / max(energy, 1e-30)

    def _parts(self) -> Sequence[Tensor]:
        """Output channels in parts of bounded size, where each has scales of its own: rounding takes several copies."""
        alone = self.w is None or self.w.granularity == "ch" or self.w.group is not None
        if self.weight.dim() != 2 or not alone or (self.w is not None and self.w.nested):
            return [self.weight]
        return [self.weight[rows] for rows in edits.parts(self.weight)]

    def _as_stored(self, weight: Tensor, fmt: Format, inputs: Tensor) -> Tensor:
        if not self.searched or fmt.is_plain:
            return fake_quantize(weight, fmt)
        return rounded(weight, fmt, search(weight, fmt, Importance(inputs.square().mean(0))))

    def _rounded(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if self.x is None:
            return x
        if self.x.dynamic or self.x.is_plain:
            return fake_quantize(x, self.x, activation=True)
        if self.x.granularity == "" and self.observer in ("minmax", "absmax", "ema"):
            scale, zero = range_qparams(low.amin(), high.amax(), self.x)  # of all the data, not of the sample
        else:
            found = create(self.observer, self.x, percentile=self.percentile)
            found.update(x)
            scale, zero = found.qparams(self.x)
        return fake_quantize(x, self.x, scale, zero, activation=True)


def _some(value: Tensor, rows: int) -> Tensor:
    """About `rows` output channels of a weight [N, K], evenly, or of those of all experts [E, N, K]: [E, less, K].

    Experts take theirs at different places, so that of parts that lie by turns (gate and up) each is seen. Where all
    are taken, they stay in their order, which formats of blocks [M, N] ask, and where they lie.
    """
    if value.dim() == 2:
        return value[:: -(-value.shape[0] // rows)]
    experts, channels = value.shape[:2]
    step = -(-channels // max(rows // experts, _OF_AN_EXPERT))
    if step == 1:
        return value
    each = torch.arange(experts, device=value.device)[:, None]
    taken = (torch.arange(0, channels, step, device=value.device) + each) % channels
    return value[each, taken]


def _search(layers: Sequence[Layer], inputs: Sequence[Sample], make: Callable[[Tensor, float], Tensor]) -> float | None:
    """The exponent with the least error summed over the layers, or None where no smoothing is best.

    Each half of the data is judged with factors and ranges of the other half: a strong exponent makes every channel
    reach the limit of the range, so that new data clips, which is not seen on the data that the ranges come from.
    """
    folds = max((observer.folds() for observer in inputs), key=lambda found: sum(len(rows) for rows, _, _ in found))
    energies = [[layer.energy(rows) for layer in layers] for rows, _, _ in folds]

    def error(alpha: float | None) -> float:
        total = 0.0
        for (rows, low, high), exact in zip(folds, energies, strict=True):
            absmax = torch.maximum(low.abs(), high.abs())
            factor = torch.ones_like(absmax) if alpha is None else make(absmax, alpha)
            of_layers = zip(layers, exact, strict=True)
            total += sum(layer.error(rows, low, high, factor, energy) for layer, energy in of_layers)
        return total

    tried: list[float | None] = [None, *ALPHAS]
    errors = [error(alpha) for alpha in tried]
    return tried[min(range(len(tried)), key=errors.__getitem__)]
