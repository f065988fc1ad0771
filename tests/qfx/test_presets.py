from __future__ import annotations

import pytest

from qfx.presets import descriptions, presets
from qfx.recipe import Recipe

FIXED = {  # the names that are promised
    *(
        "w8a8",
        "w8a8-rotate",
        "w8a8-static",
        "w8a8-smooth",
        "w8a16",
        "w4a16",
        "w4a16-hqq",
        "w4a16-mse",
        "w4a16-awq",
        "w4a16-gptq",
        "w3a16-gptq",
    ),
    *(
        "w2a16",
        "w2a16-gptq",
        "w4a8",
        "w4a8-gptq",
        "w4a16-learned",
        "w2a16-learned",
        "w4a8-rotate",
        "w4a4-rotate",
        "nf4",
        "nf4-mse",
        "nf4-gptq",
        "fp8",
        "mxfp4",
        "nvfp4",
        "int8-outliers",
        "mixed",
        "heads",
        "heads-nf4",
        "heads-top30",
        "w4a16-edges",
        "w4a16-lift",
    ),
    *("kv8", "kv4", "kv-k4v2", "kv-heads"),
}
NAMES = sorted(presets())


def linear(recipe: Recipe, fqn: str = "fc") -> str:
    return " ".join(f"{role}={fmt}" for role, fmt in recipe.formats_for("linear", fqn).items())


def test_every_promised_name_is_a_preset() -> None:
    assert set(presets()) == FIXED


def test_each_has_one_line() -> None:
    lines = descriptions()
    assert list(lines) == list(presets())
    assert all(line and "\n" not in line and len(line) <= 120 for line in lines.values())
    assert len(set(lines.values())) == len(lines)


@pytest.mark.parametrize("name", NAMES)
def test_parse_by_name(name: str) -> None:
    recipe = Recipe.parse(name)
    assert recipe == presets()[name]
    assert recipe.name == name


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("w8a8", "x=i8/tok w=i8/ch"),
        ("w8a8-static", "x=u8 w=i8/ch"),
        ("w8a8-smooth", "x=u8 w=i8/ch"),
        ("int8-outliers", "x=i8/tok w=i8/ch"),
        ("w8a16", "w=i8/ch"),
        ("w4a16", "w=u4/g128/f16"),
        ("w4a16-hqq", "w=u4/g128/f16"),
        ("w4a16-mse", "w=u4/g128/f16"),
        ("w4a16-awq", "w=u4/g128/f16"),
        ("w2a16", "w=u2/g64/f16"),
        ("w4a8", "x=i8/tok w=i4/ch"),
        ("w4a16-gptq", "w=u4/g128/f16"),
        ("w3a16-gptq", "w=u3/g128/f16"),
        ("w2a16-gptq", "w=u2/g64/f16"),
        ("w4a16-learned", "w=u4/g128/f16"),
        ("w2a16-learned", "w=u2/g64/f16"),
        ("w4a8-gptq", "x=i8/tok w=i4/ch"),
        ("nf4", "w=nf4/g64/f16"),
        ("nf4-mse", "w=nf4/g64/f16"),
        ("nf4-gptq", "w=nf4/g64/f16"),
        ("fp8", "x=f8e4m3/tok w=f8e4m3/ch"),
        ("mxfp4", "w=f4e2m1/g32/e8m0"),
        ("nvfp4", "w=f4e2m1/g16/e4m3"),
    ],
)
def test_formats_of_linears(name: str, formats: str) -> None:
    assert linear(presets()[name]) == formats


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("mixed", "heads") and not name.startswith("kv")]
)
def test_embeddings_are_8_bit(name: str) -> None:
    assert {r: str(f) for r, f in presets()[name].formats_for("embedding", "e").items()} == {"w": "i8/ch"}


@pytest.mark.parametrize(
    "name",
    [
        "w4a16",
        "w2a16",
        "w4a16-hqq",
        "w4a16-mse",
        "w4a16-awq",
        "w4a16-gptq",
        "w3a16-gptq",
        "w2a16-gptq",
        "w2a16-learned",
    ],
)
def test_tied_tables_are_4_bit(name: str) -> None:
    for kind in ("embedding", "linear"):
        tied = presets()[name].formats_for(kind, "e", tied=True)
        assert {r: str(f) for r, f in tied.items()} == {"w": "u4/g32/f16"}


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("fp8", "x=f8e4m3/tok w=f8e4m3/ch"),
        *((name, "x=i8/tok w=i8/ch") for name in ("w8a8", "w4a8", "w4a8-gptq")),
        *((name, "w=i8/ch") for name in ("nf4", "nf4-mse", "nf4-gptq", "mxfp4", "nvfp4")),
    ],
)
def test_tied_tables_have_one_format(name: str, formats: str) -> None:
    recipe = presets()[name]
    (table,) = recipe.formats_for("embedding", "e", tied=True).values()
    linear = recipe.formats_for("linear", "lm_head", tied=True)
    assert " ".join(f"{role}={fmt}" for role, fmt in linear.items()) == formats
    assert linear["w"] == table, "stored once"


