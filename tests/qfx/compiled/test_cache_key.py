"""Keys: equal for the same graph, different for whatever results could depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from qfx.compiled import cache_key
from qfx.compiled.cache_key import NoKeyError, digests, environment, key_of
from qfx.names import Translation
from qfx.options import Options
from qfx.plan import Plan
from qfx.recipe import Recipe


def add(scale: Any = 2, target: Any = torch.add, swap: bool = False) -> fx.GraphModule:
    """x + y * scale and so on, as a graph of Dynamo's."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(target, (y, x) if swap else (x, y), {"alpha": scale}),))
    return fx.GraphModule(nn.Module(), graph)


FAKES = {"x": torch.empty(2, 3), "y": torch.empty(2, 3)}
ARGS = (torch.ones(2, 3), torch.ones(2, 3))


def key(gm: fx.GraphModule | None = None, args: Any = ARGS, fakes: Any = None, **changed: Any) -> str:
    options = changed.pop("options", None)
    given: dict[str, Any] = {
        "statics": {1: "w"},
        "live": (),
        "translation": Translation(),
        "packed": False,
        "example": lambda node: (fakes or FAKES)[node.name],
        "source": lambda node: f"L['{node.name}']",
    } | changed
    return key_of(add() if gm is None else gm, args, Options.parse(options), **given)


def test_the_same_graph_has_the_same_key() -> None:
    assert key() == key() and len(key()) == 64
    assert key(args=(torch.zeros(2, 3), ARGS[1])) == key(), "values of inputs are no part of it"


def _with_meta(name: str, value: Any) -> fx.GraphModule:
    gm = add()
    next(n for n in gm.graph.nodes if n.op == "call_function").meta[name] = value
    return gm


