from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qfx.annotation import ALL_ROLES, ROLES, Columns
from qfx.format import Format
from qfx.presets import presets
from qfx.recipe import KINDS, REWRITES, Recipe, Rule
from qfx.recipe_source import combined
from qfx.rounding.method_options import GptqOptions, LiftOptions

TEXTS = st.sampled_from(["i8/tok", "i4/g128", "u8", "nf4/g64", "f32", "none", "i8/dyn"])
TARGETS = st.sampled_from(["linear", "conv", "attention", "*.q_proj", "enc.0.*", "re:.*fc[12]$", "lm_head", "ünï*"])


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    target = draw(TARGETS)
    roles = ROLES.get(target, ALL_ROLES)
    formats: dict[str, Any] = draw(st.dictionaries(st.sampled_from(roles), TEXTS, min_size=1))
    return Rule(target=target, **formats)


RECIPES = st.builds(
    Recipe,
    name=st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable()),
    rules=st.lists(rules(), max_size=6).map(tuple),
    ignore=st.lists(TARGETS, max_size=2).map(tuple),
    rewrites=st.lists(st.sampled_from([r for r in REWRITES if r not in ("awq", "up-down")]), unique=True).map(tuple),
    smooth_alpha=st.one_of(st.just("search"), st.floats(0, 1)),
    rounding=st.sampled_from(["rtn", "mse", "gptq", "learned"]),
    observer=st.sampled_from(["absmax", "minmax", "ema", "percentile", "mse", "entropy"]),
    percentile=st.floats(50, 100, exclude_min=True),
    num_calibration_samples=st.integers(1, 10**6),
)


def texts(recipe: Recipe, kind: str, fqn: str, *, tied: bool = False) -> dict[str, str]:
    return {role: str(fmt) for role, fmt in recipe.formats_for(kind, fqn, tied=tied).items()}


