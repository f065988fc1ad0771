"""Which block type each tensor of a GGUF file gets: the mixes that llama.cpp's users know by name.

`Q4_K_M` and its like give most matrices one type and a better one to those that matter more: the output table, values,
and `down` in some layers. The rules are llama.cpp's (its `llama_model_quantize`), found by what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from qfx.errors import Note, nearest
from qfx.interop.gguf_blocks import BLOCK_TYPES

# name: (type of most matrices, the number that GGUF gives the mix)
MIXES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0),
    "F16": ("F16", 1),
    "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7),
    "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3),
    "Q5_0": ("Q5_0", 8),
    "Q5_1": ("Q5_1", 9),
    "Q2_K": ("Q2_K", 10),
    "Q3_K_S": ("Q3_K", 11),
    "Q3_K_M": ("Q3_K", 12),
    "Q3_K_L": ("Q3_K", 13),
    "Q4_K_S": ("Q4_K", 14),
    "Q4_K_M": ("Q4_K", 15),
    "Q5_K_S": ("Q5_K", 16),
    "Q5_K_M": ("Q5_K", 17),
    "Q6_K": ("Q6_K", 18),
    "IQ4_NL": ("IQ4_NL", 25),
    "MXFP4": ("MXFP4", 38),
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Of 256-value blocks, where 256 does not divide the columns.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_PLAIN = ("F32", "F16", "BF16")
_KEPT = ("token_types", "position_embd")  # tables that stay in F32


def mix_named(name: str) -> str:
    """The mix of that name, in any case; `Q4_K` is `Q4_K_M`. Raises ValueError with the nearest where there is none."""
    if not isinstance(name, str):
        raise ValueError(f"a GGUF type is a name such as 'Q4_K_M', found {type(name).__name__}")
    upper = name.strip().upper()
    upper = _ALIASES.get(upper, upper)
    if upper not in MIXES:
        raise ValueError(f"unknown GGUF type {name!r}: {nearest(upper, MIXES)}")
    return upper


@dataclass(frozen=True)
class Facts:
    """What the rules look at: architecture, layers, query heads per key head, whether the output table is the input's.

    weighted: importance of columns is known (an imatrix).
    """

    arch: str
    layers: int
    gqa: int
    tied: bool
    weighted: bool


def type_of(name: str, shape: tuple[int, ...], mix: str, facts: Facts) -> str:
    """The type that a mix gives to the tensor `name` (`blk.3.attn_q.weight`) of that shape, columns last.

    Vectors and small tables stay in F32. A type whose blocks do not divide the columns is left to `fitting`.
    """
    base = MIXES[mix][0]
    stem = name.removesuffix(".weight")
    if len(shape) < 2 or not name.endswith(".weight") or stem in _KEPT or stem.endswith("_norm"):
        return "F32"
    if base in _PLAIN:
        return base
    if stem == "output" or (stem == "token_embd" and facts.tied):
        return _of_output(base, shape[-1])
    if stem == "token_embd":
        return "Q8_0" if base == "MXFP4" else base
    layer, _, part = stem.removeprefix("blk.").partition(".")
    rule = {"attn_v": _of_values, "ffn_down": _of_down, "attn_output": _of_attention_output}.get(part)
    return base if rule is None else rule(mix, int(layer), facts)


def fitting(wanted: str, columns: int) -> str:
    """The type itself, or the one that stands in for it where its blocks do not divide the columns."""
    if wanted in _PLAIN or columns % BLOCK_TYPES[wanted].size == 0:
        return wanted
    second = _FALLBACK.get(wanted, "F16")
    return second if second in _PLAIN or columns % BLOCK_TYPES[second].size == 0 else "F16"


def fallback_notes(changed: dict[str, tuple[str, str, int]]) -> list[Note]:
    """A note for each tensor name and its (wanted type, type instead, columns)."""
    return [
        Note(
            name,
            f"{columns} columns are no whole number of {wanted} blocks of {BLOCK_TYPES[wanted].size}:"
            f" written as {used}",
            "none, as llama.cpp does the same; a type of 32-value blocks (Q4_0, Q5_0, Q8_0) fits more widths",
        )
        for name, (wanted, used, columns) in changed.items()
    ]


def _of_output(base: str, columns: int) -> str:
    """The output table is worth 6 bits at least."""
    if base in ("Q8_0", "MXFP4") or columns % BLOCK_TYPES[base].size:
        return "Q8_0"
    return "Q6_K"


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _of_values(mix: str, layer: int, facts: Facts) -> str:
    base = MIXES[mix][0]
    found = base
    if mix == "Q2_K":
        found = "Q4_K" if facts.gqa >= 4 else "Q3_K"
    elif mix == "Q3_K_M":
        found = "Q5_K" if layer < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix == "IQ4_NL" and facts.gqa >= 4):
        found = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and more_bits(layer, facts.layers):
        found = "Q6_K"
    elif mix == "Q4_K_S" and layer < 4:
        found = "Q5_K"
    if facts.layers == 80 and facts.gqa > 1 and facts.arch in ("llama", "qwen2") and found in ("Q3_K", "Q4_K"):
        return "Q5_K"  # of the 70 B models, where 8 heads share one
    return found


def _of_down(mix: str, layer: int, facts: Facts) -> str:
    first = layer < facts.layers // 8
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < facts.layers // 16 else "Q4_K"
    if mix == "Q3_K_L":
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and more_bits(layer, facts.layers):
        return "Q6_K"
    if first and (mix == "Q4_K_S" or (mix == "IQ4_NL" and not facts.weighted)):
        return "Q5_K"
    if first and facts.weighted and mix in ("Q4_0", "Q5_0"):
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    return MIXES[mix][0]


def _of_attention_output(mix: str, layer: int, facts: Facts) -> str:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, MIXES[mix][0])
