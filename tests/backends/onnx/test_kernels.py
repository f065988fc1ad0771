"""Which kernels ONNX Runtime runs is seen in a temporary file; a graph runs the same where there is no room for it."""

from __future__ import annotations

import onnx
import pytest

from qfx.backends.onnx import kernels
from qfx.backends.onnx.graph import StageModel
from tests.processes import python

CODE = """
import resource, signal, torch, qfx
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(20))).eval()
x = torch.randn(4, 16)

def run():
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qfx", options={"cache": False})
    with torch.no_grad():
        found = compiled(x)
    return found, {row.kernel for row in qfx.report(compiled).rows if row.op == "linear"}

wanted, kernels = run()
assert all("known" not in kernel for kernel in kernels) and not torch.equal(wanted, model(x)), kernels
for size in (100, 3000, 9000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    found, kernels = run()
    print(torch.equal(found, wanted), *kernels)
"""


def test_a_full_disk_hides_the_kernels_and_changes_no_result() -> None:
    lines = python(CODE).splitlines()
    assert len(lines) == 3
    start = "True ONNX Runtime; its kernels are not known, its graph could not be written to look at: "
    assert all(line.startswith(start) for line in lines)


def test_what_keeps_the_kernels_hidden_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: StageModel) -> onnx.GraphProto:
        raise RuntimeError("no kernel for Frobnicate(1)\nmore")

    monkeypatch.setattr(kernels, "optimized_graph", refuse)
    built = StageModel(onnx.ModelProto(), {}, [], [], [], [], {})
    told, forms = kernels.inspected(built, ["a", "b"], ())
    assert told.keys() == {"a", "b"} and not forms
    assert all(text.endswith(": RuntimeError: no kernel for Frobnicate(1)") for text in told.values())
    assert "temporary" not in told["a"]
