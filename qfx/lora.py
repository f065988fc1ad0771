"""LoRA of peft on packed linears: what `qfx.adapters` registers in a LoraConfig. Importing this imports peft.

    y = base(x) + scaling * B(A(x))         the base packed and frozen (QLoRA: Dettmers et al. 2023)

Merging puts the change into the packed weight, which rounds it again; the buffers of before are kept until the layer
is taken out, so that unmerging gives them back bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qfx.errors import explain
from qfx.mixed import QuantMixed
from qfx.modules import QuantLinear
from qfx.requantize import Change, rounded_again

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weight as it is


class PackedLoraLinear(Linear):  # type: ignore[misc]
    """LoRA on a QuantLinear or QuantMixed. Raises ValueError for what would need a float base: DoRA and other variants,
    and first values that are taken out of the base's weight (PiSSA, OLoRA, LoftQ, ...)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if not isinstance(start, bool) and start not in _PLAIN_STARTS:
            raise ValueError(
                explain(
                    f"init_lora_weights={start!r} changes the base's weight, which is packed",
                    expected=", ".join(map(repr, _PLAIN_STARTS)),
                    node=str(kwargs.get("target_name", "")),
                    next_step="init_lora_weights=True; the recipe's low_rank keeps a part of the weight in float",
                )
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # a packed weight is [N, K], whatever the float module held
        self.merged_adapters: list[str] = []
        self.kept: dict[str, Tensor | None] | None = None
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

    @torch.no_grad()
    def delta(self, names: list[str] | None = None) -> Tensor:
        """The change of the weight by the adapters of these names (None: the active ones), f32 [N, K]."""
        base = self.base
        total = torch.zeros(base.out_features, base.in_features, device=next(base.buffers()).device)
        for name in self.active_adapters if names is None else names:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
                total += b @ a * self.scaling[name]
        return total

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round the base's weight with the adapters' change again, in its format. NaN and Inf are a ValueError."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.base
        change, self.change = self.change, None
        if change is None:
            change = rounded_again(base, self.delta(names), "mse", name=f"the merged adapters {', '.join(names)}")
        if self.kept is None:
            self.kept = dict(base._buffers)
        base._buffers.update(change.buffers)
        self._add_bias(names, 1.0)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base as it was before any merge."""
        if self.kept is None:
            return
        self.base.__dict__["_buffers"] = self.kept
        self._add_bias(self.merged_adapters, -1.0)
        self.kept, self.merged_adapters = None, []

    def _add_bias(self, names: list[str], sign: float) -> None:
        for name in names:
            if self.lora_bias[name]:
                if self.base.bias is None:
                    raise ValueError(f"the bias of adapter {name!r} has no bias of the base to be added to")
                self.base.bias.data += sign * self.scaling[name] * self.lora_B[name].bias


class Refused:
    """Stands for packed modules that have no LoRA: raises ValueError where peft would put an adapter on one."""

    def __init__(self, target: nn.Module, *args: Any, target_name: str = "", **kwargs: Any) -> None:
        raise ValueError(
            explain(
                "a packed module that is no linear cannot have an adapter",
                expected="a packed linear (QuantLinear, QuantMixed), or a float module",
                found=type(target).__name__,
                node=target_name,
                next_step="leave it out of target_modules, or quantize with a recipe that leaves it in float (ignore)",
            )
        )