def make(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(name="t", rules=rules, **fields)


def test_later_rule_wins_role_by_role() -> None:
    recipe = make(
        Rule(target="linear", x="i8/tok", w="i8/ch"),
        Rule(target="*.fc2", w="i4/g128"),
        Rule(target="re:.*layers\\.0\\.", x="none"),
    )
    assert texts(recipe, "linear", "layers.1.fc1") == {"x": "i8/tok", "w": "i8/ch"}
    assert texts(recipe, "linear", "layers.1.fc2") == {"x": "i8/tok", "w": "i4/g128"}
    assert texts(recipe, "linear", "layers.0.fc2") == {"w": "i4/g128"}
    assert texts(recipe, "embedding", "layers.1.fc2") == {"w": "i4/g128"}
    assert texts(recipe, "embedding", "tok") == {}


def test_order_matters() -> None:
    general, special = Rule(target="linear", w="i8/ch"), Rule(target="head", w="none")
    assert texts(make(general, special), "linear", "head") == {}
    assert texts(make(special, general), "linear", "head") == {"w": "i8/ch"}


def test_globs_and_regexes_match_whole_names() -> None:
    assert Rule(target="encoder.layer.0.*", w="i8").matches("linear", "encoder.layer.0.attention.self.query")
    assert not Rule(target="encoder.layer.0.*", w="i8").matches("linear", "encoder.layer.01")
    assert not Rule(target="q_proj", w="i8").matches("linear", "layers.0.q_proj")
    assert not Rule(target="*.Q_proj", w="i8").matches("linear", "layers.0.q_proj")
    assert Rule(target="re:layers", w="i8").matches("linear", "layers.0")
    assert not Rule(target="re:0", w="i8").matches("linear", "layers.0")


def test_a_kind_is_no_name() -> None:
    assert not Rule(target="linear", w="i8").matches("conv", "linear")


def test_ignore_wins_over_every_rule() -> None:
    recipe = make(
        Rule(target="linear", w="i8"), Rule(target="lm_head", w="i4"), ignore=("lm_head", "re:.*gate$", "conv")
    )
    assert texts(recipe, "linear", "lm_head") == {}
    assert texts(recipe, "linear", "mlp.gate") == {}
    assert texts(recipe, "linear", "mlp.up") == {"w": "i8"}


def test_unmatched_targets_are_told() -> None:
    recipe = make(
        Rule(target="*.q_porj", w="i8"), Rule(target="*.k_proj", w="i8"), Rule(target="conv", w="i8"), ignore=("x",)
    )
    assert recipe.unmatched([("linear", "a.q_proj"), ("linear", "a.k_proj")]) == ["*.q_porj", "x"]


def _rule(target: str) -> Rule:
    formats: dict[str, Any] = {ROLES.get(target, ("w",))[0]: "i8"}
    return Rule(target=target, **formats)


@given(RECIPES, st.sampled_from(KINDS), st.sampled_from(["a.q_proj", "enc.0.fc1", "lm_head"]), st.booleans())
def test_resolution_is_a_fold_over_the_rules(recipe: Recipe, kind: str, fqn: str, tied: bool) -> None:
    expected: dict[str, Any] = {}
    for rule in recipe.rules:
        if rule.matches(kind, fqn, tied=tied):
            expected |= rule.texts
    if any(_rule(t).matches(kind, fqn, tied=tied) for t in recipe.ignore):
        expected = {}
    expected = {role: text for role, text in expected.items() if role in ROLES[kind] and text != "none"}
    assert texts(recipe, kind, fqn, tied=tied) == expected


def test_tied_is_for_both_readers_of_a_table_and_for_no_other() -> None:
    rules = (Rule(target="linear", x="i8/tok", w="i8/ch"), Rule(target="embedding", w="i8/ch"))
    recipe = make(*rules, Rule(target="tied", w="u4/g128"))
    assert texts(recipe, "linear", "tied") == {"x": "i8/tok", "w": "i8/ch"}
    assert texts(recipe, "linear", "lm_head", tied=True) == {"x": "i8/tok", "w": "u4/g128"}
    assert texts(recipe, "embedding", "wte") == {"w": "i8/ch"}
    assert texts(recipe, "embedding", "wte", tied=True) == {"w": "u4/g128"}
    assert texts(make(*rules, ignore=("tied",)), "embedding", "wte", tied=True) == {}
    with pytest.raises(ValueError, match="'tied' has no role 'x', only w"):
        Rule(target="tied", x="i8")
    assert recipe.unmatched([("linear", "a")]) == []


@given(RECIPES)
def test_round_trips(recipe: Recipe) -> None:
    assert Recipe.parse(recipe.to_dict()) == recipe
    assert Recipe.parse(json.loads(recipe.to_json())) == recipe
    assert hash(Recipe.parse(recipe.to_dict())) == hash(recipe)


@given(RECIPES)
def test_round_trips_through_files(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    for suffix, text in ((".yaml", recipe.to_yaml()), (".yml", recipe.to_yaml()), (".json", recipe.to_json())):
        path = folder / f"r{suffix}"
        path.write_text(text, encoding="utf-8")
        assert Recipe.parse(path) == recipe
        assert Recipe.parse(str(path)) == recipe


def test_hand_written_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - {target: linear, x: i8/tok, w: i8/ch}\n  - {target: lm_head, w: none, x: none}\n")
    recipe = Recipe.parse(path)
    assert recipe.name == "mine"
    assert texts(recipe, "linear", "lm_head") == {}
    assert texts(recipe, "linear", "fc") == {"x": "i8/tok", "w": "i8/ch"}


def test_formats_are_taken_as_objects_too() -> None:
    assert Rule(target="linear", w=Format.parse("i4/g32")).w == "i4/g32"  # type: ignore[arg-type]


def test_groups_that_fit_are_those_of_rules_that_say_so() -> None:
    fitting = Rule(target="linear", x="i8/tok", w="u4/g128/f16", fit_groups=True)
    recipe = make(fitting, Rule(target="fixed", w="u4/g128/f16"), Rule(target="embedding", w="i8/ch"))

    def weight(fqn: str, columns: int | None, kind: str = "linear") -> str:
        return str(recipe.formats_for(kind, fqn, columns=columns)["w"])

    assert weight("fc", 576) == "u4/g64/f16" and weight("fc", 512) == "u4/g128/f16"
    assert weight("fc", None) == "u4/g128/f16", "columns that nobody knows"
    assert weight("fixed", 576) == "u4/g128/f16", "a rule that names the group is obeyed"
    assert str(recipe.formats_for("linear", "fc", columns=576)["x"]) == "i8/tok"
    assert weight("e", 576, "embedding") == "i8/ch"
    assert Recipe.parse(recipe.to_dict()) == recipe
    assert [rule.get("fit_groups") for rule in recipe.to_dict()["rules"]] == [True, None, None]


@pytest.mark.parametrize("fields", [{"x": "i8/tok"}, {"w": "i8/ch"}, {"w": "none"}, {"w": ["i4/g128", "i8/ch"]}])
def test_groups_that_fit_need_one_format_with_groups(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="fit_groups=True is for one w with groups, such as 'u4/g128/f16'"):
        Rule(target="linear", fit_groups=True, **fields)  # type: ignore[arg-type]


def test_combination() -> None:
    both = Recipe.parse("w8a8-smooth + w4a16")
    assert both.name == "w8a8-smooth+w4a16"
    assert both.rules == presets()["w8a8-smooth"].rules + presets()["w4a16"].rules
    assert both.rewrites == ("smooth",)
    assert both.smooth_alpha == "search"
    assert texts(both, "linear", "fc") == {"x": "u8", "w": "u4/g128/f16"}
    assert texts(Recipe.parse("w4a16+w8a8-smooth"), "linear", "fc") == {"x": "u8", "w": "i8/ch"}


def test_combination_of_other_fields() -> None:
    """The last value that is no default wins; a default does not undo what an earlier recipe asked for."""
    recipes = [make(ignore=("a",), percentile=99), make(rounding="mse", percentile=98), make(ignore=("b", "a"))]
    both = combined(recipes)
    assert (both.rounding, both.percentile, both.ignore, both.name) == ("mse", 98, ("a", "b"), "t+t+t")


def test_needs_data() -> None:
    assert make(Rule(target="linear", x="u8", w="i8")).needs_data
    assert make(Rule(target="attention", k="i8/head")).needs_data
    assert make(Rule(target="linear", w="i8"), rewrites=("smooth",)).needs_data
    assert make(Rule(target="linear", w="i8"), rewrites=("awq",)).needs_data
    assert make(Rule(target="linear", w="i8"), rounding="mse", weighting="energy").needs_data
    assert make(Rule(target="linear", x="i8/tok", w="u8"), clip_inputs=True).needs_data
    assert not make(Rule(target="linear", x="i8/tok", w="u8")).needs_data
    assert not make(Rule(target="linear", x="u8/dyn", y="bf16", w="i8"), rewrites=("untie", "norm-fold")).needs_data
    assert not Recipe.parse("w8a8-static+w8a8").needs_data
    assert Recipe.parse("w8a8+w8a8-static").needs_data


def test_a_mapping_changes_the_options_that_it_names() -> None:
    """Of a preset the others stay: `gptq={"sweeps": 0}` would else change the order of columns, without a word."""
    preset = presets()["w2a16-gptq"]
    assert not preset.gptq.act_order and preset.gptq.sweeps == 2
    assert preset.override(gptq={"sweeps": 0}).gptq == GptqOptions(act_order=False, sweeps=0)
    assert preset.override(gptq=GptqOptions(sweeps=5)).gptq == GptqOptions(sweeps=5), "options as a whole are new ones"
    assert preset.override(gptq={}) == preset
    own = presets()["heads-nf4"].override(allocation={"avg_bits": 4.3, "refine": 7}).allocation
    assert own is not None and (own.avg_bits, own.refine) == (4.3, 7)
    assert own.formats == presets()["heads-nf4"].allocation.formats  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="sweep"):
        preset.override(gptq={"sweep": 0})


def test_one_of_several_options_takes_the_place_of_another() -> None:
    bits = presets()["heads"].override(allocation={"avg_bits": 3, "refine": 7})
    bytes_ = bits.override(allocation={"max_bytes": 100}).allocation
    assert bytes_ is not None and bytes_.budgets == {"max_bytes": 100} and bytes_.refine == 7
    edges = presets()["heads-top30"].override(lift={"edges": 2, "samples": 5}).lift
    assert edges == LiftOptions(edges=2, samples=5)
    with pytest.raises(ValueError, match="one budget is needed"):
        bits.override(allocation={"max_bytes": 100, "avg_bits": 3})


def test_a_mapping_for_what_is_not_there_makes_it() -> None:
    assert presets()["w4a16"].override(lift={"edges": 1}).lift == LiftOptions(edges=1)


def test_override() -> None:
    recipe = presets()["w8a8"].override(rounding="mse", ignore=("lm_head",))
    assert (recipe.rounding, recipe.ignore, recipe.rules) == ("mse", ("lm_head",), presets()["w8a8"].rules)
    assert presets()["w8a8"].rounding == "rtn"
    assert recipe.override(rules=[{"target": "linear", "w": "i4/ch"}]).rules == (Rule(target="linear", w="i4/ch"),)
    assert recipe.override() == recipe
    with pytest.raises(ValueError, match="unknown key 'rouding' in Recipe, did you mean 'rounding'"):
        recipe.override(rouding="mse")
    with pytest.raises(ValueError, match=r"Recipe\.rounding: Input should be 'rtn', .* or 'learned', found 'best'"):
        recipe.override(rounding="best")


def test_frozen() -> None:
    recipe = presets()["w8a8"]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.rounding = "mse"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.rules[0].w = "i4"


def test_rewrites_are_united() -> None:
    assert make(rewrites=("smooth", "untie", "smooth")).rewrites == ("smooth", "untie")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "linear", "ww": "i8"}, "unknown key 'ww' in Rule, did you mean 'w'"),
        ({"target": "linear", "weight": "i8"}, "unknown key 'weight' in Rule"),
        ({"target": "linear", "w": "int8"}, "Rule.w: bad format 'int8': did you mean 'i8'"),
        ({"target": "linear", "w": "i4/g0"}, "bad format 'i4/g0'"),
        ({"target": "linear", "w": 8}, "a format is a text"),
        ({"target": "linear", "w": "None"}, "bad format 'None'"),
        ({"target": "linear", "q": "i8"}, "'linear' has no role 'q', only x, w, y"),
        ({"target": "embedding", "x": "i8"}, "'embedding' has no role 'x', only w"),
        ({"target": "Linear", "w": "i8"}, "op kinds are written in lower case, did you mean 'linear'"),
        ({"target": "re:(", "w": "i8"}, "bad regular expression in target 're:\\('"),
        ({"target": " ", "w": "i8"}, "a target is an op kind"),
        ({"target": "linear"}, "the rule for 'linear' names no format"),
        ({"w": "i8"}, "Rule.target: Field required"),
        ({"target": 3, "w": "i8"}, "Rule.target: Input should be a valid string, found 3"),
    ],
)
def test_bad_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)
    with pytest.raises(ValueError, match=f"rule 2 in the dictionary: .*{message}"):
        Recipe.parse({"rules": [{"target": "linear", "w": "i8"}, fields]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"smoth_alpha": 0.5}, "unknown key 'smoth_alpha' in Recipe, did you mean 'smooth_alpha'"),
        ({"smooth_alpha": 1.5}, 'a number from 0 to 1 or "search" is expected, found 1.5'),
        ({"smooth_alpha": "searching"}, "found 'searching'"),
        ({"smooth_alpha": True}, "found True"),
        ({"smooth_alpha": float("nan")}, "found nan"),
        ({"rewrites": ("smoth",)}, "unknown rewrite 'smoth', did you mean 'smooth'"),
        ({"rewrites": "smooth"}, "Recipe.rewrites: Input should be a valid tuple"),
        ({"rounding": "hqqq"}, "Recipe.rounding: Input should be 'rtn', .* or 'learned', found 'hqqq'"),
        ({"learned": {"steps": -1}}, "LearnedOptions.steps: .* greater than or equal to 0, found -1"),
        ({"learned": {"step": 1}}, "unknown key 'step' in LearnedOptions, did you mean 'steps'"),
        ({"learned": {"batch": 2.0}}, "LearnedOptions.batch: Input should be a valid integer"),
        ({"learned": {"learning_rate": 0}}, "LearnedOptions.learning_rate: Input should be greater than 0"),
        ({"bias_correction": 1}, "Recipe.bias_correction: Input should be a valid boolean"),
        ({"low_rank": -1}, "Recipe.low_rank: .* greater than or equal to 0"),
        ({"rewrites": ("awq", "v-o")}, "awq chooses the factors of v-o itself"),
        ({"weighting": "energy"}, "weighting='energy' is for rounding='mse', found rounding='rtn'"),
        (
            {"weighting": "covariance", "rounding": "hqq"},
            "weighting='covariance' is for rounding='mse', found rounding='hqq'",
        ),
        (
            {"weighting": "hessian", "rounding": "mse"},
            "Recipe.weighting: Input should be 'uniform', 'energy' or 'covariance'",
        ),
        ({"observer": "max"}, "Recipe.observer: Input should be 'absmax'"),
        ({"percentile": 50}, "Recipe.percentile: Input should be greater than 50, found 50"),
        ({"percentile": 100.5}, "Recipe.percentile"),
        ({"percentile": "99"}, "Recipe.percentile"),
        ({"num_calibration_samples": 0}, "Recipe.num_calibration_samples: Input should be greater than or equal to 1"),
        ({"num_calibration_samples": True}, "Recipe.num_calibration_samples"),
        ({"num_calibration_samples": 1.5}, "Recipe.num_calibration_samples"),
        ({"ignore": ("re:[",)}, "bad regular expression"),
        ({"ignore": ("Linear",)}, "lower case"),
        ({"name": ""}, "Recipe.name"),
        ({"rules": 3}, "Recipe.rules: Input should be a valid tuple, found 3"),
        ({"rules": [3]}, "rule 1 in the dictionary is no dictionary"),
        ({"rules": [{3: "x"}]}, "rule 1 in the dictionary is no dictionary"),
        ({3: "x"}, "keys of a recipe are texts, found 3"),
    ],
)
def test_bad_recipes(fields: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse({"name": "t", "rules": [{"target": "linear", "w": "i8"}], **fields})


def test_messages_are_plain() -> None:
    with pytest.raises(ValueError, match="Recipe") as caught:
        Recipe(name="t", rules=(), rounding="x", percentile=1)  # type: ignore[arg-type]
    assert "pydantic" not in str(caught.value)
    assert "validation error" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert caught.type is ValueError


def test_parse_of_a_recipe_is_the_recipe() -> None:
    recipe = presets()["nf4"]
    assert Recipe.parse(recipe) is recipe


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("w8a9", "unknown preset 'w8a9', did you mean 'w8a8'"),
        ("W4A16", "did you mean 'w4a16'"),
        ("w8a8+", "unknown preset ''"),
        ("", "unknown preset ''"),
        ("w8a8+qq", "unknown preset 'qq'"),
        (3, "found int: 3"),
        (None, "found NoneType"),
        (["w8a8"], "found list"),
        ({}, "Recipe.rules: Field required"),
        (Path("recipe.toml"), "a recipe file ends in .yaml, .yml, .json"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(source)


@pytest.mark.parametrize("name", ["w8a9", "qq"])
def test_presets_are_listed_once(name: str) -> None:
    with pytest.raises(ValueError, match="unknown preset") as caught:
        Recipe.parse(name)
    assert re.split(r"[ ,()]+", str(caught.value)).count("w8a8-smooth") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "rules: [", r"a\.yaml cannot be read"),
        ("a.json", '{"rules": [', r"a\.json cannot be read"),
        ("a.yaml", "", r"a\.yaml holds no recipe .* found NoneType"),
        ("a.yaml", "- 1", "found list"),
        ("a.json", "3", "found int"),
        ("a.yaml", "rounding: rtn\nrounding: mse\nrules: []", "key 'rounding' stands twice"),
        ("a.json", '{"rules": [], "rules": []}', "key 'rules' stands twice"),
        ("a.yaml", "rules:\n- {target: linear, w: i8, w: i4}", "key 'w' stands twice"),
        ("a.yaml", "rules:\n- {target: linear, w: int8}", r"rule 1 in .*a\.yaml: Rule.w: bad format"),
        ("a.yaml", "? [a]\n: b", r"a\.yaml cannot be read"),
        ("a.json", "[" * 100_000, r"a\.json cannot be read"),
        ("a.yaml", "rule: []", "unknown key 'rule' in Recipe, did you mean 'rules'"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.parse(tmp_path / name)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_files_of_other_encodings(suffix: str, tmp_path: Path) -> None:
    """A mark that editors put before UTF-8 is no part of the text; what is no UTF-8 is told with the file."""
    file = tmp_path / f"a{suffix}"
    text = '{"rules": [{"target": "linear", "w": "i8/ch"}]}'
    file.write_text(text, encoding="utf-8-sig")
    assert Recipe.parse(file).rules[0].w == "i8/ch"
    file.write_text(text.replace("linear", "*.gr\u00f6\u00dfe"), encoding="latin-1")
    with pytest.raises(ValueError, match=rf"a\{suffix} cannot be read: .*utf-8"):
        Recipe.parse(file)


def test_mistakes_in_fields_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rules: []\nrounding: up")
    with pytest.raises(ValueError, match=r"Recipe\.rounding") as caught:
        Recipe.parse(tmp_path / "a.yaml")
    assert caught.value.__notes__ == [f"in {tmp_path / 'a.yaml'}"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Recipe.parse(str(tmp_path / "none.yaml"))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown op kind 'liner', did you mean 'linear'"):
        presets()["w8a8"].formats_for("liner", "fc")


I4, I8 = Format.parse("i4/g128"), Format.parse("i8/ch")


def test_several_formats_of_a_weight() -> None:
    rules = [
        Rule(target="linear", x="i8/tok", w="i8/ch"),
        Rule(target="*.q", w=["i8/ch", I4, "i4/g128"]),
        Rule(target="*.o", w=["i8/ch", "i4/g128"], along="columns"),
        Rule(target="1.*", w="i4/g128"),
    ]
    recipe = Recipe(name="r", rules=tuple(rules))
    assert recipe.formats_for("linear", "0.q") == {"x": Format.parse("i8/tok"), "w": (I8, I4, I4)}
    assert recipe.formats_for("linear", "0.o")["w"] == Columns((I8, I4))
    assert recipe.formats_for("linear", "1.o")["w"] == recipe.formats_for("linear", "1.q")["w"] == I4
    assert recipe.formats_for("linear", "0.fc")["w"] == I8
    assert not recipe.needs_data


@given(
    st.lists(st.sampled_from(["i8/ch", "i4/g128", "u4/g32", "f32"]), min_size=1, max_size=5),
    st.sampled_from(["rows", "columns"]),
)
def test_several_formats_come_back_from_texts(formats: list[str], along: Any) -> None:
    recipe = Recipe(name="r", rules=(Rule(target="*.q", x="i8/tok", w=formats, along=along),))
    assert Recipe.parse(json.loads(recipe.to_json())) == recipe
    assert recipe.to_dict()["rules"][0] == {"target": "*.q", "x": "i8/tok", "w": formats} | (
        {"along": along} if along == "columns" else {}
    )


def test_several_formats_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "heads.yaml"
    file.write_text("rules:\n- {target: '*.o', w: [i8/ch, i4/g128], along: columns}\n", encoding="utf-8")
    recipe = Recipe.parse(file)
    assert recipe.formats_for("linear", "a.o") == {"w": Columns((I8, I4))}
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.parse(file) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"w": []}, "a list of formats is empty"),
        ({"w": ["i8/ch", "int4"]}, "did you mean 'i4'"),
        ({"w": ["i8/ch", "none"]}, "bad format 'none'"),
        ({"w": ["i8/ch", None]}, "a format is a text"),
        ({"w": ["i8/ch", ["i4/ch"]]}, "a format is a text"),
        ({"w": "i8/ch", "along": "columns"}, "along='columns' says how a list of formats cuts w, found w='i8/ch'"),
        ({"x": "i8/tok", "along": "columns"}, "found w=None"),
        ({"w": ["i8/ch"], "along": "heads"}, "'rows' or 'columns'"),
        ({"x": ["i8/tok"]}, "a format is a text"),
        ({"w": ["i8/ch"], "target": "embedding"}, "only the weight of a linear .* not that of 'embedding'"),
        ({"w": ["i8/ch"], "target": "experts", "along": "columns"}, "not that of 'experts'"),
    ],
)
def test_bad_lists_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**{"target": "linear", **fields})
