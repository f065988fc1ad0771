"""qfx.rewrites.permute: the order that puts equal formats side by side, in weights, annotations and plans."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import qfx
from qfx import Format, Plan, Recipe, Rule, annotation, graph
from qfx.analysis import attentions
from qfx.annotation import Columns, Formats, Outliers
from qfx.errors import QfxWarning, UnsupportedError
from qfx.live.segments import pieces, segments
from qfx.passes.rewrites import apply_record
from qfx.rewrites.permute import permute
from tests.passes.test_permute_heads import case
from tests.rewriting import Case, zoo
from tests.zoo import ZOO

I8, I4 = Format.parse("i8/ch"), Format.parse("i4/g8")


def annotated(one: Case, formats: Mapping[str, Any]) -> tuple[fx.GraphModule, Plan]:
    """A graph whose nodes of these names have a weight format, and a plan that says the same."""
    gm, _ = one.copies()
    graph.rename(gm)
    plan = Plan(Recipe(name="r", rules=()))
    for node in gm.graph.nodes:
        if node.op == "call_function" and (fmt := formats.get(graph.fqn_of(node))) is not None:
            role = "k" if "attention" in graph.schema_name(node) else "w"
            annotation.set(node, role, fmt)
            plan.annotations[graph.fqn_of(node)] = {role: annotation.to_json(fmt)}
    return gm, plan


def formats_of(gm: fx.GraphModule) -> dict[str, Formats]:
    return {graph.fqn_of(n): annotation.get(n)["w"] for n in gm.graph.nodes if "w" in annotation.get(n)}


def rows(text: str) -> tuple[Format, ...]:
    """`8484`: a format for each head."""
    return tuple({"8": I8, "4": I4}[c] for c in text)


def count(formats: Formats) -> int:
    return len(pieces(segments(formats, [64, 64], "w")))


def check(one: Case, plan: Plan, gm: fx.GraphModule, limit: float = 1e-14) -> None:
    """The graph computes what it did, and the records do the same to the live model."""
    assert one.error(gm) <= limit
    _, live = one.copies()
    for record in json.loads(json.dumps(plan.rewrites)):
        apply_record(live, record, plan.tensors)
    assert one.error(live) <= limit
    assert {name: plan.formats(name)["w"] for name in formats_of(gm)} == formats_of(gm)


def test_equal_formats_come_together() -> None:
    asked = {"q": rows("88448844"), "k": rows("8484"), "v": rows("8484"), "o": Columns(rows("88448844"))}
    gm, plan = annotated(case(), asked)
    assert permute(gm, plan) == []
    assert formats_of(gm) == {
        "q": rows("88884444"), "k": rows("8844"), "v": rows("8844"), "o": Columns(rows("88884444"))
    }  # fmt: skip
    assert len(plan.rewrites) == 1 and plan.rewrites[0]["name"] == "permute-heads"
    check(case(), plan, gm)
    assert permute(gm, plan) == [] and len(plan.rewrites) == 1


def test_query_heads_stay_with_their_group() -> None:
    gm, plan = annotated(case(), {"q": rows("84848484")})
    permute(gm, plan)
    found = formats_of(gm)["q"]
    assert count(found) == 5 and count(rows("84848484")) == 8  # 84 48 84 48, or turned round
    assert {part["weight"] for part in plan.rewrites[0]["moved"]} == {"q.weight", "o.weight"}  # KV heads stay
    check(case(), plan, gm)


def test_formats_of_several_heads_and_of_parts_of_one() -> None:
    several: tuple[dict[str, Any], ...] = (
        {"q": rows("4848"), "k": rows("4848")},  # a format for two heads
        {"q": rows("84" * 8), "k": rows("4848"), "v": rows("4848")},  # two formats in each head
        {"o": Columns(rows("44884488"))},
    )
    for asked in several:
        gm, plan = annotated(case(), asked)
        permute(gm, plan)
        check(case(), plan, gm)
        found = formats_of(gm)
        assert sum(map(count, found.values())) < sum(map(count, asked.values()))


def test_nothing_changes_where_nothing_is_won() -> None:
    several: tuple[dict[str, Any], ...] = (
        {"q": I4, "k": I4, "v": I8, "o": I4},
        {"q": rows("88888888"), "o": Columns(rows("88884444"))},
        {"q": Columns(rows("8484")), "o": rows("8484")},  # the other axis: no heads
        {},
    )
    for asked in several:
        gm, plan = annotated(case(), asked)
        assert permute(gm, plan) == [] and plan.rewrites == []
        assert formats_of(gm) == asked


def test_outliers_of_the_output_projection_move_along() -> None:
    kept = Outliers(I4, Format("f16"), (0, 17, 63))
    gm, plan = annotated(case(), {"k": rows("8484"), "o": kept})
    permute(gm, plan)
    found = formats_of(gm)["o"]
    order = next(part for part in plan.rewrites[0]["moved"] if part["weight"] == "o.weight")["order"]
    place = [8 * list(order).index(c // 8) + c % 8 for c in kept.columns]
    assert isinstance(found, Outliers) and list(found.columns) == sorted(place) != list(kept.columns)


def test_formats_of_cached_keys_move_along() -> None:
    name = attentions.find(annotated(case(), {})[0])[0][0].name
    gm, plan = annotated(case(), {name: rows("8484"), "k": rows("8484")})
    permute(gm, plan)
    (attention,) = attentions.find(gm)[0]
    assert annotation.get(attention.node)["k"] == rows("8844") == plan.formats(name)["k"]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_any_formats(seed: int) -> None:
    """Exact, never more pieces, and each head keeps its format."""
    rng = random.Random(seed)
    asked: dict[str, Formats] = {
        name: rows("".join(rng.choices("84", k=n))) for name, n in (("q", 8), ("k", 4), ("v", 4))
    }
    asked["o"] = Columns(rows("".join(rng.choices("84", k=8))))
    gm, plan = annotated(case(), asked)
    before = {name: graph.get_tensor(gm, f"{name}.weight").clone() for name in asked}
    assert permute(gm, plan) == []
    check(case(), plan, gm)
    found = formats_of(gm)
    assert sum(map(count, found.values())) <= sum(map(count, asked.values()))
    for name, old in before.items():
        new = graph.get_tensor(gm, f"{name}.weight")
        assert by_head(name, old, asked[name]) == by_head(name, new, found[name])


def by_head(name: str, weight: Tensor, formats: Formats) -> list[tuple[str, tuple[float, ...]]]:
    """Format and values of each head, sorted."""
    heads = (weight.t() if name == "o" else weight).unflatten(0, (-1, 8)).flatten(1).tolist()
    return sorted((str(fmt), tuple(head)) for fmt, head in zip(annotation.each(formats), heads, strict=True))


# Models


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "phi3", "qwen3", "bart", "gpt_oss", "olmo2")),
    ],
)
def test_zoo(name: str) -> None:
    """Fused, grouped and normed heads, sinks, cross attention."""
    one = zoo(name)
    gm, _ = annotated(one, {})
    asked: dict[str, Formats] = {}
    for attention in attentions.find(gm)[0]:
        for role, projection in attentions.projections(attention):
            fmts = rows(("84" * projection.size)[: projection.size // projection.width])
            asked[projection.fqn] = Columns(fmts) if role == "o" else fmts
    gm, plan = annotated(one, asked)
    assert permute(gm, plan) == [] and plan.rewrites
    check(one, plan, gm, limit=1e-5)


def recipe(**fields: Any) -> Recipe:
    """Groups as wide as a head: rounded alike wherever the head stands."""
    parts = ["i8/g16", "i4/g16", "i8/g16", "i4/g16"]
    rules = [Rule(target=f"*.{name}_proj", w=parts[:heads]) for name, heads in (("q", 4), ("k", 2), ("v", 2))]
    return Recipe(name="heads", rules=(*rules, Rule(target="*.o_proj", w=parts, along="columns")), **fields)


@pytest.mark.slow
@torch.no_grad()
def test_a_recipe_may_ask_for_it() -> None:
    """The same numbers with and without, in a live model and a compiled one; fewer pieces."""
    model, inputs = ZOO["llama"]()
    other, _ = ZOO["llama"]()
    third, _ = ZOO["llama"]()
    plain = qfx.quantize(model, recipe(), [inputs])
    made = qfx.plan(other, recipe(rewrites=("permute-heads",)), [inputs])
    assert [r["name"] for r in made.rewrites] == ["permute-heads"] * 2
    ordered: Any = qfx.quantize(other, made)
    wanted = plain(**inputs).logits
    assert torch.allclose(ordered(**inputs).logits, wanted, atol=2e-5)
    mixed = ordered.model.layers[0].self_attn
    assert sorted(len(s.ranges) for s in mixed.q_proj.segments) == [1, 2] and mixed.o_proj.axis == 1
    options: Any = {"plan": made, "backend": "reference"}
    compiled = torch.compile(third, backend="qfx", options=options)
    assert torch.allclose(compiled(**inputs).logits, wanted, atol=2e-5)


@pytest.mark.slow
def test_refusals_are_told() -> None:
    model, inputs = ZOO["bloom"]()
    parts = ["i8/ch", "i4/g16", "i8/ch", "i4/g16"]
    asked = Recipe(
        name="r", rewrites=("permute-heads",), rules=(Rule(target="*attention.dense", w=parts, along="columns"),)
    )
    with pytest.warns(QfxWarning, match="equal formats cannot be put side by side: its mask differs by head, computed"):
        made = qfx.plan(model, asked, [inputs])
    assert made.rewrites == []
    with pytest.raises(UnsupportedError, match="cannot be put side by side"):
        qfx.plan(model, asked, [inputs], strict=True)


@pytest.mark.slow
def test_notes_are_minor_where_nobody_asked() -> None:
    one = zoo("bloom")
    name = attentions.find(annotated(one, {})[0])[0][0].o
    assert name is not None
    gm, plan = annotated(one, {name.fqn: Columns(rows("8484"))})
    (note,) = permute(gm, plan, minor=True)
    assert note.minor and not permute(gm, plan)[0].minor and plan.rewrites == []
    assert formats_of(gm) == {name.fqn: Columns(rows("8484"))}
