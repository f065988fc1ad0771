"""Devices: published figures, curves, files of profiles."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfx.allocation.devices import DEVICES, Device, between, device, load
from qfx.format import Format

F = Format.parse
CPU = Device(
    name="test cpu",
    memory=16 * 10**9,
    bandwidth=((1 << 20, 60e9), (1 << 28, 15e9)),
    rates={
        "f32": ((1, 20e9), (256, 100e9)),
        "w4": ((1, 140e9),),
        "w8": ((1, 130e9),),
        "w8a8": ((1, 80e9), (64, 370e9)),
    },
    dtype="f32",
    overhead=1e-6,
    widths=(2, 4, 8),
    source="made up",
    measured=True,
    facts={"threads": 1},
)


def test_published_figures() -> None:
    for name, memory, bandwidth, f16 in (
        ("a100", 80, 2039, 312), ("h100", 80, 3350, 989), ("h200", 141, 4800, 989), ("rtx4090", 24, 1008, 165.2),
    ):  # fmt: skip
        one = DEVICES[name]
        assert (one.memory, one.speed(1e9), one.rate("f16", 64)) == (memory * 1e9, bandwidth * 1e9, f16 * 1e12)
        assert one.source.startswith("published peak: NVIDIA") and not one.measured
    assert "f8" not in DEVICES["a100"].rates, "it has no 8-bit floats"


def test_kernels() -> None:
    gpu = DEVICES["a100"]
    assert CPU.kernel(None, None) == CPU.kernel(F("f16"), None) == "f32"
    assert CPU.kernel(F("u4/g32"), None) == CPU.kernel(F("i3/g32"), None) == CPU.kernel(F("u4/g32"), F("f32")) == "w4"
    assert CPU.kernel(F("u5/g32"), None) == "w8"
    assert CPU.kernel(F("u2/g32"), None) == "f32", "this one tells no rate of 2 bits"
    assert CPU.kernel(F("i8/ch"), F("i8/tok")) == CPU.kernel(F("i4/ch"), F("i8/tok")) == "w8a8"
    assert CPU.kernel(F("i4/ch"), F("i4/tok")) == "w8a8" and gpu.kernel(F("i4/ch"), F("i4/tok")) == "w4a4"
    assert DEVICES["h100"].kernel(F("f8e4m3/ch"), F("f8e4m3/tok")) == "f8"
    assert gpu.kernel(F("f8e4m3/ch"), F("f8e4m3/tok")) == gpu.kernel(F("u4/g32"), None) == "f16"


def test_codes_are_held_in_the_bits_that_kernels_read() -> None:
    assert [str(CPU.held(F(f))) for f in ("u3/g32", "i5/ch", "u2/g64", "nf4/g64", "f16")] == [
        "u4/g32", "i8/ch", "u2/g64", "nf4/g64", "f16",
    ]  # fmt: skip
    assert DEVICES["h100"].held(F("u3/g32")) == F("u3/g32")


def test_between_points() -> None:
    assert CPU.speed(1) == 60e9 and CPU.speed(1e12) == 15e9
    assert CPU.speed(1 << 24) == pytest.approx(30e9), "half of the way on logarithmic axes"
    assert CPU.rate("f32", 16) == pytest.approx((20e9 * 100e9) ** 0.5)


@given(st.floats(1, 1e12))
def test_between_stays_within(at: float) -> None:
    curve = ((4, 3.0), (100, 9.0), (10**6, 1.0))
    assert 1.0 - 1e-9 <= between(curve, at) <= 9.0 + 1e-9


def test_a_device_needs_its_curves() -> None:
    fields: dict[str, Any] = {"name": "x", "memory": 1, "bandwidth": ((1, 1.0),), "rates": {"f32": ((1, 1.0),)}}
    with pytest.raises(ValueError, match="needs the rate of its dtype 'f16', found f32"):
        Device(**fields)
    for bad in ((), ((1, 0.0),), ((1, float("nan")),), ((2, 1.0), (1, 1.0))):
        with pytest.raises(ValueError, match="bandwidth of device 'x' is no ascending list"):
            Device(**{**fields, "dtype": "f32", "bandwidth": bad})


def test_a_profile_comes_back(tmp_path: Path) -> None:
    CPU.save(tmp_path / "cpu.json")
    assert load(tmp_path / "cpu.json") == CPU == device(tmp_path / "cpu.json") == device(CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "recipe"}, 'it lacks "format": "qfx-device"'),
        ({"version": 2}, "has version 2, this qfx reads 1"),
        ({"memmory": 3}, "unknown key 'memmory' in .*, did you mean 'memory'"),
        ({"memory": "16 GB"}, "'memory' in .*: expected .*int.*, found '16 GB'"),
        ({"rates": {"f32": [[1]]}}, "is no profile of a device: not enough values"),
        ({"rates": {"f32": [[math.inf, 1.0]]}}, "is no profile of a device: cannot convert float infinity"),
        ({"bandwidth": []}, "is no ascending list"),
        ({"dtype": "f16"}, "needs the rate of its dtype 'f16'"),
    ],
)
def test_bad_profiles(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({**json.loads(CPU.to_json()), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(file)


def test_what_is_no_profile_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"truncated or no JSON: Expecting(.|\n)*qfx profile"):
        load(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        device(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="unknown device 'h10', did you mean 'h100'(.|\n)*qfx profile -o cpu.json"):
        device("h10")