def test_two_bits_are_rounded_with_care_and_no_promise() -> None:
    assert presets()["w2a16"].rounding == "mse"
    assert presets()["w2a16-gptq"].gptq.clip and not presets()["w2a16-gptq"].gptq.act_order
    assert not presets()["w2a16"].needs_data
    assert "large" in descriptions()["w2a16"]


def test_data_is_needed_by_static_formats_and_by_methods_that_look_at_it() -> None:
    static = {"w8a8-static", "w8a8-smooth"}
    rounded = {name for name, recipe in presets().items() if recipe.rounding in ("gptq", "learned")}
    looking = {"w4a16-mse", "nf4-mse", "w4a16-awq", "int8-outliers"}
    choosing = {"heads", "heads-nf4", "heads-top30", "w4a16-edges", "w4a16-lift", "kv-heads"}
    assert {name for name, recipe in presets().items() if recipe.needs_data} == static | rounded | looking | choosing
    assert rounded == {
        *("w4a16-gptq", "nf4-gptq", "w3a16-gptq", "w2a16-gptq", "w4a8-gptq", "w4a8-rotate", "w4a4-rotate"),
        *("w4a16-learned", "w2a16-learned"),
        *("heads", "heads-nf4", "heads-top30", "w4a16-edges", "w4a16-lift"),
    }


def test_normal_floats_are_more_formats_to_choose_from() -> None:
    more, heads = presets()["heads-nf4"], presets()["heads"]
    assert more.allocation is not None and heads.allocation is not None
    given = more.allocation.formats
    assert given[: len(heads.allocation.formats)] == heads.allocation.formats
    assert given[len(heads.allocation.formats) :] == ("nf4/g16/f16", "nf4/g32/f16", "nf4/g64/f16")
    assert more.override(name="heads", allocation=heads.allocation) == heads


def test_methods_of_four_bits() -> None:
    assert presets()["w4a16-hqq"].rounding == "hqq"
    awq = presets()["w4a16-awq"]
    assert (awq.rewrites, awq.rounding, awq.weighting) == (("awq",), "mse", "covariance")
    for name in ("w4a16-mse", "nf4-mse"):
        found = presets()[name]
        assert (found.rounding, found.weighting, found.num_calibration_samples) == ("mse", "energy", 16)


def test_smooth() -> None:
    assert presets()["w8a8-smooth"].rewrites == ("smooth",)
    assert presets()["w8a8-smooth"].smooth_alpha == "search"


@pytest.mark.parametrize(
    "fqn",
    [
        *("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.down_proj", "transformer.h.0.mlp.c_fc", "h.0.mlp.c_proj"),
        *("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense", "decoder.layers.1.fc2"),
        *("block.0.layer.1.DenseReluDense.wi_0", "transformer.layer.0.ffn.lin1", "fc1"),
    ],
)
def test_mixed_mlp(fqn: str) -> None:
    assert linear(presets()["mixed"], fqn) == "w=i4/g128/f16"


@pytest.mark.parametrize(
    "fqn",
    [
        *("model.layers.3.self_attn.q_proj", "encoder.layer.0.attention.self.query", "lm_head", "classifier"),
        *("encoder.layer.0.attention.output.dense", "h.0.attn.c_attn", "h.0.attn.c_proj", "layers.0.attention.wo"),
        *("block.0.layer.0.SelfAttention.q", "decoder.layers.1.encoder_attn.out_proj", "pooler.dense"),
    ],
)
def test_mixed_attention_and_the_rest(fqn: str) -> None:
    assert linear(presets()["mixed"], fqn) == "x=i8/tok w=i8/ch"


def test_mixed_leaves_embeddings() -> None:
    assert presets()["mixed"].formats_for("embedding", "model.embed_tokens") == {}


def test_presets_cannot_be_changed_by_the_caller() -> None:
    presets().clear()
    assert presets()


def test_eight_bits_are_rotated_without_data() -> None:
    plain, recipe = presets()["w8a8"], presets()["w8a8-rotate"]
    assert recipe.rules == plain.rules and not recipe.needs_data
    assert recipe.rewrites == presets()["w4a8-rotate"].rewrites


@pytest.mark.parametrize(("name", "x"), [("w4a8-rotate", "i8/tok"), ("w4a4-rotate", "u4/tok")])
def test_rotated_presets(name: str, x: str) -> None:
    recipe = presets()[name]
    assert linear(recipe) == f"x={x} w=i4/ch" and linear(recipe, "model.lm_head") == "x=i8/tok w=i8/ch"
    assert recipe.rewrites == ("rotate", "rotate-down") and recipe.needs_data
    assert recipe.rounding == "gptq" and recipe.gptq.clip
