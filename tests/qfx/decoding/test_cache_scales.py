"""qfx.decoding.cache_scales: which formats a cache can have, and scales from what the model caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qfx.decoding.cache_scales import cache_formats, cache_scales
from qfx.format import Format
from tests.zoo import ZOO


@pytest.mark.parametrize("kv", ["i8", "i8/ch", {"k": "i8", "v": "i8/ch"}])
def test_a_text_or_one_for_each(kv: Any) -> None:
    assert cache_formats(kv) == {"k": Format.parse("i8/ch"), "v": Format.parse("i8/ch")}


def test_none_is_float() -> None:
    assert cache_formats(None) is None


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("i3", "next step: kv='i4'"),
        ("u8", "expected: i8 or i4"),
        ("i8/tok", "one fixed scale for each channel"),
        ("i4/g32", "one fixed scale for each channel"),
        ("i2", "(?s)no cache of keys in a file can have the format 'i2'.*kv='i4'; other formats: qfx.QuantizedCache"),
        ("fp8", "(?s)can have the format 'fp8'.*next step: kv='i8'"),
        ({"k": "i4", "v": "i2"}, "no cache of values in a file"),
        ({"k": ["i8", "i4"], "v": "i8"}, "(?s)keys in a file has one format for all heads.*kv='i8' or kv='i4'"),
        ("kv-k4v2", "(?s)kv='kv-k4v2' is a recipe.*recipe='kv-k4v2'"),
        ("f8e4m3", "next step: kv='i8'"),
        ("i9", "i9"),
        ({"k": "i8", "v": "i4"}, "keys and values of different types"),
        ({"k": "i8"}, "'i8', 'i4' or"),
        (8, "'i8', 'i4' or"),
    ],
)
def test_other_formats_are_refused(kv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_formats(kv)


def formats(kv: str) -> dict[str, Format]:
    found = cache_formats(kv)
    assert found is not None
    return found


def cached(model: Any, ids: torch.Tensor) -> list[Any]:
    with torch.no_grad():
        return list(model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scales_cover_what_the_model_caches(name: str) -> None:
    model: Any = ZOO[name]()[0]
    first, second = torch.arange(3, 17).reshape(2, 7), torch.arange(20, 30).reshape(1, 10)
    found = cache_scales(model, [first, {"input_ids": second}], formats("i8"))
    both = [cached(model, ids) for ids in (first, second)]
    for i, layer in enumerate(found):
        for what in ("key", "value"):
            values = torch.cat([getattr(one[i], f"{what}s").transpose(1, 2).flatten(0, 1) for one in both])
            assert torch.allclose(layer[what] * 127, values.abs().amax(0))
    assert len(found) == len(both[0])


def test_four_bits_clip_where_that_leaves_less_error() -> None:
    model: Any = ZOO["llama"]()[0]
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))
    fine, coarse = (cache_scales(model, [ids], formats(kv))[0]["key"] for kv in ("i8", "i4"))
    assert bool((coarse * 7 <= fine * 127 * 1.0001).all())
    assert bool((coarse * 7 < fine * 127 * 0.99).any())


def test_padding_does_not_count() -> None:
    model: Any = ZOO["llama"]()[0]
    ids = torch.arange(3, 17).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    found, short = (
        cache_scales(model, [batch], formats("i8"))
        for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :5]})
    )
    whole = cache_scales(model, [ids], formats("i8"))
    for one, other in zip(found, short, strict=True):
        assert torch.allclose(one["key"], other["key"], rtol=1e-4)
    assert not torch.allclose(found[0]["key"], whole[0]["key"], rtol=1e-4)


def test_labels_and_cache_flags_are_no_matter() -> None:
    model: Any = ZOO["llama"]()[0]
    ids = torch.arange(3, 17).reshape(2, 7)
    plain = cache_scales(model, [ids], formats("i8"))
    extra = cache_scales(model, [{"input_ids": ids, "labels": ids, "use_cache": False}], formats("i8"))
    assert all(torch.equal(a["value"], b["value"]) for a, b in zip(plain, extra, strict=True))


def test_data_that_is_none() -> None:
    with pytest.raises(ValueError, match="holds no batch"):
        cache_scales(ZOO["llama"]()[0], [], formats("i8"))


def test_values_that_are_not_finite() -> None:
    model: Any = ZOO["llama"]()[0]
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1, values"):
        cache_scales(model, [torch.arange(3, 17).reshape(2, 7)], formats("i8"))
