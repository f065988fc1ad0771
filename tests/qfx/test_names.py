"""qfx.names: a graph's names of its weights, said as another module says them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qfx.names import Translation, index


def model() -> nn.ModuleDict:
    found = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), "head": nn.Linear(2, 2)})
    found.get_submodule("head").weight = found.get_parameter("layers.0.weight")
    found.register_buffer("scale", torch.ones(2))
    return found


def test_the_index_has_every_name_of_every_tensor() -> None:
    own = model()
    found = index(own)
    assert found[id(own.get_parameter("layers.0.weight"))] == ["layers.0.weight", "head.weight"]
    assert found[id(own.get_buffer("scale"))] == ["scale"]
    assert sum(len(names) for names in found.values()) == 7


def between(own: nn.Module, **names: str) -> Translation:
    tensors = {**dict(own.named_parameters(remove_duplicate=False)), **dict(own.named_buffers())}
    return Translation.between([(name, tensors[real]) for name, real in names.items()], index(own))


def test_a_sub_module_gains_its_path() -> None:
    found = between(model(), weight="layers.1.weight", bias="layers.1.bias")
    assert found.heads == (("", "layers.1"),)
    assert found("weight") == "layers.1.weight" and found("") == "layers.1" and found("gelu") == "layers.1.gelu"


def test_a_larger_module_loses_its_path() -> None:
    own = model()
    pairs: list[tuple[str, Tensor | None]] = [("outer.net.head.bias", own.get_parameter("head.bias"))]
    found = Translation.between(pairs, index(own))
    assert found("outer.net.head.bias") == "head.bias" and found("outer.net.layers.1") == "layers.1"
    assert found("outer.network") == "outer.network" and not found.knows("outer.network")


def test_several_heads() -> None:
    own, other = model(), nn.Linear(2, 2)
    pairs: list[tuple[str, Tensor | None]] = [
        ("a.weight", own.get_parameter("layers.1.weight")), ("b.weight", other.weight), ("c.weight", None),
        ("ab.bias", own.get_parameter("head.bias")),
    ]  # fmt: skip
    found = Translation.between(pairs, index(own))
    assert [found(name) for name in ("a.weight", "a", "ab.bias", "b.weight")] == [
        "layers.1.weight", "layers.1", "head.bias", "b.weight",
    ]  # fmt: skip
    assert [found.knows(name) for name in ("a.x", "ab", "b", "c.weight")] == [True, True, False, False]


def test_of_tied_names_the_one_with_the_longest_common_end_is_meant() -> None:
    own = model()
    table = own.get_parameter("layers.0.weight")
    assert Translation.between([("head.weight", table)], index(own))("head.weight") == "head.weight"
    assert Translation.between([("0.weight", table)], index(own))("0.weight") == "layers.0.weight"


def test_nothing_known_changes_nothing() -> None:
    nothing = Translation.between([("weight", torch.ones(1))], index(model()))
    assert nothing == Translation() and nothing("weight") == "weight" and not nothing.knows("weight")
