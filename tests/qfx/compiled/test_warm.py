"""Warm starts: what one process compiled another one runs, bit by bit the same, with the same report and warnings."""

from __future__ import annotations

import cProfile
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.capture import capture_dynamo
from qfx.compile import CompiledGraph
from qfx.compiled.warm import _is_plain, cache_of
from qfx.errors import QfxWarning
from qfx.options import Options
from tests.qfx.conftest import Counts
from tests.seeded import randn
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(nn.Module):
    """Two linears, a norm, a Python number in the graph."""

    def __init__(self, seed: int = 0, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.norm = nn.Linear(32, 64), nn.Linear(64, 16), nn.LayerNorm(16)
        self.factor = factor
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.b(torch.relu(self.a(x)) * self.factor))
        return out


X = randn(4, 32, seed=5)


def start(model: nn.Module, *inputs: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, Any]:
    """A start from nothing: (output, compiled model)."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="qfx", options=options, dynamic=dynamic)
    with torch.no_grad():
        return fast(*inputs), fast


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each graph that is captured."""
    found: list[int] = []
    capture = capture_dynamo

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr("qfx.compiled.template.capture_dynamo", counted)
    return found


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("v1/*/*"))


def test_a_warm_start_captures_and_lowers_nothing(cache_folder: Path, counts: Counts, captures: list[int]) -> None:
    cold, fast = start(Net(), X)
    told = qfx.report(fast).to_json()
    assert (counts.lowered, len(captures), len(entries(cache_folder))) == (1, 1, 1)
    warm, fast = start(Net(), X)
    assert (counts.lowered, len(captures)) == (1, 1)
    assert torch.equal(cold, warm)
    assert qfx.report(fast).to_json() == told
    off, fast = start(Net(), X, cache=False)
    assert counts.lowered == 2 and torch.equal(off, cold), "what is saved computes what is not"
    assert qfx.report(fast).to_json() == told


@pytest.mark.parametrize(
    ("what", "make", "options"),
    [
        ("other weights", lambda: Net(1), {}),
        ("one bit of one weight", lambda: _nudged(Net()), {}),
        ("another number in the graph", lambda: Net(factor=2.5), {}),
        ("another recipe", Net, {"recipe": "w8a16"}),
        ("strict", Net, {"strict": True}),
        ("another dtype", lambda: Net().to(torch.bfloat16), {}),
        ("another operator", lambda: _without_relu(Net()), {}),
        ("a frozen layer of another shape", lambda: _wider(Net()), {}),
    ],
)
def test_what_differs_is_made_anew(what: str, make: Any, options: Any, cache_folder: Path, counts: Counts) -> None:
    start(Net(), X)
    before = counts.lowered
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        found, _ = start(model, X.to(model.a.weight.dtype), **options)
        assert counts.lowered == before + 1, what
        torch._dynamo.reset()
        want, _ = start(model, X.to(model.a.weight.dtype), **options, cache=False)
    assert torch.equal(found, want)


def _nudged(model: Net) -> Net:
    with torch.no_grad():
        bits = model.a.weight.view(torch.int32)
        bits[3, 3] ^= 1
    return model


def _without_relu(model: Net) -> Net:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.b(torch.sigmoid(self.a(x)) * self.factor))
            return out

    model.__class__ = Other
    return model


def _wider(model: Net) -> Net:
    model.a, model.b = nn.Linear(32, 80), nn.Linear(80, 16)
    return model.eval()


