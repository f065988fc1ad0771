"""qfx.passes.centre: LayerNorms become RMS norms where nothing but LayerNorms reads the residual stream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.errors import UnsupportedError
from qfx.passes import _edits as edits
from qfx.passes import _stream as streams
from qfx.passes import centre
from qfx.rewrites.centred import can_be_centred, centred, is_centred
from tests.graphs import Function, counts, text
from tests.rewriting import Case, check, cleaned, positive, zoo


def nothing(site: Any) -> None:
    return None


def pre_norm(dtype: torch.dtype = torch.float32) -> Case:
    """head(ln(x + down(ln(x)))) over an embedding."""
    torch.manual_seed(0)
    own: dict[str, nn.Module] = {"embed": nn.Embedding(5, 8), "up": nn.Linear(8, 8), "head": nn.Linear(8, 4)}
    for name in ("ln", "last"):
        norm = own[name] = nn.LayerNorm(8)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight.copy_(positive(8))

    def forward(own: Any, ids: Tensor) -> Tensor:
        x = own.embed(ids)
        y: Tensor = own.head(own.last(x + own.up(own.ln(x))))
        return y

    return Case(Function(forward, **own).to(dtype), (torch.tensor([[0, 3, 4]]),), {})


@pytest.mark.parametrize(
    ("name", "norms"), [("gpt2", 5), ("opt", 5), ("vit", 5), pytest.param("gpt_neox", 5, marks=pytest.mark.slow)]
)
def test_exact(name: str, norms: int) -> None:
    found, _ = check(zoo(name), centre, nothing, untied=True)
    assert [len(site.norms) for site in found] == [norms]


def test_exact_in_double_precision() -> None:
    found, refusals = check(pre_norm(torch.float64), centre, nothing, limit=1e-14)
    assert len(found) == 1 and refusals == []


def test_before_and_after() -> None:
    gm, live = pre_norm().copies()
    before = counts(gm)
    (site,), _ = centre.find(gm)
    assert {part.weight: part.axis for part in site.writers} == {"embed.weight": 1, "up.weight": 0, "up.bias": 0}
    centre.apply(gm, site)
    after = counts(gm)
    assert before["layer_norm"] == 2 and "layer_norm" not in after
    assert after["rms_norm"] == 2 and after["add"] == before["add"] + 2
    assert "%rms_norm: f32[1,s0,8] = aten.rms_norm(%embedding, [8], @ln.weight, 1e-05)" in text(gm)
    for part in site.writers:
        assert float(graph.get_tensor(gm, part.weight).detach().mean(part.axis).abs().max()) < 1e-7
    centre.apply(live, site)
    assert type(live.get_submodule("ln")).__name__ == "CentredLayerNorm"


def test_a_bias_of_zero_is_left_out() -> None:
    gm, _ = pre_norm().copies()
    (site,), _ = centre.find(gm)
    before = counts(gm)["add"]
    for norm in site.norms:
        assert norm.bias is not None
        edits.edit(gm, norm.bias, torch.zeros_like)
    centre.apply(gm, site)
    assert counts(gm)["add"] == before


def test_a_stream_of_rms_norms_needs_nothing_and_would_be_changed() -> None:
    """Measured .26: what code that centres every embedding does to a Llama."""
    case = zoo("llama")
    gm, _ = case.copies()
    assert centre.find(gm) == ([], [])
    (stream,), _ = streams.find(gm, folded=False)
    centre.apply(gm, centre.Site((), tuple(stream.writers)))
    assert case.error(gm) > 1e-3


def test_negative_control_a_writer_that_is_not_centred() -> None:
    case = pre_norm()
    gm, _ = case.copies()
    (site,), _ = centre.find(gm)
    centre.apply(gm, centre.Site(site.norms, site.writers[1:]))
    assert case.error(gm) > 0.01


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda own, x: own.head(own.other(x + own.up(own.ln(x)))), "RMS norms read it, too"),
        (lambda own, x: own.head(x + own.up(own.ln(x))), "%linear_1 reads it without a norm"),
        (lambda own, x: own.head(own.plain(x + own.up(own.ln(x)))), "no weight"),
        (lambda own, x: own.head(own.last(own.up(own.last(x)) + own.last(x))), "post-norm"),
    ],
)
def test_refusals(forward: Any, reason: str) -> None:
    own = {"ln": nn.LayerNorm(8), "last": nn.LayerNorm(8), "other": nn.RMSNorm(8), "up": nn.Linear(8, 8)}
    own |= {"plain": nn.LayerNorm(8, elementwise_affine=False), "head": nn.Linear(8, 4), "embed": nn.Embedding(5, 8)}
    model = Function(lambda own, ids: forward(own, own.embed(ids)), **own)
    found, refusals = centre.find(cleaned(model, torch.tensor([[0, 1, 4]])))
    assert found == [] and any(reason in note.reason for note in refusals), refusals


class Own(nn.LayerNorm):
    """With a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


def test_modules_with_a_forward_of_their_own_are_refused() -> None:
    for module in (Own(8), nn.RMSNorm(8), nn.LayerNorm((2, 8))):
        assert not can_be_centred(module)
        with pytest.raises(UnsupportedError, match=f"an RMS norm of a {type(module).__name__}"):
            centred(module)
    own = {"ln": Own(8), "last": nn.LayerNorm(8), "up": nn.Linear(8, 8), "embed": nn.Embedding(5, 8)}
    model = Function(lambda own, i: own.up(own.last(own.embed(i) + own.up(own.ln(own.embed(i))))), **own)
    found, refusals = centre.find(cleaned(model, torch.tensor([[0, 1, 4]])))
    assert found == [] and refusals


def test_the_live_norm() -> None:
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 8)
    x = x - x.mean(-1, keepdim=True)
    expected, names = norm(x).detach(), list(norm.state_dict())
    other = copy.deepcopy(centred(centred(norm)))
    assert is_centred(other) and isinstance(other, nn.LayerNorm) and list(other.state_dict()) == names
    torch.testing.assert_close(other(x).detach(), expected)
    away = other(x + 1) - nn.LayerNorm.forward(other, x + 1)
    assert float(away.detach().abs().max()) > 0.1
