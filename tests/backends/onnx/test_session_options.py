"""Session options: what is refused, and the exact path of integer products on x86 without VNNI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import qfx
import qfx.onnx
from qfx import processor
from qfx.backends.onnx import lower
from qfx.backends.onnx.branch import every_node, subgraphs
from qfx.backends.onnx.kernels import optimized_graph
from qfx.backends.onnx.runner import Runner
from qfx.backends.onnx.session_options import (
    EXACT,
    FLOATS_KEY,
    INTEGERS_KEY,
    LEVEL,
    apart,
    checked,
    has_integer_products,
    options,
)
from qfx.capture import capture_export
from qfx.errors import QfxWarning
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe, Rule
from tests.backends.onnx.test_packed_attention import Attention, batch

NO_VNNI: dict[str, Any] = {"architecture": "x86_64", "avx2": True, "avx512_vnni": False, "avx_vnni": False}
ARM: dict[str, Any] = {"architecture": "arm64", "dot": True}
VNNI = NO_VNNI | {"avx512_vnni": True}
# Whether ONNX Runtime itself has the path (its builds for x86) and this processor has kernels of both kinds.
HERE_X86 = str(processor.capabilities().get("architecture", "")).startswith("x86") and "avx2" in (
    processor.instruction_sets()
)


class Shared(nn.Module):
    """Linears of which two share one weight, as layers that share their weights do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(96, 128), nn.Linear(128, 96)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., 96] -> [.., 96]."""
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return x


PER_TENSOR = Recipe(name="per-tensor", rules=(Rule(target="linear", x="u8/dyn", w="i8/ch"),))
X = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the processor is said to have."""
    return lambda found: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def lowered(recipe: Any) -> Any:
    gm = capture_export(Shared().eval(), (X,), {}).gm
    prepare(gm)
    apply_plan(gm, None, Recipe.parse(recipe))
    return lower(gm)


def opened(path: Path) -> Any:
    return qfx.onnx.load(path)


def notes_of(model: Any) -> list[str]:
    return [str(n) for n in model.notes if "VNNI" in n.reason]


@pytest.mark.parametrize(("found", "value"), [(NO_VNNI, "1"), (VNNI, None), (ARM, None)])
def test_the_option_is_set_where_it_is_needed(machine: Any, found: Any, value: str | None) -> None:
    machine(found)
    chosen = options(1)
    if value is None:
        with pytest.raises(RuntimeError, match="does not have configuration"):
            chosen.get_session_config_entry(EXACT)
    else:
        assert chosen.get_session_config_entry(EXACT) == value


@pytest.mark.skipif(not HERE_X86, reason="ONNX Runtime has the exact path in its builds for x86 only")
@pytest.mark.parametrize(
    ("recipe", "kernel"), [("w8a8", "MatMulIntegerToFloat"), (PER_TENSOR, "DynamicQuantizeMatMul")]
)
def test_onnx_runtime_takes_the_exact_path(machine: Any, recipe: Any, kernel: str) -> None:
    machine(VNNI)
    plain = lowered(recipe)
    want = plain(X)[0]
    assert notes_of(plain) == [] and _weights(plain, kernel) == [onnx.TensorProto.INT8] * 4
    assert _kernels(plain) == {f"{kernel} u8 x s8"}
    machine(NO_VNNI)
    exact = lowered(recipe)
    assert torch.equal(exact(X)[0], want), "where nothing overflows the integers are the same"
    assert _weights(exact, kernel) == [onnx.TensorProto.UINT8] * 4 and _kernels(exact) == {f"{kernel} u8 x u8"}
    (note,) = notes_of(exact)
    assert note.startswith("graph: ") and "exact but slower" in note and "next step: " in note
    assert exact.slow == [], "the note says it once"


def _kernels(model: Any) -> set[str]:
    return {kernel for name, kernel in model.kernels.items() if "linear" in name}