def _weight(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.ones(2, 3, dtype=changes.get("dtype"))
    if "at" in changes:
        weight[1, 2] = 1.0000001
    return ARGS[0], weight


@pytest.mark.parametrize(
    "other",
    [
        {"gm": add(scale=3)},
        {"gm": add(scale=2.0)},
        {"gm": add(scale=True)},
        {"gm": add(target=torch.sub)},
        {"gm": add(swap=True)},
        {"gm": _with_meta("stack_trace", 'File "a.py", line 3')},
        {"gm": _with_meta("nn_module_stack", {"1": ("L['self'].fc", nn.Linear)})},
        {"args": _weight(at=1)},
        {"args": _weight(dtype=torch.float64)},
        {"args": (ARGS[0], torch.ones(3, 2).t())},
        {"fakes": {**FAKES, "x": torch.empty(2, 4)}},
        {"fakes": {**FAKES, "x": torch.empty(2, 3, dtype=torch.float16)}},
        {"fakes": {**FAKES, "x": torch.empty(3, 2).t()}},
        {"statics": {1: "v"}},
        {"statics": {0: "w"}},
        {"live": (1,)},
        {"packed": True},
        {"translation": Translation((("", "layers.3"),))},
        {"source": lambda _: "L['self']"},
        {"options": {"recipe": "w4a16"}},
        {"options": {"recipe": "w8a8"}},
        {"options": {"strict": True}},
        {"options": {"backend": "onnx"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_differs_gives_another_key(other: dict[str, Any]) -> None:
    assert key(**other) != key()


def test_plans_count_with_their_tensors() -> None:
    plans = [Plan(recipe=Recipe.parse("w8a8")) for _ in range(3)]
    plans[1].tensors["fc/x_scale"] = torch.ones(1)
    plans[2].tensors["fc/x_scale"] = torch.ones(1) * 2
    assert len({key(options={"plan": plan}) for plan in plans}) == 3
    assert key(options={"plan": plans[1]}) == key(options={"plan": plans[1]})


def test_settings_of_torch_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    torch.set_default_dtype(torch.float64)
    try:
        assert key() != before
    finally:
        torch.set_default_dtype(torch.float32)
    assert key() == before


def test_the_environment_names_versions_sources_and_processor() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["qfx"]
    assert len(found["sources"]) == 64 and torch.backends.cpu.get_cpu_capability() in found["processor"]


def test_another_processor_gives_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = key(), dict(torch.cpu.get_capabilities())
    for name in ("avx512_vnni", "dot"):
        changed = {**real, name: not real.get(name, False)}
        environment.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "get_capabilities", lambda found=changed: found)
            assert key() != before
    environment.cache_clear()
    assert key() == before


def test_work_on_the_sources_gives_other_keys(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "compiled" / "cache_key.py"
    file.parent.mkdir()
    file.write_text("a = 1")
    monkeypatch.setattr(cache_key, "__file__", str(file))
    before = cache_key._sources()
    assert cache_key._sources() == before
    file.write_text("a = 12")
    assert cache_key._sources() != before


def own(x: torch.Tensor, y: torch.Tensor, alpha: int) -> torch.Tensor:
    return x + y * alpha


@pytest.mark.parametrize("target", [own, lambda x, y, alpha: x + y])
def test_functions_of_users_have_no_key(target: Any) -> None:
    with pytest.raises(NoKeyError, match="which is not torch's"):
        key(add(target=target))


def test_operators_of_others_have_no_key() -> None:
    with torch.library._scoped_library("qfxtest", "FRAGMENT") as library:
        library.define("f(Tensor x, Tensor y, *, int alpha) -> Tensor")
        with pytest.raises(NoKeyError, match=r"qfxtest\.f"):
            key(add(target=torch.ops.qfxtest.f.default))
        with pytest.raises(NoKeyError, match=r"qfxtest\.f"):
            key(add(target=torch.ops.qfxtest.f))


@pytest.mark.parametrize("value", [object(), {1, 2}, nn.Linear, b"1"])
def test_arguments_without_a_text_have_no_key(value: Any) -> None:
    with pytest.raises(NoKeyError, match="an argument of type"):
        cache_key._value([1, value], {})


def test_arguments_that_look_alike_are_told_apart() -> None:
    values = [
        1,
        1.0,
        True,
        "1",
        [1],
        (1,),
        {1: 1},
        slice(1),
        slice(None, None, 1),
        None,
        "None",
        ...,
        range(1),
        0.0,
        -0.0,
    ]
    texts = {json.dumps(cache_key._value(value, {})) for value in values}
    assert len(texts) == len(values)


def test_weights_of_other_kinds_have_no_key() -> None:
    with pytest.raises(NoKeyError, match="a weight on meta"):
        digests({0: torch.empty(2, device="meta")}, 1)
    with pytest.raises(NoKeyError, match="with layout"):
        digests({0: torch.eye(2).to_sparse()}, 1)
    with pytest.raises(NoKeyError, match="a weight of type _Odd"):
        digests({0: torch.ones(2).as_subclass(_Odd)}, 1)


class _Odd(torch.Tensor):
    """A kind of tensor that qfx does not know."""


def test_constants_of_the_graph_count() -> None:
    def graph_of(value: torch.Tensor) -> fx.GraphModule:
        gm = add()
        gm.register_buffer("constant", value)
        with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "call_function")):
            gm.graph.get_attr("constant")
        return gm

    one, same, other = (key(graph_of(t)) for t in (torch.ones(3), torch.ones(3), torch.zeros(3)))
    assert one == same != other


@pytest.mark.parametrize("threads", [1, 3])
def test_digests_are_those_of_the_bytes(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_key, "_PART", 100)
    tensor = torch.arange(90, dtype=torch.int16).reshape(9, 10)
    raw = tensor.numpy().tobytes()
    want = [hashlib.sha256(raw[i : i + 100]).hexdigest() for i in range(0, 180, 100)]
    assert digests({7: tensor}, threads) == [[7, 7, "torch.int16", [9, 10], [10, 1], want]]
    assert digests({0: torch.empty(0)}, threads)[0][-1] == []
    turned = digests({0: tensor.t()}, threads)[0]
    assert turned[3:5] == [[10, 9], [1, 10]] and turned[-1] != want


def test_tied_tensors_say_so_and_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    digest = cache_key._digest

    def counted(part: memoryview) -> str:
        read.append(1)
        return digest(part)

    monkeypatch.setattr(cache_key, "_digest", counted)
    tensor = torch.ones(4)
    found = digests({3: tensor, 5: tensor.detach(), 6: tensor.clone()}, 1)
    assert [(i, same) for i, same, *_ in found] == [(3, 3), (5, 3), (6, 6)] and len(read) == 2


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]), st.integers(0, 63))
def test_every_bit_of_a_weight_counts(dtype: torch.dtype, at: int) -> None:
    tensor = torch.zeros(64, dtype=torch.uint8).view(dtype)
    before = digests({0: tensor}, 1)
    tensor.view(torch.uint8)[at] ^= 1
    assert digests({0: tensor}, 1) != before
