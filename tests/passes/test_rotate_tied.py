"""qfx.passes.rotate where lm_head shares the embedding's table: the norm's weight acts in the basis before."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, fx, nn

from qfx import graph
from qfx.live.modules import turned
from qfx.passes import _stream, centre, norm_fold, rotate
from qfx.passes.rewrites import apply_record, rotations
from qfx.rewrites import rotation
from tests import zoo as models
from tests.graphs import Function, text
from tests.rewriting import Case, cleaned, zoo

HEAD, TABLE, NORM = "lm_head", "model.embed_tokens.weight", "model.norm.weight"


@lru_cache(maxsize=4)
def tied(kind: str = "Llama") -> Case:
    """A tied model whose norms have random weights. Gemma's factors are 1 + weight, and it scales its embeddings."""
    sizes: dict[str, Any] = models._decoder_sizes() | {"tie_word_embeddings": True}
    sizes |= {"head_dim": 16} if kind == "Gemma" else {}
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**sizes)).eval()
    models.randomize(model, 0)
    return Case(model, (), models._causal(), dynamic=False)


def folded(case: Case) -> tuple[fx.GraphModule, nn.Module]:
    """(graph, live model) after all norms are folded but the last, which the tied head reads."""
    gm, live = case.copies()
    for site in norm_fold.find(gm)[0]:
        for target in (gm, live):
            norm_fold.apply(target, site)
    return gm, live


def rotated(case: Case, **options: Any) -> tuple[fx.GraphModule, nn.Module, rotate.Site]:
    gm, live = folded(case)
    (site,), notes = rotate.find(gm, tied={HEAD}, **options)
    assert notes == []
    record = json.loads(json.dumps(site.to_record()))
    assert rotate.Site.from_record(record) == site
    for target in (gm, live):
        apply_record(target, record, {})
    return gm, live, site


def reading(live: nn.Module, site: rotate.Site) -> nn.Module:
    """The live model with a head that turns its input, as the packed one does."""
    head = live.get_submodule(HEAD)
    gain = head._buffers["gain"]
    head.register_forward_pre_hook(lambda _, args: (turned(args[0], (site.block, site.seed), gain),))
    return live


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma"])
def test_the_function_stays(kind: str) -> None:
    case = tied(kind)
    gm, live, site = rotated(case)
    assert [head.name for head in site.heads] == [HEAD] and site.norms[0].plus_one == (kind == "Gemma")
    assert case.error(gm) <= 1e-5 and case.error(reading(live, site)) <= 1e-5
    assert case.untouched()


def test_the_table_is_one() -> None:
    """E Q, once, for whoever reads it; the norm's weight is 1, and what it was is the head's gain."""
    case = tied()
    gm, live, site = rotated(case)
    q, before = rotation.matrix(64, 0), case.before
    for module in (gm, live):
        found = graph.get_tensor(module, TABLE).double()
        torch.testing.assert_close(found, before[TABLE].double() @ q, rtol=0, atol=1e-6)
        assert bool((graph.get_tensor(module, NORM) == 1).all())
        assert torch.equal(graph.get_tensor(module, f"{HEAD}.gain"), before[NORM])
    head: Any = live.get_submodule(HEAD)
    assert head.weight is graph.get_tensor(live, TABLE)
    assert sum(part.weight == TABLE for part in (*site.readers, *site.writers)) == 1
    assert rotations([site.to_record()]) == {HEAD: (64, 0)} and site.explicit


