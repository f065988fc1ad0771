"""qfx.passes.norm_fold: norms go into the linears that read them, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.errors import UnsupportedError
from qfx.passes import norm_fold
from qfx.passes._sites import Norm, Weight
from qfx.passes.norm_fold import Site
from qfx.passes.rewrites import apply_record
from tests.graphs import Function, capture, text
from tests.rewriting import Case, check, positive, zoo


def layer_norm() -> nn.LayerNorm:
    """With random weight and bias."""
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight.copy_(positive(8))
    return norm


def nothing(site: Site) -> None:
    return None


def pre_norm(bias: bool = True, dtype: torch.dtype = torch.float32) -> Case:
    """x + down(up(norm(x))) with random norms."""
    torch.manual_seed(0)
    layers = {"norm": layer_norm(), "a": nn.Linear(8, 8, bias=bias), "b": nn.Linear(8, 8)}
    model = Function(lambda own, x: x + own.a(own.norm(x)) * own.b(own.norm(x)), **layers)
    return Case(model.to(dtype), (torch.randn(2, 3, 8, dtype=dtype),), {})


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 5),
        ("gemma3", 5),
        ("falcon", 3),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("llama", 5), ("t5", 10), ("mixtral", 5), ("vit", 5))),
    ],
)
def test_exact(name: str, count: int) -> None:
    sites, _ = check(zoo(name), norm_fold, nothing, untied=True)
    assert len(sites) == count


def test_exact_in_double_precision() -> None:
    sites, refusals = check(pre_norm(dtype=torch.float64), norm_fold, nothing, limit=1e-14)
    assert len(sites) == 1 and refusals == []


def test_the_text_stays_and_the_norm_is_neutral() -> None:
    gm, _ = pre_norm().copies()
    before = text(gm)
    sites, _ = norm_fold.find(gm)
    assert sites[0].to_record() == {
        "name": "norm-fold",
        "norm": {"weight": "norm.weight", "bias": "norm.bias", "plus_one": False},
        "linears": (
            {"name": "a", "weight": "a.weight", "bias": "a.bias", "inp": 1, "out": 0},
            {"name": "b", "weight": "b.weight", "bias": "b.bias", "inp": 1, "out": 0},
        ),
        "biases": True,
    }
    norm_fold.apply(gm, sites[0])
    assert text(gm) == before
    assert bool((graph.get_tensor(gm, "norm.weight") == 1).all())
    assert bool((graph.get_tensor(gm, "norm.bias") == 0).all())


def test_gemma_stores_one_less() -> None:
    gm, live = zoo("gemma3").copies(untied=True)
    sites, _ = norm_fold.find(gm)
    assert all(site.norm.plus_one for site in sites)
    norm_fold.apply(live, sites[0])
    assert bool((graph.get_tensor(live, sites[0].norm.weight) == 0).all())


def test_without_a_bias_the_norm_keeps_its_own() -> None:
    case = pre_norm(bias=False)
    sites, refusals = check(case, norm_fold, nothing)
    assert refusals == [] and not sites[0].biases
    case.model.norm.weight.data[3] = 0.0  # type: ignore[union-attr, operator]
    gm, _ = case.copies()
    sites, refusals = norm_fold.find(gm)
    assert sites == [] and "nearly 0" in refusals[0].reason


def test_new_parameters_replace_the_old_ones() -> None:
    case = pre_norm()
    gm, live = case.copies()
    old: Any = live.a.weight  # type: ignore[union-attr]
    kept = old.detach().clone()
    live.b.weight.requires_grad_(False)  # type: ignore[union-attr]
    norm_fold.apply(live, norm_fold.find(gm)[0][0])
    assert torch.equal(old, kept) and live.a.weight is not old  # type: ignore[union-attr]
    parameters = dict(live.named_parameters())
    assert list(parameters) == list(dict(case.model.named_parameters()))
    assert parameters["a.weight"].requires_grad and not parameters["b.weight"].requires_grad


def test_post_norm_models_are_refused_and_the_forced_fold_is_wrong() -> None:
    case = zoo("bert")
    gm, _ = case.copies()
    sites, refusals = norm_fold.find(gm)
    assert sites == [] and len(refusals) == 5
    assert all("reads it, not only linears" in note.reason for note in refusals)
    prefix = "encoder.layer.0."
    norm = Norm(f"{prefix}attention.output.LayerNorm.weight", f"{prefix}attention.output.LayerNorm.bias")
    fc = Weight(
        f"{prefix}intermediate.dense", f"{prefix}intermediate.dense.weight", f"{prefix}intermediate.dense.bias", 1, 0
    )
    norm_fold.apply(gm, Site(norm, (fc,), True))
    assert case.error(gm) > 0.1


def test_negative_control_a_forgotten_reader_or_bias() -> None:
    case = pre_norm()
    gm, _ = case.copies()
    site = norm_fold.find(gm)[0][0]
    norm_fold.apply(gm, Site(site.norm, site.linears[:1], True))
    assert case.error(gm) > 0.1
    gm, _ = case.copies()
    unbiased = tuple(Weight(w.name, w.weight, None, w.inp, w.out) for w in site.linears)
    norm_fold.apply(gm, Site(Norm("norm.weight"), unbiased, True))
    assert case.error(gm) > 0.1


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda own, x: own.fc(own.norm(x)).sum() + own.norm.weight.sum(), "is also used by %sum"),
        (lambda own, x: nn.functional.linear(own.norm(x), own.fc.weight * 2), "computed in the graph"),
        (lambda own, x: own.fc(own.norm(x)) + own.fc(x), "is also used by %linear"),
        (lambda own, x: own.norm(x) * 2, "reads it, not only linears"),
        (lambda own, x: own.fc(nn.functional.layer_norm(x, (8,))), "no weight"),
    ],
)
def test_refusals(forward: Any, reason: str) -> None:
    model = Function(forward, norm=nn.LayerNorm(8), fc=nn.Linear(8, 8))
    sites, refusals = norm_fold.find(capture(model, torch.randn(2, 8)))
    assert sites == [] and reason in refusals[0].reason


def test_rows_may_move_between_norm_and_linear() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        y = own.norm(x)
        rows = y.transpose(0, 1)[1:].reshape(-1, 8)
        return own.a(rows[torch.tensor([1, 0])]) + own.b(y[:, -1].unsqueeze(0))  # type: ignore[no-any-return]

    layers = {"norm": layer_norm(), "a": nn.Linear(8, 3), "b": nn.Linear(8, 3)}
    sites, _ = check(Case(Function(forward, **layers), (torch.randn(2, 3, 8),), {}), norm_fold, nothing)
    assert len(sites) == 1 and len(sites[0].linears) == 2


def test_a_record_of_other_layers() -> None:
    gm, _ = pre_norm().copies()
    record = norm_fold.find(gm)[0][0].to_record()
    other = zoo("bert").copies()[0]
    apply_record(other, record, {})
    assert zoo("bert").error(other) < 1e-6
    with pytest.raises(UnsupportedError, match=r"'norm-fold' does not fit the model"):
        apply_record(nn.Linear(3, 3), record, {})
    del gm.b
    with pytest.raises(UnsupportedError, match=r"found: b\.weight, b\.bias missing"):
        apply_record(gm, record, {})
    with pytest.raises(ValueError, match="expected a record of 'norm-fold', found 'smooth'"):
        Site.from_record({**record, "name": "smooth"})
    with pytest.raises(ValueError, match="a rewrite 'norm-fold' of the plan cannot be read: KeyError: 'linears'"):
        Site.from_record({key: value for key, value in record.items() if key != "linears"})
    with pytest.raises(ValueError, match="cannot be read: TypeError: .*wight"):
        Site.from_record({**record, "norm": {"wight": "a"}})
