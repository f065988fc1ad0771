"""Kernels of the cache: built once, equal to torch's way, and done without where there is no compiler."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.kv import native
from qfx.kv.attend import attend
from qfx.kv.codes import Codes, encode
from qfx.kv.formats import cache_formats
from qfx.kv.store import Store
from tests.qfx.kv.test_attend import close, filled, random, reference

I8 = Format.parse("i8/tok/f16")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are looked for again during the test."""
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))


def test_they_are_built_once_beside_the_compiled_graphs(anew: None, cache_folder: Path) -> None:
    assert native.library() is not None
    (made,) = cache_folder.iterdir()
    stamp = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in cache_folder.iterdir()] == [stamp]


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", r"no C\+\+ compiler is there"), ("false", "cannot build them")]
)
def test_without_a_compiler_torch_does_it_and_one_warning_says_so(
    compiler: str, reason: str, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(QfxWarning, match=rf"(?s)slower: .*{reason}.*QFX_KERNELS=torch") as caught:
        view = filled("i4")
    q = random(2, 6, 1, 24)
    assert len(caught) == 1 and close(attend(q, view, None, 0.3), reference(q, view))


def test_torch_may_be_asked_for(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_KERNELS", "torch")
    x = random(1, 2, 3, 16)
    assert native.library() is None
    assert native.take((x, x), (x.clone(), x.clone())) is None
    assert not native.encode(x, Codes(I8, x, by_tokens=False), 0)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 70), exponent=st.integers(-42, 38), seed=st.integers(0, 99), ties=st.booleans())
def test_eight_bits_are_stored_bit_for_bit_as_torch_stores_them(
    width: int, exponent: int, seed: int, ties: bool
) -> None:
    x = random(2, 2, 3, width, seed=seed)
    x = ((x * 8).round() / 16 if ties else x) * 10.0**exponent
    x[0, 0, 1] = 0
    x = x.clamp(-3e38, 3e38)
    codes = Codes(I8, x, by_tokens=False)
    assert native.encode(x, codes, 0)
    data, params = encode(x, I8, by_tokens=False)
    assert params is not None
    assert torch.equal(codes.data[:, :, :3], data) and torch.equal(codes.scale[:, :, :3], params.scale)


def test_other_tensors_are_left_to_torch() -> None:
    x = random(1, 2, 3, 16)
    for other in (x.half(), x.transpose(2, 3)):
        assert native.take((other, other), (other.clone(), other.clone())) is None
        assert not native.encode(other, Codes(I8, other, by_tokens=False), 0)
    assert not native.encode(x, Codes(Format.parse("u8/tok/f16"), x, by_tokens=False), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), None])
def test_what_is_not_finite_is_seen(bad: float | None) -> None:
    x, y = random(2, 3, 40, 17).transpose(0, 1), random(2, 3, 40, 17).transpose(0, 1)
    if bad is not None:
        y[2, 1, 3, 16] = bad
    to = torch.zeros(2, 3, 2, 50, 17)
    fine = native.take((x, y), (to[0, :, :, 5:45], to[1, :, :, 5:45]))
    assert fine is (bad is None)
    if fine:
        assert torch.equal(to[0, :, :, 5:45], x) and not to[:, :, :, :5].any() and not to[:, :, :, 45:].any()


@pytest.mark.parametrize("kv", ["i8", "i3", {"k": ["i8", "i4", "i8"], "v": ["i4", "i4", "i4"]}], ids=str)
def test_threads_share_heads_and_tokens(kv: Any) -> None:
    threads = torch.get_num_threads()
    view, q = filled(kv, 700, batch=1), random(1, 6, 2, 24)
    try:
        found = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(native.attend(q.view(1, 3, 2, 2, 24), view, None, 0.3))
    finally:
        torch.set_num_threads(threads)
    first, *others = found
    assert first is not None
    assert all(other is not None and close(other, first, 3e-6) for other in others)


@pytest.mark.parametrize("kv", ["i8", "fp8", "i4"])
def test_the_default_device_of_torch_does_not_matter(kv: str) -> None:
    view, q = filled(kv), random(2, 6, 1, 24)
    expected = attend(q, view, None, 0.3)
    native._table.cache_clear()
    with torch.device("meta"):  # of a user who has a GPU it may be that
        found = attend(q, view, None, 0.3)
    assert torch.equal(found, expected)


def test_what_is_not_a_number_stays_none() -> None:
    view, q = filled("i8"), random(2, 6, 1, 24)
    q[1, 3, 0, 2] = float("nan")
    out = attend(q, view, None, 0.3)
    assert out[1, 3].isnan().all() and not out[0].isnan().any() and not out[1, :3].isnan().any()
    bias = torch.zeros(150)
    bias[7] = float("nan")
    assert attend(random(2, 6, 1, 24), view, bias, 0.3).isnan().all()


def test_large_scores_do_not_overflow() -> None:
    view, q = filled("i8"), random(2, 6, 1, 24) * 1e4
    out = attend(q, view, None, 1.0)
    assert out.isfinite().all() and out.abs().max() < 10


def test_copies_of_codes_have_their_own_memory() -> None:
    view, q = filled("i4", 200), random(2, 6, 1, 24)
    expected = attend(q, view, None, 0.3)
    assert all(codes.native is not None for part in view.parts for codes in (part.keys, part.values))
    copies = [copy.deepcopy(view), pickle.loads(pickle.dumps(view))]
    for part in view.parts:
        part.keys.data.zero_()
    assert all(torch.equal(attend(q, other, None, 0.3), expected) for other in copies)
    assert not torch.equal(attend(q, view, None, 0.3), expected)


@pytest.mark.parametrize("shape", [(4, 6, 1, 24), (2, 6, 1, 48), (2, 4, 1, 12), (2, 9, 2, 16)], ids=str)
def test_queries_of_other_sizes_are_refused_as_torch_refuses_them(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="Expected size for first two dimensions of batch2 tensor"):
        attend(random(*shape), filled("i8"), None, 0.3)


@pytest.mark.parametrize("kv", ["i8", "fp8"])
def test_small_numbers_count_where_the_process_flushes_subnormal_ones(kv: str) -> None:
    x, q = random(2, 3, 150, 24) * 10.0 ** torch.linspace(-6, -2, 24), random(2, 6, 1, 24)
    store = Store(cache_formats(kv, 1)[0], x, x, where="layer 0")
    store.append(x, x)
    view = store.view()
    expected = attend(q, view, None, 0.3)
    try:
        torch.set_flush_denormal(True)
        found = attend(q, view, None, 0.3)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)