def _weights(model: Any, kernel: str) -> list[int]:
    """Element types of the weights of these kernels in the graph that ONNX Runtime made."""
    graph = optimized_graph(model.models[0])
    held = {t.name: t.data_type for t in graph.initializer}
    return [held[n.input[1]] for n in graph.node if n.op_type == kernel]


@pytest.mark.skipif(not HERE_X86, reason="ONNX Runtime has the exact path in its builds for x86 only")
def test_attentions_that_share_a_zero_point_take_it_too(machine: Any) -> None:
    machine(VNNI)
    model, x = nn.Sequential(Attention(), Attention()).eval(), batch()
    qfx.quantize(model, "w8a8-static", data=[(x,)])
    gm = capture_export(model, (x,), {}).gm
    prepare(gm)
    want = lower(gm)(x)[0]
    machine(NO_VNNI)
    exact = lower(gm)
    assert torch.equal(exact(x)[0], want) and exact.slow == []
    assert "QAttention u8 x u8, attention f32" in exact.kernels.values()


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16"])
def test_weight_only_kernels_need_nothing(machine: Any, recipe: str) -> None:
    machine(NO_VNNI)
    assert notes_of(lowered(recipe)) == []


def test_the_report_tells_it_once(machine: Any) -> None:
    machine(NO_VNNI)
    torch._dynamo.reset()
    compiled = torch.compile(Shared().eval().requires_grad_(False), backend="qfx")
    with pytest.warns(QfxWarning, match="no VNNI") as told:
        compiled(X)
    assert len([w for w in told if "VNNI" in str(w.message)]) == 1
    assert "no VNNI" in qfx.report(compiled).to_json()
    torch._dynamo.reset()


def test_strict_allows_what_is_exact(machine: Any) -> None:
    machine(NO_VNNI)
    torch._dynamo.reset()
    with pytest.warns(QfxWarning, match="no VNNI"), torch.no_grad():
        torch.compile(Shared().eval(), backend="qfx", options={"strict": True})(X)
    torch._dynamo.reset()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
@pytest.mark.parametrize(("recipe", "integers"), [("w8a8", True), ("w4a16", False), (None, False)])
def test_a_file_says_what_its_integers_need(tmp_path: Path, runtime: str, recipe: Any, integers: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        done = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx", recipe=recipe, runtime=runtime)
    metadata = qfx.onnx.check(done.path)
    assert (EXACT in metadata.get(INTEGERS_KEY, "")) == integers


def test_a_static_file_of_the_standard_says_it(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    done = qfx.export_onnx(Shared().eval(), (X,), target, recipe="w8a8-static", data=[X], runtime="standard")
    assert not {"MatMulInteger", "MatMulIntegerToFloat"} & {n.op_type for n in onnx.load(str(done.path)).graph.node}
    assert INTEGERS_KEY in qfx.onnx.check(done.path), "readers make products of integers of Q and DQ"


@pytest.mark.parametrize("fmt", ["i8/ch", "u4/g32", "i2/g16"])
def test_float_activations_of_a_standard_file_stay_floats(tmp_path: Path, fmt: str) -> None:
    recipe = Recipe(name="floats", rules=(Rule(target="linear", x="f32", w=fmt),))
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96)).eval(), tmp_path / "m.onnx"
    with pytest.warns(QfxWarning, match=f"m.onnx: float activations were asked; .* unless {LEVEL} is 1"):
        qfx.export_onnx(model, (X,), path, recipe=recipe, runtime="standard", strict=True)
    assert LEVEL in qfx.onnx.check(path)[FLOATS_KEY]
    want = qfx.quantize(model, recipe, [X])(X).detach()
    (y,) = opened(path)(input=X).values()
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    rounded: Any = qfx.onnx.load(path, session_options={LEVEL: "4"})
    (y,) = rounded(input=X).values()
    assert (y - want).norm() > 1e-3 * want.norm(), "what ONNX Runtime does where nothing is said"


