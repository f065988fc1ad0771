"""Calls that look like earlier ones: they give what they would give if everything were found out anew."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor import config
from torch.utils._pytree import tree_flatten

from qfx.backends.triton import device, launch, library, repeated, tuning
from qfx.ops import library as ops
from tests.backends.triton.cases import DEVICE, INTERPRETED
from tests.backends.triton.every_op import CALLS, OPS, floats

pytestmark = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="what is carried out is not repeated")


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(x_ptr, y_ptr, n, factor, block: tl.constexpr, more: tl.constexpr = 0):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n) * factor + more, mask=at < n)


def _start(x: Tensor, y: Tensor, factor: float, **more: int) -> None:
    launch.launch(_scaled, (1,), x, y, x.numel(), factor, block=64, config={"num_warps": 1}, **more)


class Counted:
    """An op, registered as those of the backend are. found_out: how often it was found out what it does."""

    def __init__(self, does: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.found_out = 0

        def run(*given: Any) -> Any:
            self.found_out += 1
            return does(*given)

        with monkeypatch.context() as patched:
            patched.setattr(ops, "define", lambda _, kernel, *__, **___: setattr(self, "call", kernel))
            library.define("op", run, does)

    def __call__(self, *given: Any) -> Any:
        with torch.no_grad():
            return self.call(*given)  # type: ignore[attr-defined]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Counted]:
    return lambda does: Counted(does, monkeypatch)


def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _start(x, y, factor)
    return y


def _flat(x: Any) -> list[Tensor]:
    return [t.view(torch.uint8) if t.itemsize == 1 else t for t in tree_flatten(x)[0] if isinstance(t, Tensor)]


@pytest.mark.parametrize(("name", "given"), CALLS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CALLS)])
def test_the_third_call_gives_what_the_first_would(name: str, given: Callable[[], tuple[Any, ...]]) -> None:
    run = getattr(OPS, name).default
    for _ in range(2):
        run(*given())
    call = given()
    known = list(repeated._KNOWN.values())
    changed, expected_changed = copy.deepcopy(call), copy.deepcopy(call)
    found = run(*changed)
    assert list(repeated._KNOWN.values()) == known
    repeated.forget()
    expected = run(*expected_changed)
    for ours, theirs in ((found, expected), (changed, expected_changed)):
        assert [(t.shape, t.stride(), t.dtype) for t in _flat(ours)] == [
            (t.shape, t.stride(), t.dtype) for t in _flat(theirs)
        ]
        assert all(torch.equal(a, b) for a, b in zip(_flat(ours), _flat(theirs), strict=True))


def test_every_op_has_calls_that_are_repeated() -> None:
    found = set()
    for name, given in CALLS:
        call = given()
        repeated.forget()
        for _ in range(2):
            getattr(OPS, name).default(*call)
        (known,) = repeated._KNOWN.values()
        found |= {name} if isinstance(known, repeated._Call) else set()
    never = {"rounded_input"}  # torch's
    if INTERPRETED:
        never |= {"cache_append"}  # the host looks whether there is room
    assert {name for name, _ in CALLS} - found == never


def test_what_a_call_does_is_found_out_twice_for_all_that_look_alike(op: Callable[..., Counted]) -> None:
    counted = op(scaled)
    for _ in range(4):
        x = floats(40)
        assert torch.equal(counted(x), x * 2)
    assert counted.found_out == 2
    others = (floats(41), floats(5, 8), floats(40, dtype=torch.float32), floats(48)[1:41], floats(80)[::2])
    for number, x in enumerate(others):
        for _ in range(3):
            counted(x)
        assert counted.found_out == 2 * (2 + number)
    x = floats(40)
    assert torch.equal(counted(x, 3.0), x * 3)
    assert counted.found_out == 2 * (1 + len(others)) + 1


def test_a_call_that_is_known_leaves_earlier_results_alone(op: Callable[..., Counted]) -> None:
    counted = op(scaled)
    counted(floats(40))
    first, x, y = counted(floats(40)), floats(40), floats(40)
    kept = first.clone()
    results = counted(x), counted(y)
    assert torch.equal(first, kept)
    assert torch.equal(results[0], x * 2)
    assert torch.equal(results[1], y * 2)


def _two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return scaled(x, 3.0), scaled(y)


def _listed(x: Tensor, y: Tensor) -> list[Tensor]:
    return [scaled(y), scaled(x)]


def _reshaped(x: Tensor) -> Tensor:
    return scaled(x.reshape(-1)).view(4, 10)


def _twice(x: Tensor) -> Tensor:
    between = torch.empty_like(x)
    y = x.new_empty(x.shape)
    _start(x, between, 2.0, more=1)
    _start(between, y, 2.0)
    return y


def _in_lists(x: Tensor, more: list[Tensor | None], w: tuple[Tensor, ...]) -> Tensor:
    assert more[1] is None
    _start(w[0], x, 2.0)
    assert more[0] is not None
    return scaled(more[0])


def _in_place(x: Tensor, y: Tensor) -> None:
    _start(x, y, 2.0)


@pytest.mark.parametrize(
    ("does", "given"),
    [
        (_two, lambda: (floats(40), floats(40))),
        (_listed, lambda: (floats(40), floats(30))),
        (_reshaped, lambda: (floats(5, 8),)),
        (_twice, lambda: (floats(40),)),
        (_in_lists, lambda: (floats(40), [floats(40), None], (floats(40),))),
        (_in_place, lambda: (floats(40), floats(40))),
    ],
)
def test_kinds_of_arguments_and_results(
    op: Callable[..., Counted], does: Callable[..., Any], given: Callable[[], tuple[Any, ...]]
) -> None:
    counted = op(does)
    for _ in range(2):
        counted(*given())
    call = given()
    same = copy.deepcopy(call)
    found, expected = counted(*call), does(*same)
    assert counted.found_out == 2
    assert type(found) is type(expected)
    for ours, theirs in ((found, expected), (call, same)):
        assert [t.shape for t in _flat(ours)] == [t.shape for t in _flat(theirs)]
        assert all(torch.equal(a, b) for a, b in zip(_flat(ours), _flat(theirs), strict=True))


def _computed(x: Tensor) -> Tensor:
    return scaled(x + 1)


def _after(x: Tensor) -> Tensor:
    return scaled(x).add_(1)


def _asked(x: Tensor) -> Tensor:
    return scaled(x, float(x[0]))


def _zeros(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    _start(x[:20], y, 2.0)
    return y


def _part(x: Tensor) -> Tensor:
    return scaled(x[20:])


def _part_of_result(x: Tensor) -> Tensor:
    return scaled(x)[:20]


_HELD = floats(40)


def _of_another(x: Tensor) -> Tensor:
    return scaled(_HELD) if x.numel() else x


def _one_for_two(x: Tensor) -> tuple[Tensor, Tensor]:
    y = scaled(x)
    return y, y.view(8, 5)


def _without_memory(x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        torch.empty(1 << 59, device=x.device)
    return scaled(x)


def _refused(x: Tensor) -> Tensor:
    y = scaled(x)
    with contextlib.suppress(TypeError):
        launch.launch(_scaled, (1,), x, y, block=64)  # arguments are missing
    return y


def _by_name(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    launch.launch(_scaled, (1,), x, y_ptr=y, n=40, factor=2.0, block=64, config={"num_warps": 1})
    return y


@pytest.mark.parametrize(
    "does",
    [
        _computed, _after, _asked, _zeros, _part, _part_of_result, _of_another, _one_for_two, _without_memory, _refused,
        _by_name,
    ],
)  # fmt: skip
def test_calls_that_do_more_are_carried_out_as_they_are(
    op: Callable[..., Counted], does: Callable[[Tensor], Any]
) -> None:
    counted = op(does)
    for count in range(1, 4):
        x = floats(40)
        found, expected = counted(x), does(x.clone())
        assert all(torch.equal(a, b) for a, b in zip(_flat(found), _flat(expected), strict=True))
        assert counted.found_out == count


def test_memory_on_another_device_is_taken_there_again(op: Callable[..., Counted]) -> None:
    counted = op(lambda x: (scaled(x), torch.empty(3, device="meta")))
    for _ in range(3):
        found = counted(floats(40))
        assert [t.device.type for t in found] == [DEVICE, "meta"]


def _seven_more(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _start(x, y, 2.0, more=7)  # compiled for no other test
    return y


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_what_a_hook_kept_from_being_started_is_not_repeated(
    op: Callable[..., Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = op(_seven_more)
    with monkeypatch.context() as patched:
        patched.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: True)
        for _ in range(2):
            counted(floats(40, dtype=torch.float32))
    for _ in range(3):
        x = floats(40, dtype=torch.float32)
        assert torch.equal(counted(x), x * 2 + 7)


def test_an_input_given_twice_is_not_taken_for_two(op: Callable[..., Counted]) -> None:
    counted = op(_two)
    x, y = floats(40), floats(40)
    for _ in range(2):
        counted(x, x)
    for one, other in ((x, y), (y, x)):
        found = counted(one, other)
        assert torch.equal(found[0], one * 3)
        assert torch.equal(found[1], other * 2)
    repeated.forget()
    for _ in range(2):
        counted(x, y)
    found = counted(x, x)
    assert torch.equal(found[0], x * 3)
    assert torch.equal(found[1], x * 2)


def test_early_launches_are_found_out_for_themselves(op: Callable[..., Counted]) -> None:
    counted = op(scaled)
    for on, due in ((False, 2), (True, 4), (False, 4), (True, 4)):
        with config.patch({"triton.enable_pdl": on}):
            for _ in range(3):
                counted(floats(40))
        assert counted.found_out == due


def test_choices_are_made_where_they_are_watched_or_tried(op: Callable[..., Counted], tmp_path: Path) -> None:
    counted = op(scaled)
    for _ in range(3):
        counted(floats(40))
    before = 2
    for within in (tuning.watched(), tuning.trying(("k", "p", "1"), {}), launch.recorded(device.H200)):
        with within:
            for _ in range(2):
                counted(floats(40))
        before += 2
        assert counted.found_out == before
    tuning.write(tmp_path, device.H200, {("k", "p", "1"): {"num_warps": 4}})
    counted(floats(40))
    assert counted.found_out == before + 1


def test_what_failed_is_not_remembered(op: Callable[..., Counted]) -> None:
    answers = iter((True, False, True))

    def does(x: Tensor) -> Tensor:
        y = scaled(x)
        if next(answers, False):
            raise ValueError("not now")
        return y

    counted = op(does)
    for fails in (True, False, True, False, False):
        x = floats(40)
        if fails:
            with pytest.raises(ValueError, match="not now"):
                counted(x)
        else:
            assert torch.equal(counted(x), x * 2)
        assert repeated._NOTES.get() is None
    assert counted.found_out == 4


def test_no_tensor_is_held(op: Callable[..., Counted]) -> None:
    counted = op(_twice)
    counted(floats(40))
    x = floats(40)
    held = weakref.ref(x), weakref.ref(counted(x))
    del x
    gc.collect()
    assert any(isinstance(known, repeated._Call) for known in repeated._KNOWN.values())
    assert [r() for r in held] == [None, None]


def test_only_so_many_calls_are_remembered(op: Callable[..., Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "_MOST", 2)
    counted = op(scaled)
    for n in (1, 2, 3, 4):
        counted(floats(n))
        assert len(repeated._KNOWN) <= 2
    x = floats(1)
    assert torch.equal(counted(x), x * 2)
    assert counted.found_out == 5


def test_it_knows_no_gradients(op: Callable[..., Counted]) -> None:
    counted = op(scaled)
    for _ in range(3):
        with torch.enable_grad():
            found = counted.call(floats(40).requires_grad_())  # type: ignore[attr-defined]
        assert not found.requires_grad
    assert counted.found_out == 2
