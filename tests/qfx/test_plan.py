from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qfx.annotation import ALL_ROLES
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.plan import Plan, signature, versions
from qfx.presets import presets
from qfx.recipe import Recipe

W8A8 = presets()["w8a8"]


def small() -> Any:  # nn.Sequential, whose items have no precise types
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def full_plan() -> Plan:
    plan = Plan.of(small(), W8A8)
    plan.annotations["0"] = {"x": "i8/tok", "w": "i4/g128"}
    plan.annotations["attn"] = {"k": ["i8", "i4"], "v": "i8/head"}
    plan.annotations["o"] = {"w": {"columns": ["i8/ch", "i4/g128"]}}
    plan.rewrites.append({"name": "smooth", "norm": "1", "linears": ["2"], "factor": "2/smooth", "alpha": 0.5})
    plan.tensors["2/smooth"] = torch.tensor([1.0, 2.0, 0.5, float("nan")])
    plan.tensors["0/x_scale"] = torch.tensor(0.1)
    plan.tensors["0/x_zero"] = torch.tensor(7, dtype=torch.uint8)
    plan.sensitivities["0"] = {"i8/ch": 0.25, "i4/g128": float("inf")}
    plan.notes.append("0: in_features is no multiple of 128")
    return plan


def test_save_and_load(tmp_path: Path) -> None:
    plan = full_plan()
    plan.save(tmp_path / "new" / "plan")
    assert sorted(p.name for p in (tmp_path / "new" / "plan").iterdir()) == ["plan.json", "plan.safetensors"]
    for path in (tmp_path / "new" / "plan", tmp_path / "new" / "plan" / "plan.json", str(tmp_path / "new" / "plan")):
        loaded = Plan.load(path)
        assert loaded == plan
        assert loaded.recipe == W8A8
        assert loaded.tensors["0/x_zero"].dtype == torch.uint8


def test_save_over_an_older_plan_leaves_other_files(tmp_path: Path) -> None:
    Plan(W8A8, tensors={"a": torch.ones(3)}).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    full_plan().save(tmp_path)
    assert Plan.load(tmp_path) == full_plan()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_empty_plan(tmp_path: Path) -> None:
    Plan(W8A8).save(tmp_path)
    assert Plan.load(tmp_path) == Plan(W8A8)
    assert Plan.load(tmp_path).tensors == {}


FORMATS = st.sampled_from(["i8/tok", "i4/g128", "nf4/g64", "f32"])
ANNOTATIONS = st.dictionaries(
    st.text(max_size=8),
    st.dictionaries(st.sampled_from(ALL_ROLES), st.one_of(FORMATS, st.lists(FORMATS, min_size=1, max_size=3))),
    max_size=3,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(ANNOTATIONS, st.dictionaries(st.text(max_size=5), JSON, max_size=3), st.lists(st.text(max_size=8), max_size=2))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, annotations: Any, sensitivities: dict[str, Any], notes: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    rewrites = [{"name": "smooth", "extra": sensitivities}]
    plan = Plan(W8A8, annotations=annotations, sensitivities=sensitivities, notes=notes, rewrites=rewrites)
    plan.save(folder)
    assert Plan.load(folder) == plan


def test_formats_of_a_name() -> None:
    plan = full_plan()
    assert plan.formats("0") == {"x": Format.parse("i8/tok"), "w": Format.parse("i4/g128")}
    assert plan.formats("attn")["k"] == (Format.parse("i8"), Format.parse("i4"))
    assert plan.formats("nowhere") == {}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"notes": ["x"]}, r"notes: \['0: in"),
        ({"recipe": presets()["nf4"]}, r"recipe\['name'\]: w8a8 against nf4"),
        ({"annotations": {}}, r"annotations\['0'\]: \{.*\} against nothing"),
        ({"fingerprint": ""}, "fingerprint: "),
        ({"tensors": {}}, r"tensors\['2/smooth'\]: f32\[4\] against nothing"),
        ({"rewrites": []}, "rewrites: "),
        ({"versions": {}}, r"versions\['torch'\]"),
        ({"sensitivities": {"0": {}}}, r"sensitivities\['0'\]"),
    ],
)
def test_equality_sees_every_field(change: dict[str, Any], line: str) -> None:
    plan, other = full_plan(), dataclasses.replace(full_plan(), **change)
    assert plan == full_plan()
    assert plan.diff(full_plan()) == []
    assert plan != other
    assert any(re.match(line, found) for found in plan.diff(other))


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0, 2.0])])
def test_equality_sees_tensors(tensor: torch.Tensor) -> None:
    assert Plan(W8A8, tensors={"a": torch.ones(3)}) != Plan(W8A8, tensors={"a": tensor})
    assert Plan(W8A8, tensors={"a": tensor}) == Plan(W8A8, tensors={"a": tensor.clone()})