@pytest.mark.parametrize(("runtime", "x"), [("onnxruntime", "f32"), ("standard", "i8/tok"), ("standard", None)])
def test_other_files_leave_the_level_alone(tmp_path: Path, runtime: str, x: str | None) -> None:
    recipe = Recipe(name="others", rules=(Rule(target="linear", x=x, w="i8/ch"),))
    done = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx", recipe=recipe, runtime=runtime)
    assert FLOATS_KEY not in qfx.onnx.check(done.path) and not any(LEVEL in str(note) for note in done.notes)


def test_a_file_takes_the_exact_path_and_says_so(tmp_path: Path, machine: Any) -> None:
    machine(VNNI)
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx", recipe="w8a8").path
    want = opened(path)(x=X)
    machine(NO_VNNI)
    with pytest.warns(QfxWarning, match=r"m\.onnx: this x86 processor has no VNNI"):
        runner = Runner(path)
    assert runner.session.get_session_options().get_session_config_entry(EXACT) == "1"
    if HERE_X86:
        assert all(torch.equal(value, want[name]) for name, value in runner.run({"x": X}).items())
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "f.onnx").path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qfx.onnx.load(path)


def test_options_reach_the_session(tmp_path: Path) -> None:
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx").path
    model: Any = qfx.onnx.load(path, threads=2, session_options={"session.intra_op.allow_spinning": "0"})
    found = model._runner.session.get_session_options()
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == "0" and found.intra_op_num_threads == 2


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"session.x64quantprecison": "1"}, rf"unknown session option .*did you mean '{EXACT}'"),
        ({"nothing": "1"}, "unknown session option 'nothing', valid: "),
        ({EXACT: 1}, "expected: '0' or '1'\n  found: 1"),
        ({EXACT: "yes"}, "found: 'yes'"),
        ([EXACT], "a mapping of names to values"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, given: Any, message: str) -> None:
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx").path
    with pytest.raises(ValueError, match=message):
        qfx.onnx.load(path, session_options=given)


def test_an_option_that_would_give_wrong_numbers_here_is_refused(machine: Any) -> None:
    machine(VNNI)
    assert checked({EXACT: "0"}) == {EXACT: "0"} and checked(None) == {}
    machine(NO_VNNI)
    with pytest.raises(ValueError, match=r"cannot be '0' on this processor(.|\n)*next step: leave it out"):
        checked({EXACT: "0"})


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_numbers_of_threads_are_checked(tmp_path: Path, threads: Any) -> None:
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx").path
    with pytest.raises(ValueError, match="the number of threads\n  expected: a positive int"):
        qfx.onnx.load(path, threads=threads)


@pytest.mark.skipif(not HERE_X86, reason="ONNX Runtime has the exact path in its builds for x86 only")
@pytest.mark.parametrize("external", [0, 1 << 30])
def test_weights_in_and_beside_a_file_are_found(tmp_path: Path, machine: Any, external: int) -> None:
    machine(VNNI)
    path = qfx.export_onnx(Shared().eval(), (X,), tmp_path / "m.onnx", recipe="w8a8", external_bytes=external).path
    assert (path.parent / "m.onnx.data").exists() == (not external)
    want = opened(path)(x=X)
    machine(NO_VNNI)
    with pytest.warns(QfxWarning, match="no VNNI"):
        found = opened(path)(x=X)
    assert all(torch.equal(value, want[name]) for name, value in found.items())


