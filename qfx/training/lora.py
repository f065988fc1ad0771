"""LoRA of peft on packed and on prepared linears: what `training.adapters` registers in a LoraConfig. Imports peft.

    packed      y = base(x) + scaling * B(A(x))             the base frozen (QLoRA: Dettmers et al. 2023)
    prepared    y = fake_quantize(W + scaling * B A) x      W frozen; what is merged and converted is what was trained

Merging into a packed weight rounds it again; the buffers of before are kept until the layer is taken out, so that
unmerging gives them back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qfx.errors import explain
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear
from qfx.training.requantize import Change, rounded_again

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weight as it is


class PackedLoraLinear(Linear):  # type: ignore[misc]
    """LoRA on a QuantLinear or QuantMixed. Raises ValueError for what would need a float base: DoRA and other variants,
    and first values that are taken out of the base's weight (PiSSA, OLoRA, LoftQ, ...)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        _check_start(config, str(kwargs.get("target_name", "")))
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # a packed weight is [N, K], whatever the float module held
        self.merged_adapters: list[str] = []
        self.kept: tuple[dict[str, Tensor | None], Tensor | None] | None = None  # buffers and bias
        self.change: Change | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only plain LoRA: variants read and write the weight itself."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.base
        return base.in_features, base.out_features

    @property
    def base(self) -> QuantLinear | QuantMixed:
        """The packed linear."""
        found = self.get_base_layer()
        assert isinstance(found, QuantLinear | QuantMixed), type(found)
        return found

    def active(self) -> list[str]:
        """The active adapters that this linear has."""
        return [name for name in self.active_adapters if name in self.lora_A]

    @torch.no_grad()
    def delta(self, names: list[str] | None = None) -> Tensor:
        """The change of the weight by the adapters of these names (None: the active ones), f32 [N, K]."""
        base = self.base
        total = torch.zeros(base.out_features, base.in_features, device=next(base.buffers()).device)
        for name in self.active() if names is None else names:
            a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
            total += b @ a * self.scaling[name]
        return total

    @torch.no_grad()
    def bias_delta(self, names: list[str] | None = None) -> Tensor:
        """The change of the bias by the adapters of these names (None: the active ones), [N], or 0 of none: []."""
        total = torch.zeros((), device=next(self.base.buffers()).device)
        for name in self.active() if names is None else names:
            if self.lora_bias[name]:
                total = total + self.scaling[name] * self.lora_B[name].bias
        return total

    def check_bias(self, names: list[str], node: str = "") -> None:
        """Raises ValueError where one of these adapters has a bias (`lora_bias`), and the packed linear has none."""
        for name in names:
            if self.lora_bias[name] and self.base.bias is None:
                what = f"the bias of adapter {name!r} has no bias of the packed linear to be added to"
                raise ValueError(explain(what, node=node or None, next_step="train with lora_bias=False"))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round the base's weight with the adapters' change again, in its format. NaN and Inf are a ValueError."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.base
        self.check_bias(names)
        change, self.change = self.change, None
        if change is None:
            change = rounded_again(base, self.delta(names), "mse", name=f"the merged adapters {', '.join(names)}")
        if self.kept is None:
            self.kept = dict(base._buffers), None if base.bias is None else base.bias.detach().clone()
        base._buffers.update(change.buffers)
        if base.bias is not None:
            base.bias.add_(self.bias_delta(names).to(base.bias.dtype))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base as it was before any merge."""
        if self.kept is None:
            return
        self.base.__dict__["_buffers"], bias = self.kept
        if self.base.bias is not None and bias is not None:
            self.base.bias.copy_(bias)
        self.kept, self.merged_adapters = None, []


class FakeLoraLinear(Linear):  # type: ignore[misc]
    """LoRA inside the fake quantization of a linear that `qfx.prepare_qat` prepared, in the basis of its weight (inputs
    come to it rotated and smoothed). Raises ValueError for variants, for dropout, which a sum of weights has not,
    for first values that are taken out of the weight, and for a weight that another module has or reads, too (shared:
    name of each such module -> of the other): merged, the adapter would change both."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, *, shared: Mapping[str, str], **kwargs: Any
    ) -> None:
        node = str(kwargs.get("target_name", ""))
        _check_start(config, node)
        if node in shared:
            what = f"merged adapters would change {shared[node]}, too: the weight is the same"
            raise ValueError(explain(what, node=node, next_step="leave it out of target_modules, or untie the weights"))
        if config.lora_dropout:
            what = "adapters inside fake quantization change the weight, of which nothing can be dropped"
            found = f"lora_dropout={config.lora_dropout}"
            raise ValueError(explain(what, found=found, node=node, next_step="lora_dropout=0.0"))
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        base: Any = self.get_base_layer()
        self.fan_in_fan_out = base.fake_quant.weight.transposed

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only plain LoRA."""
        return {(): None}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [.., K] -> [.., N], by the weight with the active adapters as it comes back from its format."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapters inside fake quantization are the same for the whole batch, found adapter_names")
        base: Any = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        weight, bias = base.weight, None
        for name in (name for name in names if name in self.lora_A):
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
            if self.lora_bias[name]:
                bias = self.scaling[name] * self.lora_B[name].bias + (0.0 if bias is None else bias)
        y: Tensor = base.fake_quant.linear(base, x, weight)
        return y if bias is None else y + bias.to(y.dtype)


def _check_start(config: LoraConfig, node: str) -> None:
    start = config.init_lora_weights
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        raise ValueError(
            explain(
                f"init_lora_weights={start!r} changes the base's weight, which is quantized",
                expected=", ".join(map(repr, _PLAIN_STARTS)),
                node=node,
                next_step="init_lora_weights=True; the recipe's low_rank keeps a part of the weight in float",
            )
        )


class Refused:
    """Stands for quantized modules that have no LoRA: raises ValueError where peft would put an adapter on one."""

    def __init__(self, target: nn.Module, *args: Any, target_name: str = "", **kwargs: Any) -> None:
        raise ValueError(
            explain(
                "a quantized module that is no linear cannot have an adapter",
                expected="a quantized linear, or a float module",
                found=type(target).__name__,
                node=target_name,
                next_step="leave it out of target_modules, or quantize with a recipe that leaves it in float (ignore)",
            )
        )