@pytest.mark.parametrize("part", ["qfx", "torch", "onnxruntime", "transformers", "processor"])
def test_versions_and_the_processor_count(
    part: str, cache_folder: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qfx.compiled import cache_key

    start(Net(), X)
    real = cache_key.environment()
    changed = {**real, "versions": dict(real["versions"])}
    if part == "processor":
        changed["processor"] = [*real["processor"][:-1], "other flags"]
    else:
        changed["versions"][part] = "0.0.1"
    monkeypatch.setattr(cache_key, "environment", lambda: changed)
    start(Net(), X)
    assert counts.lowered == 2
    monkeypatch.setattr(cache_key, "environment", lambda: real)
    start(Net(), X)
    assert counts.lowered == 2


def test_the_number_of_threads_does_not_count(cache_folder: Path, counts: Counts) -> None:
    before = torch.get_num_threads()
    want, _ = start(Net(), X)
    try:
        torch.set_num_threads(before + 1)
        found, _ = start(Net(), X)
    finally:
        torch.set_num_threads(before)
    assert counts.lowered == 1 and torch.equal(found, want)


def test_static_and_dynamic_graphs_are_found_in_turn(cache_folder: Path, counts: Counts) -> None:
    batches = [randn(n, 32, seed=n) for n in (4, 6, 9)]

    def run() -> list[Tensor]:
        _, fast = start(Net(), batches[0])
        with torch.no_grad():
            return [fast(x) for x in batches]

    cold = run()
    assert (counts.graphs, counts.lowered) == (2, 2), "one for the first size, one for all"
    warm = run()
    assert (counts.graphs, counts.lowered) == (4, 2)
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


class Halves(nn.Module):
    """A graph that capturing specialises: its sizes must be even."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y.unflatten(0, (2, -1)).sum(0) if x.shape[0] % 2 == 0 else y


def test_guards_that_capturing_adds_hold_on_a_warm_start(cache_folder: Path, counts: Counts) -> None:
    sizes = (6, 10, 7, 12)
    inputs = [randn(n, 8, seed=n) for n in sizes]

    def run() -> tuple[list[Tensor], int]:
        before = counts.graphs
        model = Halves().eval()
        _, fast = start(model, inputs[0], dynamic=True)
        with torch.no_grad():
            return [fast(x) for x in inputs], counts.graphs - before

    cold, graphs = run()
    lowered = counts.lowered
    warm, again = run()
    assert again == graphs == 2 and counts.lowered == lowered, "an odd size compiles another graph, warm as cold"
    assert [len(t) for t in warm] == [3, 5, 7, 6]
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


class Takes(nn.Module):
    """A number is taken out of a tensor between two graphs, and its sign chooses the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x).abs()
        if y.sum().item() > 0:
            y = y + 1
        out: Tensor = self.b(y)
        return out


def test_guards_on_what_no_graph_gets_are_left_to_dynamo(cache_folder: Path, counts: Counts) -> None:
    inputs = [randn(n, 8, seed=n) for n in (4, 6)]

    def run() -> list[Tensor]:
        _, fast = start(Takes().eval(), inputs[0], dynamic=True)
        with torch.no_grad():
            return [fast(x) for x in inputs]

    cold = run()
    lowered = counts.lowered
    warm = run()
    assert counts.lowered == lowered, "both graphs are kept"
    assert all(torch.equal(a, b) for a, b in zip(cold, warm, strict=True))


def test_only_comparisons_of_sizes_are_read_as_guards() -> None:
    assert _is_plain("2 <= L['t0'] and (L['t0'] % 2) == 0 and L['t1'] != max(1, L['t0'] // 3)")
    for text in ("__import__('os').system('x')", "L['t0'].__class__", "open('x')", "[1 for _ in ()]", "lambda: 1", "("):
        assert not _is_plain(text), text


def test_changed_weights_are_followed_after_a_warm_start(cache_folder: Path, counts: Counts) -> None:
    start(Net(), X)
    model = Net()
    _, fast = start(model, X)
    assert counts.lowered == 1
    with torch.no_grad():
        model.a.weight.mul_(1.5)
        found = fast(X)
        assert counts.lowered == 2, "captured now, for weights that the cache has not"
        assert len(entries(cache_folder)) == 1, "nothing is written for weights that change in place"
        assert {row.node for row in qfx.report(fast).rows} == {"a", "b"}
        want, _ = start(model, X, cache=False)
    assert torch.equal(found, want)


def test_sqnr_is_measured_after_a_warm_start(cache_folder: Path) -> None:
    _, cold = start(Net(), X)
    want = [row.sqnr_db for row in qfx.report(cold, (X,)).rows]
    _, warm = start(Net(), X)
    assert [row.sqnr_db for row in qfx.report(warm, (X,)).rows] == want and None not in want


def test_tied_weights_are_another_graph(cache_folder: Path, counts: Counts) -> None:
    def net(*, tied: bool) -> nn.Module:
        torch.manual_seed(0)
        first, second = nn.Linear(16, 16), nn.Linear(16, 16)
        second.weight = first.weight if tied else nn.Parameter(first.weight.detach().clone())
        return nn.Sequential(first, nn.Tanh(), second).eval()

    x = torch.randn(2, 16)
    outputs = [start(net(tied=tied), x)[0] for tied in (False, True, False, True)]
    assert counts.lowered == 2
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