@pytest.mark.skipif(not HERE_X86, reason="ONNX Runtime has the exact path in its builds for x86 only")
@pytest.mark.parametrize("external", [0, 1 << 30])
def test_products_in_branches_take_it_too(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch, external: int
) -> None:
    """A file that reads prompts by integers has its products in one branch of an If."""
    machine(VNNI)
    x, given = torch.cat([X, X]), {"recipe": "w4a16", "prefill": "i8/tok", "external_bytes": external}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        path = qfx.export_onnx(Shared().eval(), (x,), tmp_path / "m.onnx", **given).path  # type: ignore[arg-type]
    want = opened(path)(x=x)
    machine(NO_VNNI)

    def saving(*args: Any) -> Any:
        chosen = options(*args)
        chosen.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return chosen

    monkeypatch.setattr("qfx.backends.onnx.runner.options", saving)
    with pytest.warns(QfxWarning, match="no VNNI"):
        found = opened(path)(x=x)
    assert all(torch.equal(value, want[name]) for name, value in found.items())
    graph = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph
    inner = [g for node in graph.node for g in subgraphs(node)]
    held = {t.name: t.data_type for g in [graph, *inner] for t in g.initializer}
    kinds = [held[n.input[1]] for n in every_node(graph.node) if n.op_type == "MatMulIntegerToFloat"]
    assert kinds == [onnx.TensorProto.UINT8] * 4


def test_products_that_share_a_weight_get_names_of_their_own() -> None:
    model = lowered("w8a8").models[0].model
    before = len(model.graph.initializer)
    names = [n.input[1] for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    repeated = apart(model.graph)
    after = [n.input[1] for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    if not processor.saturates():
        assert len(set(names)) == 2 and len(set(after)) == 4
        assert len(repeated) == 2 == len(model.graph.initializer) - before
        assert [repeated.get(name, name) for name in after] == names
    assert apart(model.graph) == {}, "nothing is left to do"


def test_what_counts_as_integer_products() -> None:
    nodes = {name: onnx.helper.make_node(name, ["a"], ["b"]) for name in ("QGemm", "QuantizeLinear", "MatMulNBits")}
    nodes["DequantizeLinear"] = onnx.helper.make_node("DequantizeLinear", ["a"], ["b"])
    assert has_integer_products([nodes["QGemm"]])
    assert has_integer_products([nodes["QuantizeLinear"], nodes["DequantizeLinear"]])
    for name in ("MatMulNBits", "QuantizeLinear", "DequantizeLinear"):
        assert not has_integer_products([nodes[name]])


# ---- an emulated processor ------------------------------------------------------------------------------------------

EMULATOR = shutil.which("qemu-x86_64")
EMULATED = """
import sys
sys.path[:0] = [{root!r}, {packages!r}]
import warnings
import torch
warnings.simplefilter("ignore")
import onnxruntime as ort
import qfx.onnx
from qfx import processor
x = torch.load({folder!r} + "/x.pt")
unsafe = ort.SessionOptions()
unsafe.log_severity_level = 3
wrong = ort.InferenceSession({folder!r} + "/m.onnx", unsafe).run(None, {{"x": x.numpy()}})[0]
right = next(iter(qfx.onnx.load({folder!r} + "/m.onnx")(x=x).values()))
torch.save([processor.saturates(), torch.from_numpy(wrong), right], {folder!r} + "/found.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None or not HERE_X86, reason="needs qemu-x86_64 (user mode)")
def test_an_emulated_processor_without_vnni_gives_the_same_numbers(tmp_path: Path) -> None:
    """Haswell has AVX2 and no VNNI: sums overflow without the option, and are those of this processor with it."""
    model = Shared().eval()
    with torch.no_grad():
        model.up.weight.fill_(0.5), model.up.bias.fill_(0.1)
    x = torch.ones_like(X)
    torch.save(x, tmp_path / "x.pt")
    path = qfx.export_onnx(model, (x,), tmp_path / "m.onnx", recipe="w8a8").path
    want = next(iter(opened(path)(x=x).values()))
    root, packages = Path(__file__).resolve().parents[3], sysconfig.get_paths()["purelib"]
    script = EMULATED.format(root=str(root), packages=packages, folder=str(tmp_path))
    python = Path(sys.executable).resolve()
    subprocess.run([str(EMULATOR), "-cpu", "Haswell", str(python), "-c", script], check=True)
    saturates, wrong, right = torch.load(tmp_path / "found.pt")
    assert saturates
    assert (wrong - want).abs().max() > 0.1 * want.abs().max(), "without the option it overflows"
    assert torch.allclose(right, want, rtol=1e-5, atol=1e-6)
