from __future__ import annotations

from typing import Any

import pytest

from qfx import Format, Recipe, graph
from qfx.allocation import sites
from qfx.analysis.units import Unit, units
from qfx.passes.annotate import annotate
from qfx.rounding.method_options import AllocationOptions
from tests.qfx.analysis.models import causal, prepared

OPTIONS = AllocationOptions(avg_bits=4)
KINDS = [{"target": t, "w": "u4/g16"} for t in ("linear", "embedding", "tied")]


def find(kind: str, *rules: dict[str, Any], **fields: Any) -> sites.Sites:
    gm = graph.copy(prepared(kind)[0])
    recipe = Recipe.parse({"rules": [*KINDS, *rules], **fields})
    assert annotate(gm, recipe) == []
    return sites.find(gm, recipe, OPTIONS)


def test_rules_for_kinds_are_allocated() -> None:
    found = find("llama")
    model, _ = causal("llama")
    assert {unit.fqn for unit in found.units} >= {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert found.rest == norms + model.get_buffer("model.rotary_emb.inv_freq").nbytes
    assert (found.fixed, found.rules, found.skip) == ({}, {}, [])
    assert sum(u.elements for u in found.units) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_a_rule_for_a_name_holds_and_is_counted() -> None:
    found = find("llama", {"target": "lm_head", "w": "i8/ch"})
    assert "lm_head" not in {unit.fqn for unit in found.units}
    elements = causal("llama")[0].get_parameter("lm_head.weight").numel()
    assert found.fixed == {"lm_head": (elements, Format.parse("i8/ch").nbytes((64, 32)))}
    assert found.rules == {"lm_head": "the rule for 'lm_head', w=i8/ch,"}
    sizes = found.stored({unit.name: [Format.parse("f16")] for unit in found.units})
    assert sizes.least == 2 * sizes.elements
    assert sizes.weights == sizes.elements + elements


def test_several_formats_of_a_rule_are_counted_as_stored() -> None:
    fqn = "model.layers.0.self_attn.q_proj"
    found = find("llama", {"target": fqn, "w": ["i8/ch", "u4/g16"]})
    half = (16, 32)
    assert found.fixed == {fqn: (1024, sum(Format.parse(f).nbytes(half) for f in ("i8/ch", "u4/g16")))}


def test_what_has_no_format_stays_as_it_is() -> None:
    plain, less = find("llama"), find("llama", ignore=["*.mlp.*"])
    model, _ = causal("llama")
    size = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name)
    assert less.rest == plain.rest + size
    assert not any(".mlp." in unit.fqn for unit in less.units)


def test_a_table_that_only_one_reader_has_in_a_format_keeps_it() -> None:
    both, one = find("tied"), find("tied", ignore=["lm_head"])
    assert "model.embed_tokens" in {unit.fqn for unit in both.units}
    assert both.notes == []
    (note,) = one.notes
    assert note.node == "model.embed_tokens"
    assert note.reason == "its format is not allocated: lm_head, which reads the same weight, has none"
    assert list(one.fixed) == ["model.embed_tokens"]
    assert one.rest == both.rest + 4 * 64 * 32, "the float table that lm_head reads"


def test_nothing_to_allocate_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no weight whose format is to be allocated"):
        find("llama", {"target": "*", "w": "i8/ch"})


def test_candidates_of_kinds() -> None:
    options = AllocationOptions(formats=("nf4/g64/dq", "u3/g32"), embeddings=("i8/ch",))
    found = {
        kind: list(map(str, sites.candidates(Unit("u", "u", kind, "", (4, 4)), options)))
        for kind in ("linear", "embedding", "experts", "lm_head")
    }
    assert found == {
        "linear": ["nf4/g64/dq", "u3/g32"], "embedding": ["i8/ch"], "experts": ["u3/g32"],
        "lm_head": ["nf4/g64/dq", "u3/g32"],
    }  # fmt: skip


def test_the_least_is_that_of_whole_weights_where_heads_pad() -> None:
    found = find("llama")
    fmt = Format.parse("u3/g32")  # heads have 16 channels: a group of their columns is half empty
    least = found.stored({unit.name: [fmt] for unit in found.units}).least
    assert least < sum(unit.nbytes(fmt) for unit in found.units)
    shapes = {unit.fqn: unit for unit in units(prepared("llama")[0], by="layers")[0]}
    assert least == sum(unit.nbytes(fmt) for unit in shapes.values())
