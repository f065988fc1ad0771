"""The recipes that have a name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from qfx.recipe import Recipe, Rule
from qfx.rounding.method_options import CANDIDATES, AllocationOptions, LiftOptions

_EMBEDDING = {"target": "embedding", "w": "i8/ch"}
_TIED = {"target": "tied", "w": "u4/g32/f16"}  # its error is in every logit: in longer groups it is most of the loss
_TIED8 = {"target": "tied", "w": "i8/ch"}  # once in 8 bits is less than an embedding in 8 and an output in 4 beside it
_ATTENTION = r"re:(?i)(.*\.)?[^.]*(attn|attention)[^.]*\."
_MLP = (
    r"re:(.*\.)?(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|c_fc|dense_h_to_4h|dense_4h_to_h|lin1|lin2|wi|wi_0|wi_1|wo"
    r"|w1|w2|w3|intermediate\.dense|(layer|layers|block|blocks|h)\.\d+\.output\.dense"
    r"|(mlp|ffn|feed_forward|feedforward)\.[^.]+)$"
)


def _weights(fmt: str, *kinds: str) -> list[dict[str, Any]]:
    return [{"target": kind, "w": fmt} for kind in kinds]


def _grouped(fmt: str, *kinds: str) -> list[dict[str, Any]]:
    return [{"target": kind, "w": fmt, "fit_groups": True} for kind in kinds]


def _both(x: str, w: str, *kinds: str) -> list[dict[str, str]]:
    return [{"target": kind, "x": x, "w": w} for kind in kinds]


_STATIC = [*_both("u8", "i8/ch", "linear", "experts", "conv"), _EMBEDDING]

_HEAD = {"target": "*lm_head", "x": "i8/tok", "w": "i8/ch"}
_CHOSEN = {  # formats are chosen by measuring weights rounded by "mse", by energy; GPTQ rounds what is chosen
    "rules": [*_weights("u4/g32/f16", "linear", "experts"), _EMBEDDING, _TIED],
    "rounding": "gptq",
}
_NF4 = ("nf4/g16/f16", "nf4/g32/f16", "nf4/g64/f16")
_ENERGY = {"rounding": "mse", "weighting": "energy", "num_calibration_samples": 16}
_ROTATIONS = ("rotate", "rotate-down")
_ROTATED = {"rewrites": _ROTATIONS, "rounding": "gptq"}

_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # name: one line for people, the fields
    "w8a8": (
        "8-bit weights per channel, 8-bit activations per token; needs no data",
        {"rules": [*_both("i8/tok", "i8/ch", "linear", "experts"), *_both("i8/dyn", "i8/ch", "conv"), _EMBEDDING]},
    ),
    "w8a8-rotate": (
        "w8a8 with rotated channels (QuaRot), so that none is an outlier: for language models; needs no data",
        {
            "rules": [*_both("i8/tok", "i8/ch", "linear", "experts"), *_both("i8/dyn", "i8/ch", "conv"), _EMBEDDING],
            "rewrites": _ROTATIONS,
        },
    ),
    "w8a8-static": ("8-bit weights per channel, 8-bit activations with fixed scales; needs data", {"rules": _STATIC}),
    "w8a8-smooth": (
        "w8a8-static after SmoothQuant with searched strength; needs data",
        {"rules": _STATIC, "rewrites": ("smooth",), "smooth_alpha": "search"},
    ),
    "int8-outliers": (
        "w8a8, but input channels beyond 6.0 in the data stay in 16 bits (LLM.int8); needs data",
        {"rules": [*_both("i8/tok", "i8/ch", "linear", "experts"), _EMBEDDING], "outliers": 6.0},
    ),
    "w8a16": (
        "8-bit weights per channel, float activations",
        {"rules": [*_weights("i8/ch", "linear", "experts", "conv"), _EMBEDDING]},
    ),
    "w4a16": (
        "4-bit weights in groups of at most 128 (8-bit embeddings, tied ones 4-bit), float activations",
        {"rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED]},
    ),
    "w4a16-hqq": (
        "w4a16 with half-quadratic scales and zero points (HQQ); needs no data",
        {"rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED], "rounding": "hqq"},
    ),
    "w4a16-mse": (
        "w4a16 with scales of the least error, by the energy of each input channel; a few samples of data are enough",
        {"rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED], **_ENERGY},
    ),
    "w4a16-awq": (
        "w4a16 with activation-aware scales and clipping (AWQ); needs data",
        {
            "rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED],
            "rewrites": ("awq",),
            "rounding": "mse",
            "weighting": "covariance",
        },
    ),
    "w2a16": (
        "2-bit weights in groups of at most 64 (8-bit embeddings, tied ones 4-bit), no data: the error is large",
        {"rules": [*_grouped("u2/g64/f16", "linear", "experts"), _EMBEDDING, _TIED], "rounding": "mse"},
    ),
    "w4a8": (
        "4-bit weights per channel (8-bit embeddings), 8-bit activations per token",
        {"rules": [*_both("i8/tok", "i4/ch", "linear", "experts"), _EMBEDDING, _TIED8]},
    ),
    "w4a16-gptq": (
        "w4a16 with weights rounded layer by layer by what each reads (GPTQ); needs data",
        {
            "rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED],
            "rounding": "gptq",
        },
    ),
    "w3a16-gptq": (
        "3-bit weights in groups of at most 128 (8-bit embeddings, tied ones 4-bit), by GPTQ; needs data",
        {
            "rules": [*_grouped("u3/g128/f16", "linear", "experts"), _EMBEDDING, _TIED],
            "rounding": "gptq",
        },
    ),
    "w2a16-gptq": (
        "2-bit weights in groups of at most 64 (8-bit embeddings, tied ones 4-bit), by GPTQ; needs data",
        {
            "rules": [*_grouped("u2/g64/f16", "linear", "experts"), _EMBEDDING, _TIED],
            "rounding": "gptq",
            "gptq": {"act_order": False},
        },
    ),
    "w4a16-learned": (
        "w4a16 with roundings and ranges learned block by block (AutoRound's manner); needs data and minutes",
        {"rules": [*_grouped("u4/g128/f16", "linear", "experts"), _EMBEDDING, _TIED], "rounding": "learned"},
    ),
    "w2a16-learned": (
        "w2a16 with roundings and ranges learned block by block (AutoRound's manner); needs data and minutes",
        {"rules": [*_grouped("u2/g64/f16", "linear", "experts"), _EMBEDDING, _TIED], "rounding": "learned"},
    ),
    "w4a8-gptq": (
        "w4a8 after SmoothQuant with searched strength, weights rounded by GPTQ; needs data",
        {
            "rules": [*_both("i8/tok", "i4/ch", "linear", "experts"), _EMBEDDING, _TIED8],
            "rewrites": ("smooth",),
            "smooth_alpha": "search",
            "rounding": "gptq",
        },
    ),
    "w4a8-rotate": (
        "w4a8 with rotated channels (QuaRot), so that none is an outlier, and GPTQ; 8-bit lm_head; needs data",
        {
            "rules": [*_both("i8/tok", "i4/ch", "linear", "experts"), _EMBEDDING, _HEAD],
            **_ROTATED,
            "gptq": {"asymmetric": True},
        },
    ),
    "w4a4-rotate": (
        "4-bit weights and activations, rotated channels (QuaRot), GPTQ; 8-bit embeddings and lm_head; needs data",
        {
            "rules": [*_both("u4/tok", "i4/ch", "linear", "experts"), _EMBEDDING, _HEAD],
            **_ROTATED,
            "clip_inputs": True,
        },
    ),
    "nf4": (
        "4-bit normal-float weights in groups of 64 (8-bit embeddings), float activations",
        {"rules": [*_grouped("nf4/g64/f16", "linear", "experts"), _EMBEDDING, _TIED8]},
    ),
    "nf4-mse": (
        "nf4 with scales of the least error, by the energy of each input channel; a few samples of data are enough",
        {"rules": [*_grouped("nf4/g64/f16", "linear", "experts"), _EMBEDDING, _TIED8], **_ENERGY},
    ),
    "nf4-gptq": (
        "nf4 with weights rounded layer by layer by what each reads (GPTQ); needs data",
        {
            "rules": [*_grouped("nf4/g64/f16", "linear", "experts"), _EMBEDDING, _TIED8],
            "rounding": "gptq",
        },
    ),
    "fp8": (
        "8-bit float weights per channel and activations per token (8-bit embeddings)",
        {
            "rules": [
                *_both("f8e4m3/tok", "f8e4m3/ch", "linear", "experts"),
                _EMBEDDING,
                {"target": "tied", "w": "f8e4m3/ch"},
            ]
        },
    ),
    "mxfp4": (
        "OCP MXFP4 weights: 4-bit floats, groups of 32 with power-of-two scales (8-bit embeddings), float activations",
        {"rules": [*_weights("f4e2m1/g32/e8m0", "linear", "experts"), _EMBEDDING, _TIED8]},
    ),
    "nvfp4": (
        "NVFP4 weights: 4-bit floats, groups of 16 with 8-bit float scales (8-bit embeddings), float activations",
        {"rules": [*_weights("f4e2m1/g16/e4m3", "linear", "experts"), _EMBEDDING, _TIED8]},
    ),
    "mixed": (
        "by layer type, told by common names: MLP weights 4-bit in groups of 128, other linears w8a8, embeddings float",
        {
            "rules": [
                *_both("i8/tok", "i8/ch", "linear"),
                {"target": _MLP, "x": "none", "w": "i4/g128/f16", "fit_groups": True},
                {"target": _ATTENTION, "x": "i8/tok", "w": "i8/ch"},
                {"target": "embedding", "w": "none"},
                {"target": "experts", "x": "none", "w": "i4/g128/f16", "fit_groups": True},
                {"target": "conv", "x": "none", "w": "none"},
            ]
        },
    ),
    "heads": (
        "weights of 2 to 8 bits, each head and layer as it needs, under a budget such as avg_bits=3; needs data",
        {
            **_CHOSEN,
            "allocation": AllocationOptions(),
        },
    ),
    "heads-nf4": (
        "heads with 4-bit normal floats among the formats: nearer at 4 to 5 bits, slow in ONNX files; needs data",
        {**_CHOSEN, "allocation": AllocationOptions(formats=(*CANDIDATES, *_NF4))},
    ),
    "heads-top30": (
        "4-bit weights, the 30 % of attention heads whose quantization costs most in 8 bits; needs data",
        {**_CHOSEN, "lift": LiftOptions(heads=0.3)},
    ),
    "w4a16-edges": (
        "4-bit weights, those of the first and the last layer in 8 bits; needs data",
        {**_CHOSEN, "lift": LiftOptions(edges=1)},
    ),
    "w4a16-lift": (
        "4-bit weights; where perplexity rises by over 10 %, the layers that cost most in 8 bits; needs data",
        {**_CHOSEN, "lift": LiftOptions(max_loss=10.0)},
    ),
    "kv8": (
        "cache of keys and values in 8 bits per token, weights as they are; needs no data, combines: w4a16+kv8",
        {"rules": [{"target": "cache", "k": "i8", "v": "i8"}]},
    ),
    "kv4": (
        "cache in 4 bits: keys per channel in groups of 32 tokens, values per token (KIVI); combines",
        {"rules": [{"target": "cache", "k": "i4", "v": "i4"}]},
    ),
    "kv-k4v2": (
        "cache with 4-bit keys and 2-bit values, as in kv4; combines",
        {"rules": [{"target": "cache", "k": "i4", "v": "i2"}]},
    ),
    "kv-heads": (
        "cache of 2 to 6 bits, keys and values of each head as they need, 3 on average; needs data, combines",
        {"rules": [{"target": "cache", "k": "i3", "v": "i3"}], "cache_bits": 3.0},
    ),
}


@lru_cache(maxsize=1)
def _built() -> dict[str, Recipe]:
    built = {}
    for name, (_, fields) in _PRESETS.items():
        rules = tuple(Rule(**rule) for rule in fields["rules"])
        built[name] = Recipe(**{**fields, "name": name, "rules": rules})
    return built


def presets() -> dict[str, Recipe]:
    """Every preset by name, in a new dictionary."""
    return dict(_built())


def descriptions() -> dict[str, str]:
    """One line about each preset, by name."""
    return {name: line for name, (line, _) in _PRESETS.items()}
