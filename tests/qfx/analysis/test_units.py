from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from qfx import Format
from qfx.analysis.units import KINDS, Unit, units, wholes
from tests.qfx.analysis.models import captured, causal, of_zoo, prepared

TINY = {"embedding": 1, "q": 2, "k": 1, "v": 1, "o": 2, "linear": 3, "lm_head": 1}


def test_the_parts_of_a_language_model() -> None:
    gm, _, _ = prepared()
    found, attentions, notes = units(gm)
    assert Counter(unit.kind for unit in found) == TINY and not notes and len(attentions) == 1
    by_name = {unit.name: unit for unit in found}
    name = "model.layers.0.self_attn"
    assert by_name[f"{name}.q_proj.q1"] == Unit(
        f"{name}.q_proj.q1", f"{name}.q_proj", "q", "model.layers.0", (16, 32), 0, 16, 32, 1, attentions[0].name
    )
    o = by_name[f"{name}.o_proj.o1"]
    assert (o.axis, o.start, o.stop, o.shape, o.elements) == (1, 16, 32, (32, 16), 512)
    assert by_name["lm_head"].kind == "lm_head" and by_name["lm_head"].layer == ""
    k = by_name[f"{name}.k_proj.k0"]
    assert (k.axis, k.start, k.stop, k.head) == (0, 0, 16, 0), "one key head is all rows"


@pytest.mark.parametrize("by", ["heads", "layers"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "phi3"])
def test_units_cover_every_weight_once(name: str, by: str) -> None:
    gm, _, _ = of_zoo(name)
    found, _, _ = units(gm, by=by)  # type: ignore[arg-type]
    assert len({unit.name for unit in found}) == len(found)
    assert {unit.kind for unit in found} <= set(KINDS)
    held: dict[str, int] = {}
    for unit in found:
        assert unit.elements == torch.Size(unit.shape).numel()
        held[unit.fqn] = held.get(unit.fqn, 0) + unit.elements
    own = dict(gm.named_parameters())
    for fqn, count in held.items():
        weight = own.get(f"{fqn}.weight", own.get(fqn))
        assert weight is not None and weight.numel() == count, fqn
    if by == "layers":
        assert all(unit.axis is None and unit.head is None for unit in found)


def test_bytes_are_those_of_the_format() -> None:
    """A head of 16 channels in groups of 64 is padded; rows are not."""
    fmt = Format.parse("u4/g64/f16")
    gm, _, _ = prepared()
    by_kind = {unit.kind: unit for unit in units(gm)[0]}
    assert by_kind["q"].nbytes(fmt) == fmt.nbytes((16, 32))
    assert by_kind["o"].nbytes(fmt) == fmt.nbytes((32, 16)) > by_kind["o"].elements / 2


def test_a_tied_table_is_one_unit() -> None:
    gm, _, _ = prepared("tied")
    names = [unit.name for unit in units(gm)[0]]
    assert "model.embed_tokens" in names and "lm_head" not in names


def test_what_is_skipped_has_no_unit() -> None:
    gm, _, _ = prepared()
    found, _, _ = units(gm, skip=["lm_head", "model.layers.0.self_attn.q_proj"])
    assert Counter(unit.kind for unit in found) == {**{k: v for k, v in TINY.items() if k not in ("q", "lm_head")}}


class Odd(nn.Module):
    """Two heads of 8 whose keys stand behind 4 channels that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 20), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)[..., 4:]
        q, k, v = (y.view(*x.shape[:2], 2, 8).transpose(1, 2) for y in (self.q(x), k, self.v(x)))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_heads_that_are_no_equal_parts_stay_together() -> None:
    gm, _, _ = captured(Odd().eval(), [{"x": torch.randn(2, 5, 16)}])
    found, _, notes = units(gm)
    assert [unit.name for unit in found if unit.fqn == "k"] == ["k"]
    assert [unit.name for unit in found if unit.fqn == "v"] == ["v.v0", "v.v1"]
    (note,) = notes
    assert note.node == "k" and note.minor
    assert note.reason == "it has one format for all heads: the 20 channels do not fall into equal parts of 8"


def test_a_weight_of_two_attentions_is_cut_once() -> None:
    """One layer that is called twice, as ALBERT does."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
                x = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x

    gm, _, _ = captured(Twice().eval(), [{"x": torch.randn(2, 5, 16)}])
    found, attentions, notes = units(gm)
    assert len(attentions) == 2 and not notes
    assert Counter(unit.kind for unit in found) == {"q": 2, "k": 2, "v": 2, "o": 2}
    assert [unit.name for unit in found if unit.fqn == "qkv"] == [
        "qkv.q0", "qkv.q1", "qkv.k0", "qkv.k1", "qkv.v0", "qkv.v1",
    ]  # fmt: skip


def test_no_unit_for_what_no_operator_serves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]

    gm, _, _ = captured(Net().eval(), [{"x": torch.randn(2, 3, 6, 6)}])
    assert [unit.name for unit in units(gm)[0]] == ["head"]


def test_causal_models_of_the_helpers_are_seeded() -> None:
    a, b = (causal()[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_wholes_are_the_weights_that_heads_cut() -> None:
    gm, _, _ = prepared()
    heads, layers = units(gm)[0], units(gm, by="layers")[0]
    found = {unit.name: unit for unit in wholes(heads)}
    assert set(found) == {unit.fqn for unit in heads if unit.axis is not None} and found
    assert all(found[unit.name].shape == unit.shape for unit in layers if unit.name in found)
    assert wholes(layers) == []
