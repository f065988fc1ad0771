"""torch.compile(backend="qfx"): several graphs, their names, and what runs in torch all the same: nothing is unseen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import Note, QfxWarning, UnsupportedError
from qfx.measuring.measure import sqnr_db
from tests.qfx.conftest import Counts
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # said of every weight-only linear, and tested in tests/qfx/test_compile.py
    pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them"),
]

FIRST_FOUR: Any = {"rules": [{"target": "linear", "w": "i8/ch"}, {"target": "blocks.0.up", "w": "i4/g16"}]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        torch._dynamo.graph_break()
        out: Tensor = self.down(torch.relu(x))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.blocks[0](x)
        x = self.blocks[1](x) + self.blocks[2](x)
        out: Tensor = self.head(x)
        return out


NAMES = ["stem", *(f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")), "head"]


@torch.no_grad()
def test_every_graph_is_quantized_and_reported_under_the_names_of_the_model() -> None:
    model, x = Net(), torch.randn(5, 16)
    fast = torch.compile(model, backend="qfx", options={"recipe": FIRST_FOUR, "strict": True})
    found = fast(x)
    assert 10 < sqnr_db(model(x), found) < 40
    report = qfx.report(fast)
    assert report.graphs > 3
    asked = {row.node: row.asked for row in report}
    assert asked == {name: "w=i4/g16" if name == "blocks.0.up" else "w=i8/ch" for name in NAMES}
    assert all(row.quantized and row.kernel for row in report)


@torch.no_grad()
def test_a_plan_reaches_graphs_of_sub_modules() -> None:
    whole, x = Net(), torch.randn(64, 16)
    plan = qfx.Plan(recipe=qfx.Recipe.parse("w8a8"), annotations={n: {"w": "i8/ch"} for n in NAMES if "up" not in n})
    options: Any = {"plan": plan}
    fast = torch.compile(whole, backend="qfx", options=options)
    fast(x)
    asked = {row.node: row.asked for row in qfx.report(fast)}
    assert asked == {name: "" if "up" in name else "w=i8/ch" for name in NAMES}


@torch.no_grad()
def test_a_plan_for_another_model_is_told() -> None:
    plan = qfx.Plan(recipe=qfx.Recipe.parse("w8a8"), annotations={"stem": {"w": "i8/ch"}, "trunk": {"w": "i8/ch"}})
    options: Any = {"plan": plan}
    fast, x = torch.compile(Net(), backend="qfx", options=options), torch.randn(2, 16)
    with pytest.warns(
        QfxWarning, match=r"plan: the plan gives formats to 1 name.*: trunk; next step: plan again"
    ) as said:
        fast(x)
    about = [w for w in said if "the plan gives formats" in str(w.message)]
    assert len(about) == 1, "not for every graph of the model"
    torch._dynamo.reset()
    strict: Any = {"plan": plan, "strict": True}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="trunk"):
        torch.compile(Net(), backend="qfx", options=strict)(x)


@torch.no_grad()
def test_names_do_not_depend_on_how_the_model_was_given() -> None:
    model, x = Net(), torch.randn(5, 16)
    holder = nn.ModuleDict({"inner": model}).eval()
    ways: list[Callable[[], Callable[..., Tensor]]] = [
        lambda: torch.compile(model, backend="qfx"),
        lambda: torch.compile(model.forward, backend="qfx"),
        lambda: torch.compile(holder["inner"].__call__, backend="qfx"),
    ]
    for way in ways:
        torch._dynamo.reset()
        fast = way()
        fast(x)
        for asked_of in (fast, model):
            assert sorted(row.node for row in qfx.report(asked_of)) == sorted(NAMES)
        assert sorted(row.node for row in qfx.report(holder)) == sorted(f"inner.{name}" for name in NAMES)
    torch._dynamo.reset()
    model.compile(backend="qfx")
    model(x)
    assert sorted(row.node for row in qfx.report(model)) == sorted(NAMES)


@torch.no_grad()
def test_a_function_of_two_models() -> None:
    first, second = nn.Sequential(nn.Linear(16, 16)).eval(), nn.Sequential(nn.Linear(16, 16)).eval()

    def both(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        y = a(x)
        torch._dynamo.graph_break()
        out: Tensor = b(y) + a(y)
        return out

    fast, x = torch.compile(both, backend="qfx", options={"strict": True}), torch.randn(3, 16)
    assert sqnr_db(both(first, second, x), fast(first, second, x)) > 25
    report = qfx.report(fast)
    assert report.title == "both" and report.graphs == 2
    assert {row.node for row in report} == {"0", "a.0", "b.0"}
    for model in (first, second):
        assert [(row.node, row.quantized) for row in qfx.report(model)] == [("0", True)]


@torch.no_grad()
def test_a_model_in_a_closure_and_in_a_container() -> None:
    models, x = {"m": nn.Sequential(nn.Linear(16, 16)).eval()}, torch.randn(3, 16)
    fast = torch.compile(lambda x: models["m"](x) * 2, backend="qfx", options={"strict": True})
    assert sqnr_db(models["m"](x) * 2, fast(x)) > 25
    assert [row.node for row in qfx.report(fast)] == ["0"] == [row.node for row in qfx.report(models["m"])]


def test_a_module_that_keeps_state_is_quantized() -> None:
    """As those of sentence-transformers do: Dynamo finds its sub-modules by way of __dict__."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.block = 0, nn.Sequential(nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Any:
            self.size = x.shape[0]
            return self.block(x)

    model = nn.Sequential(nn.Linear(16, 16), Keeping()).eval()
    compiled: Any = torch.compile(model, backend="qfx", options={"strict": True})
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert 30 < sqnr_db(model(x), compiled(x)) < 60
    assert [(r.node, r.asked != "") for r in qfx.report(compiled).rows] == [("0", True), ("1.block.0", True)]