class Remembering(nn.Module):
    """A buffer that the graph writes."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.register_buffer("last", torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.last.add_(y)
        return self.last * 2


def test_written_buffers_are_written_after_a_warm_start(cache_folder: Path, counts: Counts) -> None:
    x, kept = torch.randn(3, 8), []
    for _ in range(2):
        model = Remembering().eval()
        out, fast = start(model, x)
        with torch.no_grad():
            kept.append((out, fast(x), model.last.clone()))
    assert counts.lowered == 1
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert torch.equal(kept[0][1], kept[0][2] * 2)


def test_warnings_of_the_cold_start_are_those_of_the_warm_one(cache_folder: Path, counts: Counts) -> None:
    told = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start(Net(), X, recipe="w8a16")
        told.append([(str(w.message), w.filename, w.lineno) for w in caught if w.category is QfxWarning])
    assert counts.lowered == 1
    assert told[0] == told[1] != []


def test_a_damaged_entry_is_made_anew_with_a_warning(cache_folder: Path, counts: Counts) -> None:
    want, _ = start(Net(), X)
    data = next(cache_folder.rglob("*.data"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.warns(QfxWarning, match=r"damaged and is made anew: 0\.data has"):
        found, _ = start(Net(), X)
    assert counts.lowered == 2 and torch.equal(found, want)
    start(Net(), X)
    assert counts.lowered == 2, "whole again"


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path: Path, counts: Counts) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(QfxWarning, match="cannot be written") as caught:
        found, _ = start(Net(), X, cache=tmp_path / "file" / "sub")
    assert len([w for w in caught if w.category is QfxWarning]) == 1
    want, _ = start(Net(), X, cache=False)
    assert torch.equal(found, want)


def test_a_disk_that_fills_while_models_are_saved(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qfx.backends.onnx import session

    original = session._saved_to

    def nowhere(chosen: Any, path: Path, *, packed: bool) -> None:
        original(chosen, path.parent / "missing" / path.name, packed=packed)

    monkeypatch.setattr(session, "_saved_to", nowhere)
    with pytest.warns(QfxWarning, match="cannot be written") as caught:
        found, _ = start(Net(), X)
    assert len([w for w in caught if w.category is QfxWarning]) == 1
    want, _ = start(Net(), X, cache=False)
    assert torch.equal(found, want) and entries(cache_folder) == []


_FULL = """
import os, resource, sys, warnings, torch, qfx
from pathlib import Path
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256)).eval()
x = torch.randn(3, 256)
with torch.no_grad():
    want = torch.compile(model, backend="qfx", options={"cache": False})(x)
for most in sys.argv[1:]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), resource.RLIM_INFINITY))
        fast = torch.compile(model, backend="qfx")
        found = fast(x)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(found, want), "works on"
    assert len(caught) == 1 and "cannot be written" in str(caught[0].message), [str(w.message) for w in caught]
    assert qfx.report(fast).totals["linear_quantized"] == 2
    print(most, [p.name for p in Path(os.environ["QFX_CACHE_DIR"]).rglob("*") if p.is_file()])
"""


def test_files_that_cannot_grow(cache_folder: Path) -> None:
    """The system refuses to write on at some byte of some file: of the weights, the model, the description."""
    pytest.importorskip("resource", reason="limits on files are a thing of Unix")
    limits = ["200", "3000", "50000", "140000"]  # bytes
    command = [sys.executable, "-c", _FULL, *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{most} []" for most in limits], "nothing half-written"
    assert not [p for p in cache_folder.rglob("*") if p.is_file()]


def test_the_option_turns_it_off_and_says_where(cache_folder: Path, tmp_path: Path, counts: Counts) -> None:
    start(Net(), X, cache=False)
    assert not cache_folder.exists()
    own = tmp_path / "own"
    start(Net(), X, cache=own)
    assert len(entries(own)) == 1 and not cache_folder.exists()
    start(Net(), X, cache={"folder": str(own), "max_bytes": 1 << 30})
    assert counts.lowered == 2
    start(Net(), X, cache=True)
    assert len(entries(cache_folder)) == 1
    assert cache_of(Options.parse({"cache": False})) is cache_of(Options.parse({"backend": "reference"})) is None


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("key_of", "its key cannot be made: KeyError: 'x'"),
        ("Warm._guards", "its guards cannot be written: KeyError: 'x'"),
    ],
)
def test_what_cannot_be_kept_is_told_and_the_graph_compiled(
    function: str, told: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise KeyError("x")

    monkeypatch.setattr(f"qfx.compiled.warm.{function}", broken)
    with pytest.warns(QfxWarning, match=told):
        start(Net(), X)
    assert counts.lowered == 1 and entries(cache_folder) == []


def test_no_file_holds_code(cache_folder: Path) -> None:
    start(Net(), X)
    names = {p.name for p in entries(cache_folder)[0].iterdir()}
    assert names == {"entry.json", "0.onnx", "0.data"}
    head, _, body = (entries(cache_folder)[0] / "entry.json").read_text().partition("\n")
    assert len(head) == 64 and set(json.loads(body)) == {"files", "fields"}


class _Custom(nn.Module):
    """A part that has no ONNX form and runs in torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.fft.rfft(self.fc(x)).abs()
        return out


