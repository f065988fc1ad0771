"""Mixes: their names, which tensor gets what, and what stands in where blocks do not fit."""

from __future__ import annotations

import pytest

from qfx.interop.gguf_blocks import BLOCK_TYPES
from qfx.interop.gguf_types import MIXES, Facts, fallback_notes, fitting, mix_named, type_of

LLAMA = Facts("llama", 32, 4, tied=False, weighted=False)
SQUARE = (256, 256)


def of(stem: str, mix: str, facts: Facts = LLAMA, shape: tuple[int, ...] = SQUARE) -> str:
    return type_of(f"{stem}.weight", shape, mix, facts)


@pytest.mark.parametrize(("asked", "found"), [("Q4_K_M", "Q4_K_M"), ("q4_k", "Q4_K_M"), (" q8_0 ", "Q8_0")])
def test_names(asked: str, found: str) -> None:
    assert mix_named(asked) == found


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown GGUF type 'Q4_K_XL': did you mean 'Q"):
        mix_named("Q4_K_XL")
    with pytest.raises(ValueError, match="a GGUF type is a name such as 'Q4_K_M', found int"):
        mix_named(4)  # type: ignore[arg-type]


def test_numbers_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle: pip install qfx[interop]")
    for name, (base, number) in MIXES.items():
        member = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(name, f"MOSTLY_{name}")
        assert gguf.LlamaFileType[member] == number
        assert base in BLOCK_TYPES or base in ("F32", "F16", "BF16")


@pytest.mark.parametrize("mix", sorted(MIXES))
def test_vectors_and_small_tables_stay_in_f32(mix: str) -> None:
    assert type_of("blk.0.attn_norm.weight", (256,), mix, LLAMA) == "F32"
    assert type_of("blk.0.attn_q.bias", (256,), mix, LLAMA) == "F32"
    assert of("token_types", mix) == of("position_embd", mix) == of("token_embd_norm", mix) == "F32"


@pytest.mark.parametrize(
    ("mix", "values", "down", "out", "output"),
    [
        ("Q2_K", ["Q4_K"] * 4, ["Q3_K"] * 4, "Q3_K", "Q6_K"),
        ("Q3_K_S", ["Q3_K"] * 4, ["Q3_K"] * 4, "Q3_K", "Q6_K"),
        ("Q3_K_M", ["Q5_K", "Q4_K", "Q4_K", "Q4_K"], ["Q5_K", "Q4_K", "Q4_K", "Q4_K"], "Q4_K", "Q6_K"),
        ("Q3_K_L", ["Q5_K"] * 4, ["Q5_K"] * 4, "Q5_K", "Q6_K"),
        ("Q4_K_S", ["Q5_K", "Q4_K", "Q4_K", "Q4_K"], ["Q5_K", "Q4_K", "Q4_K", "Q4_K"], "Q4_K", "Q6_K"),
        ("Q4_K_M", ["Q6_K", "Q4_K", "Q6_K", "Q6_K"], ["Q6_K", "Q4_K", "Q6_K", "Q6_K"], "Q4_K", "Q6_K"),
        ("Q5_K_M", ["Q6_K", "Q5_K", "Q6_K", "Q6_K"], ["Q6_K", "Q5_K", "Q6_K", "Q6_K"], "Q5_K", "Q6_K"),
        ("Q4_0", ["Q4_0"] * 4, ["Q4_0"] * 4, "Q4_0", "Q6_K"),
        ("Q8_0", ["Q8_0"] * 4, ["Q8_0"] * 4, "Q8_0", "Q8_0"),
        ("MXFP4", ["MXFP4"] * 4, ["MXFP4"] * 4, "MXFP4", "Q8_0"),
        ("F16", ["F16"] * 4, ["F16"] * 4, "F16", "F16"),
    ],
)
def test_mixes(mix: str, values: list[str], down: list[str], out: str, output: str) -> None:
    """Layers 0, 5, 6 and 31 of 32."""
    assert [of(f"blk.{i}.attn_v", mix) for i in (0, 5, 6, 31)] == values
    assert [of(f"blk.{i}.ffn_down", mix) for i in (0, 5, 6, 31)] == down
    assert of("blk.3.attn_output", mix) == out
    assert of("output", mix) == output
    assert of("blk.3.ffn_up", mix) == MIXES[mix][0]


def test_a_table_that_is_also_the_output_is_better() -> None:
    tied = Facts("llama", 32, 1, tied=True, weighted=False)
    assert of("token_embd", "Q4_K_M", tied) == "Q6_K"
    assert of("token_embd", "Q4_K_M") == "Q4_K"
    assert of("token_embd", "Q4_K_M", tied, (2048, 192)) == "Q8_0", "where 256 does not divide the width"


def test_few_heads_and_deep_models() -> None:
    assert of("blk.9.attn_v", "Q2_K", Facts("llama", 32, 1, tied=True, weighted=False)) == "Q3_K"
    assert of("blk.11.attn_v", "Q4_K_M", Facts("llama", 80, 8, tied=False, weighted=False)) == "Q5_K"
    assert of("blk.11.attn_v", "Q4_K_M", Facts("qwen3", 80, 8, tied=False, weighted=False)) == "Q4_K"
    assert of("blk.11.attn_v", "Q4_K_M", Facts("llama", 80, 1, tied=False, weighted=False)) == "Q4_K"


def test_importance_changes_the_first_downs_of_q4_0() -> None:
    weighted = Facts("llama", 32, 4, tied=False, weighted=True)
    assert [of(f"blk.{i}.ffn_down", "Q4_0", weighted) for i in (0, 3, 4)] == ["Q4_1", "Q4_1", "Q4_0"]
    assert of("blk.0.ffn_down", "Q5_0", weighted) == "Q5_1"


@pytest.mark.parametrize(
    ("wanted", "columns", "found"),
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 192, "Q5_0"), ("Q5_K", 192, "Q5_1"), ("Q6_K", 96, "Q8_0"), ("Q2_K", 32, "Q4_0"),
        ("Q3_K", 64, "Q4_0"), ("Q4_K", 40, "F16"), ("Q4_0", 48, "F16"), ("Q4_0", 64, "Q4_0"), ("F32", 3, "F32"),
    ],
)  # fmt: skip
def test_what_stands_in(wanted: str, columns: int, found: str) -> None:
    assert fitting(wanted, columns) == found


def test_a_note_for_each_tensor_whose_type_does_not_fit() -> None:
    key = ("Q4_K", "Q5_0", 192)
    notes = fallback_notes({"a": key, "b": key, "c": ("Q6_K", "Q8_0", 192)})
    assert [note.node for note in notes] == ["a", "b", "c"] and notes[0].reason == notes[1].reason
    assert "192 columns are no whole number of Q4_K blocks of 256: written as Q5_0" in str(notes[0])
    assert not notes[0].minor
