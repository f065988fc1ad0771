"""What training stacks put around a model or its tensors, as far as `qfx.convert` has to know of it."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from qfx.errors import explain, warn


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError for weights that FSDP2 has sharded over processes; a forward that accelerate has wrapped for
    mixed precision, which would go on running so, is a QfxWarning."""
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        step = (
            "state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)) in all processes; in one, load it into the model prepared anew by the same plan "
            "(without fully_shard), and convert that"
        )
        what = f"{len(sharded)} tensors are sharded over processes (FSDP2), the first is {sharded[0]!r}"
        raise ValueError(explain(what, expected="whole tensors", next_step=step))
    if "_original_forward" in model.__dict__:
        step = "qfx.convert(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        warn(explain("accelerate's autocast is still around the model's forward", next_step=step), stacklevel=3)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; nothing is imported to tell."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)
