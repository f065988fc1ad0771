"""qfx.passes.untie: a tied lm_head gets a weight of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qfx import graph
from qfx.passes import smooth, untie
from qfx.passes._sites import Norm, Weight
from qfx.passes.rewrites import apply_record
from tests.graphs import Function, capture, text
from tests.rewriting import check, positive, zoo

GOLDEN = """\
%inputs_0: i64[2,3] = input
%embedding: f32[2,3,4] = aten.embedding(@embed.weight, %inputs_0)
%linear: f32[2,3,9] = aten.linear(%embedding, @lm_head.weight)
return [%linear]
"""


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = Function(lambda own, x: own.lm_head(own.embed(x)), embed=nn.Embedding(9, 4), lm_head=nn.Linear(4, 9, False))
    model.lm_head.weight = model.embed.weight  # type: ignore[union-attr]
    return model


def test_golden_text() -> None:
    gm = capture(tied(), torch.ones(2, 3, dtype=torch.int64))
    sites, refusals = untie.find(gm)
    assert refusals == []
    assert [s.to_record() for s in sites] == [
        {"name": "untie", "linear": "lm_head", "table": "embed.weight", "weight": "lm_head.weight"}
    ]
    untie.apply(gm, sites[0])
    assert text(gm) == GOLDEN
    assert untie.find(gm) == ([], [])
    assert graph.get_tensor(gm, "lm_head.weight").data_ptr() != graph.get_tensor(gm, "embed.weight").data_ptr()


def test_the_live_model_is_untied_by_name() -> None:
    model = tied()
    gm = capture(model, torch.ones(2, 3, dtype=torch.int64))
    site = untie.find(gm)[0][0]
    apply_record(model, site.to_record(), {})
    held: Any = model
    assert held.lm_head.weight is not held.embed.weight and torch.equal(held.lm_head.weight, held.embed.weight)
    assert isinstance(held.lm_head.weight, nn.Parameter) and held.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="expected 'lm_head.weight' to be tied to 'embed.weight'"):
        untie.apply(model, site)


def test_a_table_that_goes_by_the_name_of_the_head() -> None:
    """The head's module stands first, as in Camembert."""
    torch.manual_seed(0)
    model = Function(lambda own, x: own.lm_head(own.embed(x)), lm_head=nn.Linear(4, 9, False), embed=nn.Embedding(9, 4))
    model.lm_head.weight = model.embed.weight  # type: ignore[union-attr]
    ids = torch.ones(2, 3, dtype=torch.int64)
    gm = capture(model, ids)
    (site,), refusals = untie.find(gm)
    assert refusals == [] and (site.table, site.weight) == ("lm_head.weight", "lm_head.weight")
    before = gm(ids)[0]
    untie.apply(gm, site)
    assert text(gm) == GOLDEN
    untie.apply(model, site)
    with torch.no_grad():
        graph.get_tensor(gm, "lm_head.weight").mul_(2)
        graph.get_tensor(model, "lm_head.weight").mul_(2)
    gm.recompile()
    assert torch.equal(gm(ids)[0], 2 * before) and torch.equal(model(ids), 2 * before)


def test_such_a_table_that_no_embedding_holds_is_refused() -> None:
    layers = {"lm_head": nn.Linear(4, 9, False)}
    model = Function(lambda own, x: own.lm_head(nn.functional.embedding(x, own.lm_head.weight)), **layers)
    sites, refusals = untie.find(capture(model, torch.ones(2, 3, dtype=torch.int64)))
    assert sites == [] and "read in a module that is no nn.Embedding" in refusals[0].reason


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "bart"])
def test_exact_on_tied_models(name: str) -> None:
    sites, refusals = check(zoo(name), untie, lambda site: None, limit=1e-6)
    assert len(sites) == 1 and refusals == []


def test_a_bare_use_of_the_table_is_refused() -> None:
    model = Function(lambda own, x: nn.functional.linear(own.embed(x), own.embed.weight), embed=nn.Embedding(9, 4))
    sites, refusals = untie.find(capture(model, torch.ones(2, 3, dtype=torch.int64)))
    assert sites == [] and "no nn.Linear" in refusals[0].reason


def test_models_without_ties_have_no_sites() -> None:
    assert untie.find(zoo("llama").copies()[0]) == ([], [])


def test_negative_control_scaling_a_tied_head_changes_the_embedding() -> None:
    case = zoo("gpt2")
    gm, _ = case.copies()
    sites, refusals = smooth.find(gm)
    assert "lm_head" not in [site.linears[0].name for site in sites]
    assert any("the rewrite 'untie' separates them" in note.reason for note in refusals)
    head = Weight("lm_head", "transformer.wte.weight", None, 1, 0)
    forced = smooth.Site(Norm("transformer.ln_f.weight", "transformer.ln_f.bias"), (head,), 64)
    smooth.apply(gm, forced, positive(64))
    assert case.error(gm) > 0.1
    gm, _ = case.copies(untied=True)
    smooth.apply(gm, smooth.find(gm)[0][-1], positive(64))
    assert case.error(gm) < 1e-5
