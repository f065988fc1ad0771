"""How packed tensors are to be read, in the metadata of a state dict: codes of another format may have the same shapes.

Files of safetensors hold tensors alone, so that nothing is compared there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qfx.errors import explain

_KEY = "qfx.stored"


def tell(state_dict: Any, prefix: str, stored: str) -> None:
    """Put into a state dict how the packed tensors of the module at `prefix` are stored."""
    if hasattr(state_dict, "_metadata"):
        state_dict._metadata[prefix[:-1]][_KEY] = stored


def differs(metadata: Mapping[str, Any], stored: str, whose: str) -> str:
    """What is wrong with a module's entry of a state dict, where it tells another way than `stored`; "" otherwise."""
    found = metadata.get(_KEY, stored)
    if found == stored:
        return ""
    what = f"the weight of {whose} is stored in another way"
    step = "quantize the model by the recipe of the one that was saved, or use qfx.save and qfx.load"
    return explain(what, expected=stored, found=found, next_step=step)