def test_equality_sees_shape_and_type_of_equal_bytes() -> None:
    plans = [
        Plan(W8A8, tensors={"a": t}) for t in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32))
    ]
    assert [a == b for a in plans for b in plans] == [True, False, False, False, True, False, False, False, True]


def test_a_plan_is_no_key_and_equals_no_other_thing() -> None:
    assert Plan(W8A8) != "plan"
    with pytest.raises(TypeError, match="unhashable"):
        hash(Plan(W8A8))


def test_default_fields_are_not_shared() -> None:
    Plan(W8A8).notes.append("x")
    assert Plan(W8A8).notes == []


def test_repr_is_short() -> None:
    text = repr(full_plan())
    assert text.startswith("Plan(recipe='w8a8', model='")
    assert "annotations=3, caches=0, rewrites=smooth, tensors=3 (0.00 MiB), notes=1)" in text
    assert "model='any'" in repr(Plan(W8A8))


def test_versions() -> None:
    assert versions()["torch"] == torch.__version__
    assert Plan(W8A8).versions == versions()


# the model's fingerprint


def fingerprint(model: nn.Module) -> str:
    return Plan.of(model, W8A8).fingerprint


def test_fingerprint_is_of_the_content() -> None:
    assert fingerprint(small()) == fingerprint(small())
    assert len(fingerprint(small())) == 64
    assert list(signature(small())) == sorted(signature(small()))
    assert signature(small())["0.weight"].startswith("f32[4,3] ")


@torch.no_grad()
def test_fingerprint_sees_one_bit_anywhere() -> None:
    seen = {fingerprint(small())}
    for name in signature(small()):
        model = small()
        tensor = model.state_dict()[name].reshape(-1)
        tensor[-1] = tensor[-1] + 1 if not tensor.is_floating_point() else tensor[-1].nextafter(torch.tensor(9.0))
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(signature(small()))


def test_fingerprint_sees_names_shapes_and_types() -> None:
    models = [small(), small().double(), nn.Sequential(*small()[:2]), nn.Sequential(nn.Identity(), *small())]
    reshaped = small()
    reshaped[0].weight = nn.Parameter(reshaped[0].weight.detach().reshape(3, 4))
    retyped = small()
    retyped[1].num_batches_tracked = torch.zeros((), dtype=torch.float64)  # the same eight bytes
    assert len({fingerprint(model) for model in [*models, reshaped, retyped]}) == 6


def test_fingerprint_follows_values_not_strides() -> None:
    model = small()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    assert fingerprint(model) == fingerprint(small())


def test_fingerprint_of_one_element_with_a_stride() -> None:
    models = [small(), small()]
    for model, value in zip(models, (torch.ones(1, 4)[:, 0], torch.ones(1)), strict=True):
        model.register_buffer("one", value)
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_fingerprint_of_ties_buffers_and_odd_types() -> None:
    model = small()
    model.tied = nn.Linear(3, 4)
    model.tied.weight = model[0].weight
    model.register_buffer("cache", torch.ones(2), persistent=False)
    model.register_buffer("none", None)
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("bf16", torch.ones(3, dtype=torch.bfloat16))
    model.register_buffer("f8", torch.ones(3).to(torch.float8_e4m3fn))
    model.again = model[0]
    model.register_buffer("sliced", torch.arange(6.0)[::2])
    found = signature(model)
    assert found.keys() == model.state_dict().keys()
    assert found["again.weight"] == found["0.weight"]
    assert found["tied.weight"] == found["0.weight"]


def test_fingerprint_needs_content() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'bias' is on the meta device"):
        signature(model)


def test_check_accepts_the_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Plan.of(small(), W8A8).check(small()) == []
        assert Plan.of(small(), W8A8).check(small(), strict=True) == []
        assert Plan(W8A8).check(small(), strict=True) == []


def other_content() -> Any:
    model = small()
    model[0].weight.data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (other_content(), "0.weight has other content"),
        (nn.Sequential(nn.Linear(3, 5)), r"0.bias was f32\[4\], is f32\[5\]"),
        (nn.Sequential(*small(), nn.Linear(2, 2)), "3.bias is new, 3.weight is new"),
        (nn.Sequential(small()[0]), "1.bias is missing, .* and 1 more"),
        (small().half(), r"0.bias was f32\[4\], is f16\[4\]"),
    ],
)
def test_check_tells_what_differs(model: nn.Module, message: str) -> None:
    plan = Plan.of(small(), W8A8)
    with pytest.raises(ValueError, match=message) as caught:
        plan.check(model, strict=True)
    assert "next step" in str(caught.value)
    with pytest.warns(QfxWarning, match=message):
        assert plan.check(model)