def test_graphs_with_a_part_in_torch_are_not_kept(cache_folder: Path, counts: Counts) -> None:
    x, outputs = torch.randn(2, 16), []
    for _ in range(2):
        with pytest.warns(QfxWarning, match="runs in torch"):
            outputs.append(start(_Custom().eval(), x)[0])
    assert counts.lowered == 2 and entries(cache_folder) == []
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("llama", True),
        *(pytest.param("bert", dynamic, marks=pytest.mark.slow) for dynamic in (False, True)),
        pytest.param("llama", False, marks=pytest.mark.slow),
        *(pytest.param("gpt2", dynamic, marks=pytest.mark.slow) for dynamic in (False, True)),
    ],
)
def test_architectures(name: str, dynamic: bool, cache_folder: Path, counts: Counts) -> None:
    found = []
    for _ in range(2):
        model, inputs = ZOO[name]()
        torch._dynamo.reset()
        fast = torch.compile(model, backend="qfx", dynamic=dynamic)
        with torch.no_grad():
            found.append((fast(**inputs)[0], qfx.report(fast).to_json()))
    assert counts.lowered == counts.graphs // 2
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


_PROCESS = """
import json, sys, torch, qfx, qfx.compile
from tests.qfx.compiled.test_warm import Net, X
lowered = []
lower = qfx.compile.lower
qfx.compile.lower = lambda *a, **k: lowered.append(1) or lower(*a, **k)
fast = torch.compile(Net(), backend="qfx", dynamic=True)
with torch.no_grad():
    y = fast(X)
print(json.dumps([len(lowered), y.tolist(), qfx.report(fast).to_json()]))
"""


def test_another_process_starts_warm(cache_folder: Path) -> None:
    def run() -> list[Any]:
        command = [sys.executable, "-c", _PROCESS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        result: list[Any] = json.loads(done.stdout)
        return result

    cold, warm = run(), run()
    assert (cold[0], warm[0]) == (1, 0)
    assert cold[1:] == warm[1:], "the outputs to the last bit, and the report"


def packed_tensors() -> list[Tensor]:
    """Tensors of integers, larger than a few bytes, that someone holds."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) is Tensor]
    return [t for t in found if t.dtype in (torch.int8, torch.uint8) and t.device.type == "cpu" and t.numel() > 4000]


@pytest.mark.filterwarnings("ignore:.*rounds them to 8 bits:qfx.errors.QfxWarning")
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_no_packed_weight_stays_in_torch(recipe: str, cache_folder: Path) -> None:
    """ONNX Runtime maps them from the file; without a cache they stay, for sessions with other numbers of threads."""
    before = len(packed_tensors())
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    for _ in range(2):
        _, fast = start(model, torch.randn(2, 128), recipe=recipe)
        assert len(packed_tensors()) == before
    _, fast = start(model, torch.randn(2, 128), recipe=recipe, cache=False)
    assert len(packed_tensors()) > before, "the test sees them where they are"
    del fast


def test_a_call_of_a_trivial_graph_takes_few_steps(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between Dynamo's guards and the result few functions are called; none compares weights or looks at the disk."""
    seen: list[Any] = []
    call = CompiledGraph.__call__

    def kept(self: CompiledGraph, *args: Any) -> Any:
        seen[:] = [self, args]
        return call(self, *args)

    monkeypatch.setattr(CompiledGraph, "__call__", kept)
    start(nn.ReLU().eval(), torch.randn(4))
    graph, args = seen
    profile = cProfile.Profile()
    profile.runcall(call, graph, *args)
    steps = sum(entry.callcount for entry in profile.getstats())
    assert steps < 90, steps  # 60 where this was written
