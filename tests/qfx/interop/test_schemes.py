"""Schemes of compressed-tensors: which module has which, and the formats they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfx.errors import UnsupportedError
from qfx.interop.schemes import Schemes, input_format, weight_format

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def schemes(*targets: list[str], **more: Any) -> Schemes:
    groups = {f"g{i}": {"targets": t, "weights": {**WEIGHTS, "num_bits": i + 2}} for i, t in enumerate(targets)}
    return Schemes({"format": "pack-quantized", "config_groups": groups, **more})


def test_names_come_before_expressions_and_classes() -> None:
    found = schemes(["Linear"], ["re:.*mlp.*"], ["model.mlp.up"], ignore=["lm_head", "re:.*gate$"])

    def bits(name: str, kind: str = "Linear") -> int | None:
        group = found.of(name, (kind, "Module"))
        return None if group is None else group["weights"]["num_bits"]

    assert [bits(n) for n in ("model.mlp.up", "model.mlp.down", "model.q")] == [4, 3, 2]
    assert [bits(n) for n in ("lm_head", "model.mlp.gate")] == [None, None]
    assert bits("model.q", "Embedding") is None


def test_versions() -> None:
    assert schemes(["Linear"], version="0.9.1").version == (0, 9) and schemes(["Linear"]).version == (0, 17)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "pack-quantized"}, "no config_groups"),
        ({"format": "pack-quantized", "config_groups": {"W8A8": ["Linear"]}}, "group 'W8A8' is not read"),
        ({"format": "marlin-24", "config_groups": {"a": {"weights": WEIGHTS}}}, "unknown format 'marlin-24'"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schemes(config)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ({"num_bits": 4, "group_size": 32}, None),
        ({"num_bits": 8, "group_size": -1}, {"dynamic": True, "strategy": "token"}),
        ({"strategy": "channel"}, {"dynamic": True}),
        ({"type": "float", "strategy": "channel"}, {"type": "float"}),
    ],
)
def test_what_a_config_leaves_out_is_what_the_library_says(weights: Any, inputs: Any) -> None:
    oracle = pytest.importorskip("compressed_tensors", reason="pip install qfx[interop]").quantization.QuantizationArgs
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    found = Schemes({"format": "pack-quantized", "config_groups": {"a": group}}).groups[0]
    for said, read in ((weights, found["weights"]), (inputs, found["input_activations"])):
        own = None if said is None else oracle(**said)
        assert read == (own and {key: getattr(own, key) for key in read})


def test_a_left_out_symmetry_is_symmetric() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
    group |= {"input_activations": {"strategy": "token", "dynamic": True}}
    found = Schemes({"format": "pack-quantized", "config_groups": {"a": group}}).groups[0]
    assert str(weight_format(found["weights"], torch.ones(1), "a")) == "i4/g32"
    assert input_format(found["input_activations"]) == "i8/tok"


def rotated(*locations: str) -> dict[str, Any]:
    apply = [{"targets": ["re:.*down_proj$"], "location": location, "inverse": False} for location in locations]
    return {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": apply}}}}


def test_rotations_of_activations_are_refused_those_of_weights_are_not() -> None:
    assert schemes(["Linear"], **rotated("weight_input", "weight_output")).groups
    with pytest.raises(UnsupportedError, match=r"rotates activations[\s\S]*found: input of re:\.\*down_proj\$"):
        schemes(["Linear"], **rotated("weight_input", "input"))


@pytest.mark.parametrize(
    ("args", "scale", "text"),
    [
        ({}, torch.float32, "i4/g32"),
        ({"symmetric": False}, torch.float16, "u4/g32/f16"),
        ({"strategy": "channel", "num_bits": 8}, torch.bfloat16, "i8/ch/bf16"),
        ({"strategy": "tensor", "num_bits": 8, "type": "float"}, torch.float32, "f8e4m3"),
        ({"strategy": "block", "num_bits": 8, "block_structure": [9, 7]}, torch.float32, "i8/b9x7"),
        ({"strategy": "tensor_group", "type": "float", "group_size": 16}, torch.float8_e4m3fn, "f4e2m1/g16/e4m3"),
        ({"strategy": "group", "type": "float", "group_size": 32}, torch.uint8, "f4e2m1/g32/e8m0"),
    ],
)  # fmt: skip
def test_weight_formats(args: dict[str, Any], scale: torch.dtype, text: str) -> None:
    assert str(weight_format({**WEIGHTS, **args}, torch.ones(1).to(scale), "a")) == text


@pytest.mark.parametrize("args", [{"type": "float", "num_bits": 6}, {"strategy": "token"}])
def test_weights_without_a_format_are_named(args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no format for the weight of 'a.b'"):
        weight_format({**WEIGHTS, **args}, torch.ones(1), "a.b")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (None, ""),
        ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}, "i8/tok"),
        ({"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}, "u8"),
        ({"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": True}, "f8e4m3/dyn"),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local"}, None),
        ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "dynamic": True}, None),
    ],
)
def test_input_formats(args: dict[str, Any] | None, text: str | None) -> None:
    assert input_format(args) == text