def test_check_of_an_altered_signature() -> None:
    plan = Plan.of(small(), W8A8)
    plan.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="fingerprint in the plan is not that of its signature"):
        plan.check(small(), strict=True)


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewrites": [{"name": "smooth", "factor": torch.ones(2)}]},
            r"rewrites\[0\]\['factor'\].*Tensor; tensors belong",
        ),
        (
            {"rewrites": [{"linears": {"a"}}]},
            r"rewrites\[0\]\['linears'\] of a plan .* JSON, found set",
        ),
        ({"sensitivities": {3: 0.5}}, "keys in sensitivities of a plan are texts, found 3"),
        ({"annotations": {"a": {"z": "i8"}}}, "unknown role 'z' of 'a' in the plan"),
        ({"annotations": {"a": {"x": "int8"}}}, "role 'x' of 'a' in the plan: bad format 'int8': did you mean 'i8'"),
        ({"annotations": {"a": {"x": None}}}, "role 'x' of 'a' in the plan"),
        ({"annotations": {"a": {"x": Format.parse("i8")}}}, "role 'x' of 'a' in the plan"),
        ({"annotations": {"a": "i8"}}, "annotation of 'a' in the plan is no dictionary"),
    ],
)
def test_save_refuses_what_it_cannot_give_back(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    full_plan().save(tmp_path)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(full_plan(), **change).save(tmp_path)
    assert Plan.load(tmp_path) == full_plan()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(full_plan(), **change).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_load_of_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "plan.json"):
        with pytest.raises(FileNotFoundError, match="no plan here"):
            Plan.load(path)
    full_plan().save(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such safetensors file.*plan\.safetensors"):
        Plan.load(tmp_path)


def test_load_of_truncated_files(tmp_path: Path) -> None:
    full_plan().save(tmp_path)
    for name, message in (("plan.json", "truncated or no JSON"), ("plan.safetensors", "altered or is truncated")):
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 2):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=message):
                Plan.load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert Plan.load(tmp_path) == full_plan()


def test_load_finds_one_flipped_bit(tmp_path: Path) -> None:
    full_plan().save(tmp_path)
    whole = (tmp_path / "plan.safetensors").read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "plan.safetensors").write_bytes(flipped)
        with pytest.raises(ValueError, match="altered or is truncated"):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 5}, "has version 5, this qfx reads versions up to 4"),
        ({"version": None}, "has version None"),
        ({"format": "other"}, "is not a plan of qfx"),
        ({"anotations": {}}, "unknown key 'anotations' in .*, did you mean 'annotations'"),
        ({"annotations": []}, "'annotations' in .*: expected a dict, found list"),
        ({"notes": None}, "'notes' in .*: expected a list, found NoneType"),
        ({"fingerprint": 3}, "'fingerprint' in .*: expected a str, found int"),
        ({"annotations": {"a": {"w": "int4"}}}, "role 'w' of 'a' in .*did you mean 'i4'"),
        ({"recipe": {"name": "t", "ruls": []}}, "recipe in .* cannot be read: unknown key 'ruls'"),
        ({"layouts": {"0": ["linear"]}}, r"'layouts' in .*: expected a str in each place, found \['linear'\]"),
        ({"signature": {"0.weight": 1}}, "'signature' in .*: expected a str in each place, found 1"),
        ({"rewrites": [["smooth"]]}, r"'rewrites' in .*: expected a dict in each place, found \['smooth'\]"),
        ({"caches": {"a": None}}, "'caches' in .*: expected a dict in each place, found None"),
        ({"tensor_sha256": "0" * 64}, "altered or is truncated"),
    ],
)
def test_load_of_altered_json(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    full_plan().save(tmp_path)
    fields = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path)


def test_version_1_is_read(tmp_path: Path) -> None:
    """Its zero points have a byte each, which `qfx.rounding.rounded` packs."""
    full_plan().save(tmp_path)
    fields = json.loads((tmp_path / "plan.json").read_text())
    assert fields["version"] == 4
    (tmp_path / "plan.json").write_text(json.dumps({**fields, "version": 1}))
    assert Plan.load(tmp_path) == full_plan()


def test_load_of_json_that_lacks_a_key(tmp_path: Path) -> None:
    full_plan().save(tmp_path)
    fields = json.loads((tmp_path / "plan.json").read_text())
    for key in fields:
        (tmp_path / "plan.json").write_text(json.dumps({k: v for k, v in fields.items() if k != key}))
        with pytest.raises(ValueError, match=key if key != "format" else "is not a plan"):
            Plan.load(tmp_path)


def test_load_of_another_json(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no JSON object"):
        Plan.load(tmp_path)


def test_a_recipe_may_be_changed_by_hand(tmp_path: Path) -> None:
    full_plan().save(tmp_path)
    fields = json.loads((tmp_path / "plan.json").read_text())
    fields["annotations"]["0"]["w"] = "i8/ch"
    fields["recipe"] = Recipe.parse("nf4").to_dict()
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    assert Plan.load(tmp_path).formats("0")["w"] == Format.parse("i8/ch")