@torch.no_grad()
def test_a_layer_excluded_from_compilation_is_named() -> None:
    class Excluding(Net):
        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def skipped(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks[1](x)
            return out

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.skipped(self.blocks[0](self.stem(x)))
            return out

    model, x = Excluding(), torch.randn(3, 16)
    model.blocks[0].forward = torch._dynamo.disable(model.blocks[0].forward)
    fast = torch.compile(model, backend="qfx")
    assert sqnr_db(model(x), fast(x)) > 25
    rows = {row.node: row for row in qfx.report(fast)}
    assert rows["stem"].quantized
    for name in ("blocks.0.up", "blocks.0.down"):
        assert rows[name].reason == "blocks.0 is excluded from compilation (torch._dynamo.disable): runs in torch"
    for name in ("blocks.1.up", "blocks.2.down", "head"):
        assert rows[name].reason == "in no compiled graph: runs in torch" and not rows[name].quantized
    assert qfx.report(fast).totals["weight_coverage"] < 0.2


class Numbered(nn.Module):
    """A layer whose code is compiled for each number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.fc, self.number = nn.Linear(8, 8), number

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out: Tensor = self.fc(x) + self.number**2
        return out


@torch.no_grad()
def test_layers_beyond_the_recompile_limit_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(*(Numbered(i) for i in range(5))).eval(), torch.randn(3, 8)
    with torch._dynamo.config.patch(recompile_limit=3):
        for layer in model:
            layer.compile(backend="qfx", dynamic=False)
        assert sqnr_db(nn.Sequential(*model)(x), model(x)) > 25
        report = qfx.report(model)
    rows = {row.node: row for row in report}
    slow = [name for name, row in rows.items() if not row.quantized]
    assert len(rows) == 5 and slow, "some layers run in torch"
    assert all("recompile limit" in rows[name].reason and "runs in torch" in rows[name].reason for name in slow)
    note = next(note for note in report.notes if "recompile limit" in note.reason)
    assert "calls that need one more version run in torch" in note.reason
    assert "torch._dynamo.config.recompile_limit" in note.next_step


@torch.no_grad()
def test_shapes_beyond_the_recompile_limit_are_told() -> None:
    model = Net()
    fast = torch.compile(model, backend="qfx", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch in (2, 3, 4, 5):
            x = torch.randn(batch, 16)
            assert sqnr_db(model(x), fast(x)) > 20
        notes = qfx.report(fast).notes
    assert any("its recompile limit: calls that need one more version run in torch" in note.reason for note in notes)


@torch.no_grad()
def test_a_graph_without_weights_is_counted() -> None:
    fast = torch.compile(nn.GELU().eval(), backend="qfx")
    fast(torch.randn(3))
    report = qfx.report(fast)
    assert report.graphs == 1 and report.rows == () and report.totals["work_coverage"] == 0


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("no such kernel\n  next step: buy one")

    monkeypatch.setattr(qfx.compile, "lower", refuse)


@torch.no_grad()
def test_a_graph_that_cannot_be_lowered_runs_untouched_with_a_warning(broken: None) -> None:
    model, x = Net(), torch.randn(5, 16)
    model.forward = lambda x: model.head(model.stem(x))  # type: ignore[method-assign]
    fast = torch.compile(model, backend="qfx")
    with pytest.warns(QfxWarning) as said:
        assert torch.equal(fast(x), model(x))
    assert len(said) == 1
    text = str(said[0].message)
    assert "runs in torch, not quantized: UnsupportedError: no such kernel" in text
    assert "next step: " in text and "strict=True turns this into an error" in text
    assert torch.equal(fast(x.repeat(2, 1)), model(x.repeat(2, 1))), "said once for all shapes"
    report = qfx.report(fast)
    reason = "its graph could not be had, runs in torch: UnsupportedError: no such kernel"
    assert {row.node: row.reason for row in report if not row.node.startswith("blocks")} == {
        "stem": reason,
        "head": reason,
    }
    assert report.totals["linear_quantized"] == 0
    assert any("no such kernel" in note.reason for note in report.notes)


def test_gradients_of_an_untouched_graph_are_not_detached(broken: None) -> None:
    model = nn.Linear(4, 4).eval()
    with pytest.warns(QfxWarning, match="no such kernel") as said:
        assert torch.compile(model, backend="qfx")(torch.randn(2, 4)).requires_grad
    assert len(said) == 1


@torch.no_grad()
def test_under_strict_a_graph_that_cannot_be_lowered_is_an_error(broken: None) -> None:
    fast = torch.compile(nn.Linear(4, 4).eval(), backend="qfx", options={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such kernel") as refused:
        fast(torch.randn(2, 4))
    assert isinstance(refused.value.inner_exception, UnsupportedError)


@torch.no_grad()
def test_a_graph_that_cannot_be_captured_runs_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("torch changed its mind")

    monkeypatch.setattr("qfx.compiled.template.capture_dynamo", refuse)
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    fast = torch.compile(model, backend="qfx")
    with pytest.warns(QfxWarning, match="RuntimeError: torch changed its mind"):
        assert torch.equal(fast(x), model(x))
    model.weight.mul_(2)
    assert torch.equal(fast(x), model(x))
    assert "torch changed its mind" in qfx.report(fast).rows[0].reason


@torch.no_grad()
def test_weights_that_are_no_numbers_are_an_error() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    fast = torch.compile(model, backend="qfx")
    fast(x)
    model.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="weight"):
        fast(x)


@pytest.fixture
def own_operator() -> Iterator[Callable[[Tensor], Tensor]]:
    library = torch.library.Library("qfx_test_door", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("qfx_test_door::twice", torch.empty_like, lib=library)
    yield torch.ops.qfx_test_door.twice.default
    library._destroy()


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * 3 + weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 3, None


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", ["function with a gradient of its own", "nested region"])
@pytest.mark.filterwarnings("ignore:.*gradients are enabled")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_a_part_that_torch_wraps_is_inlined(kind: str, enabled: bool) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "nested region":
                region = torch.compiler.nested_compile_region(lambda y: self.a(y).relu())
                return self.b(region(region(x)))  # type: ignore[no-any-return]
            return self.b(Tripled.apply(self.a(x), self.a.weight))  # type: ignore[no-any-return, no-untyped-call]

    model, x = Parts().eval(), torch.randn(4, 32)
    fast = torch.compile(model, backend="qfx", options={"strict": True})
    with torch.set_grad_enabled(enabled):
        assert 30 < sqnr_db(model(x).detach(), fast(x)) < 60
    assert qfx.report(fast).totals["linear_quantized"] == 2 and not qfx.report(fast).notes


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*values are computed in float32")
def test_what_leaves_autocast_has_the_types_that_torch_gives_it() -> None:
    class Angles(nn.Module):
        """As RoPE of transformers: its angles are exact in float32 only."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.rates = nn.Buffer(torch.rand(16))

        def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", enabled=False):
                angles = self.rates[None, :, None] @ positions[:, None]
            return self.fc(x), angles

    model = Angles().eval()
    fast = torch.compile(model, backend="qfx")
    inputs = torch.randn(3, 16), torch.arange(4001.0, 4004.0)[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = model(*inputs), fast(*inputs)
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [torch.bfloat16, torch.float32]
    assert sqnr_db(expected[1], found[1]) > 100


@torch.no_grad()
def test_an_operator_that_takes_a_function_is_named() -> None:
    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.nn.attention.flex_attention.flex_attention(y, y, y)

    model, x = Flex().eval(), torch.randn(1, 2, 16, 16)
    fast = torch.compile(model, backend="qfx")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        with pytest.warns(QfxWarning, match=r"operator 'flex_attention' takes a function(.|\n)*attn_implementation"):
            assert sqnr_db(model(x), fast(x)) > 100


@torch.no_grad()
def test_an_operator_that_changes_its_input_and_gives_nothing_runs_in_torch() -> None:
    @torch.library.custom_op("qfx_test_own::doubled", mutates_args=("x",))
    def doubled(x: Tensor) -> None:
        x.mul_(2)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            doubled(y)
            doubled(x)
            out: Tensor = self.b(y) + x
            return out

    model, x = Custom().eval(), torch.randn(3, 8)
    theirs, ours = x.clone(), x.clone()
    fast = torch.compile(model, backend="qfx")
    with pytest.warns(QfxWarning, match=r"runs in torch: no ONNX form for qfx_test_own.doubled.default"):
        assert sqnr_db(model(theirs), fast(ours)) > 25
    assert torch.equal(theirs, ours) and torch.equal(ours, 2 * x)
    assert qfx.report(fast).totals["linear_quantized"] == 2


@torch.no_grad()
def test_an_operator_without_onnx_form_runs_in_torch_and_is_told(own_operator: Callable[[Tensor], Tensor]) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(own_operator(self.a(x)))
            return out

    model, x = Custom().eval(), torch.randn(3, 8)
    fast = torch.compile(model, backend="qfx")
    with pytest.warns(
        QfxWarning, match=r"twice.*runs in torch.*test_compile_graphs.py:\d+, in forward.*next step: "
    ) as said:
        assert sqnr_db(model(x), fast(x)) > 25
    assert len(said) == 1 and said[0].filename == __file__
    report = qfx.report(fast)
    assert report.totals["linear_quantized"] == 2
    assert [note.node for note in report.notes] and isinstance(report.notes[0], Note)
    torch._dynamo.reset()
    strict = torch.compile(model, backend="qfx", options={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="qfx_test_door.twice") as refused:
        strict(x)
    assert isinstance(refused.value.inner_exception, UnsupportedError)


def test_a_report_of_what_was_never_compiled_is_refused() -> None:
    model = Net()
    for given in (model, torch.compile(model, backend="qfx"), torch.compile(lambda x: x, backend="qfx"), lambda x: x):
        with pytest.raises(
            ValueError, match="quantized or compiled, found neither; next step: call the compiled model"
        ):
            qfx.report(given)


class Spoken(nn.Module):
    """A recurrent layer before a linear, and a linear that another forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 8)})
        self.front = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner["head"](self.inner["lstm"](x)[0])
        return found


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_recurrent_layers_of_which_dynamo_asks_no_backend_are_told(alone: bool) -> None:
    model: nn.Module = nn.LSTM(8, 8) if alone else Spoken()
    name = "" if alone else r" \(inner.lstm\)"
    for compiled in (torch.compile(model.eval(), backend="qfx"), model):
        compiled(torch.randn(3, 2, 8))
        if not alone and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15):  # compiles what stands beside it
            rows = {row.node: row for row in qfx.report(compiled).rows}
            assert rows["inner.head"].quantized
            assert "unless torch._dynamo.config.allow_rnn" in rows["inner.lstm.weight_ih_l0"].reason
            continue
        with pytest.raises(
            ValueError, match=rf"given no graph .*\n  found: Dynamo .* nn.LSTM{name} unless .*allow_rnn"
        ):
            qfx.report(compiled)


@torch.no_grad()
def test_what_stands_beside_a_recurrent_layer_says_why_it_is_in_no_graph() -> None:
    model: Any = Spoken().eval()
    front: Any = torch.compile(model.front, backend="qfx")
    front(torch.randn(2, 8))
    rows = {row.node: row for row in qfx.report(model).rows}
    assert not rows["front.0"].reason
    for node in ("inner.head", "inner.lstm.weight_ih_l0"):
        assert rows[node].reason.startswith(
            "in no compiled graph: runs in torch; Dynamo compiles no function that calls"
        )


@torch.no_grad()
def test_recurrent_layers_that_dynamo_takes_run_and_are_told() -> None:
    model, x = Spoken().eval(), torch.randn(3, 2, 8)
    fast = torch.compile(model, backend="qfx")
    with torch._dynamo.config.patch(allow_rnn=True), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fast(x)
    assert sqnr_db(model(x), found) > 25
    assert any("lstm multiplies by a parameter" in str(one.message) for one in said)
    report = qfx.report(fast)
    assert next(row for row in report.rows if row.node == "inner.head").quantized
    assert any("no ONNX form for aten.lstm" in note.reason for note in report.notes)


@torch.no_grad()
def test_a_report_says_that_dynamo_gave_no_graph() -> None:
    """No backend is asked then, so that nothing can warn: the report is where it shows."""

    class Unseen(nn.Sequential):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:  # modules of torch.nn itself are unseen, too, before torch 2.14
            found: Tensor = self[0](x)
            return found

    called, x = Unseen(nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    called.compile(backend="qfx")
    called(x)
    with pytest.raises(ValueError, match="Dynamo gave qfx no graph.*graph_breaks.*Sequential"):
        qfx.report(called)
    with pytest.raises(ValueError, match="found neither") as refused:
        qfx.report(Net())
    assert "Dynamo" not in str(refused.value)


@torch.no_grad()
def test_a_quantized_model_can_be_compiled(counts: Counts) -> None:
    model, inputs = ZOO["bert"]()
    plain = model(**inputs).last_hidden_state
    quantized = qfx.quantize(model, "w8a8")
    fast = torch.compile(quantized, backend="qfx", options={"strict": True})
    assert sqnr_db(plain, fast(**inputs).last_hidden_state) > 20
    assert counts.graphs == 1
    report = qfx.report(fast)
    assert report.totals["weight_coverage"] == 1 and report.totals["linear_quantized"] == 13
    assert {row.asked for row in report if row.op == "linear"} == {"x=i8/tok w=i8/ch"}