def small(gain: Tensor, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    def forward(own: Any, ids: Tensor) -> Tensor:
        x = own.embed(ids)
        x = x + own.down(own.up(x).relu())
        y: Tensor = nn.functional.linear(own.norm(x), own.embed.weight)
        return y

    parts = {"embed": nn.Embedding(5, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "norm": nn.RMSNorm(8, 1e-6)}
    parts["norm"].weight = nn.Parameter(gain)
    return cleaned(Function(forward, **parts).to(dtype).requires_grad_(False), torch.tensor([[0, 1, 4]]))


def name_of(gm: fx.GraphModule) -> str:
    """What the linear that reads the table is called."""
    node = next(n for n in gm.graph.nodes if graph.schema_name(n) == "aten::linear" and "embed" in n.args[1].target)
    return graph.fqn_of(node)


BEFORE = """\
%rms_norm: f32[1,3,8] = aten.rms_norm(%add, [8], @norm.weight, 1e-06)
%linear_2: f32[1,3,5] = aten.linear(%rms_norm, @embed.weight)
"""
AFTER = """\
%rms_norm: f32[1,3,8] = aten.rms_norm(%add, [8], @norm.weight, 1e-06)
%hadamard: f32[1,3,8] = qfx.hadamard(%rms_norm, 8, 0, True)
%mul: f32[1,3,8] = aten.mul.Tensor(%hadamard, @embed.gain)
%hadamard_1: f32[1,3,8] = qfx.hadamard(%mul, 8, 0, False)
%linear_2: f32[1,3,5] = aten.linear(%hadamard_1, @embed.weight)
"""


def test_the_text() -> None:
    gm = small(torch.arange(1.0, 9.0))
    assert BEFORE in text(gm)
    (site,), _ = rotate.find(gm, tied={name_of(gm)})
    rotate.apply(gm, site)
    gm.graph.lint()
    assert AFTER in text(gm), text(gm)


@pytest.mark.parametrize("block", [None, 4])
def test_it_is_exact_in_f64(block: int | None) -> None:
    """What is left in f32 is rounding."""
    gm = small(torch.randn(8, generator=torch.Generator().manual_seed(0)), dtype=torch.float64)
    ids = torch.tensor([[3, 2, 0]])
    (wanted,) = gm(ids)
    (site,), _ = rotate.find(gm, tied={name_of(gm)}, block=block, seed=3)
    rotate.apply(gm, site)
    gm.recompile()
    assert float((gm(ids)[0] - wanted).norm() / wanted.norm()) <= 1e-14


def test_a_norm_whose_weight_is_1_needs_nothing_at_run_time() -> None:
    gm = small(torch.ones(8))
    ids = torch.tensor([[3, 2, 0]])
    before, (wanted,) = text(gm), gm(ids)
    (site,), _ = rotate.find(gm, tied={name_of(gm)})
    assert site.heads == () and not site.explicit
    rotate.apply(gm, site)
    assert text(gm) == before
    torch.testing.assert_close(gm(ids)[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_head_that_reads_the_stream_itself_needs_nothing() -> None:
    def forward(own: Any, ids: Tensor) -> Tensor:
        x = own.embed(ids)
        x = x + own.down(own.up(own.norm(x)).relu())
        y: Tensor = nn.functional.linear(x, own.embed.weight)
        return y

    parts = {"embed": nn.Embedding(5, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "norm": nn.RMSNorm(8)}
    gm = cleaned(Function(forward, **parts), torch.tensor([[0, 1, 4]]))
    (wanted,) = gm(torch.tensor([[3, 2, 0]]))
    (site,), _ = rotate.find(gm, tied={name_of(gm)})
    assert site.heads == ()
    rotate.apply(gm, site)
    torch.testing.assert_close(gm(torch.tensor([[3, 2, 0]]))[0], wanted, rtol=1e-5, atol=1e-5)


def test_records_of_the_version_before() -> None:
    """They name no heads."""
    record = {
        "name": "rotate",
        "readers": [],
        "writers": [{"weight": "w", "axis": 0}],
        "size": 8,
        "block": 8,
        "seed": 0,
    }
    assert rotate.Site.from_record(record).heads == () and rotations([record]) == {}
    with pytest.raises(ValueError, match="cannot be read"):
        rotate.Site.from_record({key: value for key, value in record.items() if key != "seed"})


# ---- negative controls


def test_negative_control_the_gain_is_forgotten() -> None:
    case = tied()
    _, live, _ = rotated(case)
    gain = live.get_submodule(HEAD)._buffers["gain"]
    assert gain is not None
    plain = copy.deepcopy(live)
    assert case.error(plain) > 0.05, "the gain left out"
    live.get_submodule(HEAD).register_forward_pre_hook(lambda _, args: (args[0] * gain,))
    assert case.error(live) > 0.05, "the gain in the rotated basis"


def test_negative_control_the_head_is_no_part_of_the_site() -> None:
    """The norm then keeps its weight, and scales rotated channels."""
    case = tied()
    gm, _ = folded(case)
    (site,), _ = rotate.find(gm, tied={HEAD})
    rotate.apply(gm, dataclasses.replace(site, heads=(), norms=()))
    assert case.error(gm) > 0.05


# ---- refusals: what cannot stay tied


def refused(forward: Any, **more: Any) -> str:
    torch.manual_seed(0)
    parts = {"embed": nn.Embedding(5, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "norm": nn.RMSNorm(8)}
    gm = cleaned(Function(forward, **parts | more), torch.tensor([[0, 1, 4]]))
    found, notes = _stream.find(gm, tied={name_of(gm)})
    assert [stream for stream in found if stream.heads] == []
    return " ".join(note.reason for note in notes)


def grown(own: Any, ids: Tensor) -> Tensor:
    x = own.embed(ids)
    y: Tensor = x + own.down(own.up(x).relu())
    return y


def test_a_norm_that_another_linear_reads_too() -> None:
    def forward(own: Any, ids: Tensor) -> Any:
        n = own.norm(grown(own, ids))
        return nn.functional.linear(n, own.embed.weight), own.second(n)

    assert "is not all that the norm" in refused(forward, second=nn.Linear(8, 2))


def test_a_norm_with_a_bias_beside_it() -> None:
    def forward(own: Any, ids: Tensor) -> Any:
        return nn.functional.linear(own.norm(grown(own, ids)) + own.shift, own.embed.weight)

    assert "is not all that the norm" in refused(forward, shift=torch.ones(8))


def test_a_head_that_is_called_behind_two_norms() -> None:
    def forward(own: Any, ids: Tensor) -> Any:
        x = grown(own, ids)
        return sum(nn.functional.linear(norm(x), own.embed.weight) for norm in (own.norm, own.other))

    assert "behind another norm" in refused(forward, other=nn.RMSNorm(8))


def test_a_head_that_reads_something_else() -> None:
    def forward(own: Any, ids: Tensor) -> Any:
        x = grown(own, ids)
        return nn.functional.linear(own.other(own.norm(x)), own.embed.weight)

    assert "shares a table of another stream" in refused(forward, other=nn.Linear(8, 8))


def test_layer_norms_are_not_centred_with_a_tied_table() -> None:
    """The mean is taken out of the table, which the head needs whole."""
    gm, _ = folded(zoo("gpt2"))
    found, refusals = rotate.find(gm, tied={HEAD})
    assert found == [] and "not centred" in refusals[0].reason
    assert all(site.writers == () for site in centre.find(gm)[0])
