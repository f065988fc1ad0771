"""qfx.live.subclass: modules whose class was changed are copied and pickled like others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.live.subclass import class_maker, subclass
from tests.zoo import ZOO

EIGHT = qfx.Rule(target="attention", q="i8/tok", k="i8/tok", v="i8/head/dyn", p="u8/tok")


@class_maker
def _twice(base: type[nn.Module], factor: int) -> type[nn.Module]:
    own: Any = base
    return subclass(base, {"forward": lambda self, x: factor * own.forward(self, x)}, "Twice")


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_classes_of_classes(how: str) -> None:
    module: Any = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    wanted = 6 * module(x)
    module.__class__ = _twice(_twice(nn.Linear, 2), 3)
    assert _twice(nn.Linear, 2) is _twice(nn.Linear, 2) is not _twice(nn.Linear, 3)
    found = COPIES[how](module)
    assert type(found) is type(module) and found is not module
    torch.testing.assert_close(found(x), wanted)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("recipe", ["w4a16", "w8a8+kv8", "attention", "qat"])
def test_models(recipe: str, how: str) -> None:
    """Packed parameters of foreign forwards (experts), caches, attention in 8 bits, fake quantization."""
    model, inputs = ZOO["mixtral" if recipe == "w4a16" else "llama"]()
    if recipe == "qat":
        model = qfx.prepare_qat(model, "w4a8").eval()
    else:
        asked = qfx.Recipe(name=recipe, rules=(EIGHT,)) if recipe == "attention" else recipe
        model = qfx.quantize(model, asked)
    found = COPIES[how](model)
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    if recipe == "qat":
        assert not qfx.convert(found).training
