"""qfx.export_onnx end to end: every architecture, in a process that has no qfx, and what it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends import reference
from qfx.capture import capture_export
from qfx.errors import QfxWarning, UnsupportedError
from qfx.export import checked_ending
from qfx.inputs import without_cache
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.onnx.checks import sqnr
from tests.zoo import ZOO

QUICK = {("onnxruntime", "mixtral"), ("standard", "llama")}  # further tests export bert and vit
PAIRS = [
    pytest.param(runtime, name, marks=[] if (runtime, name) in QUICK else pytest.mark.slow)
    for runtime in ("onnxruntime", "standard")
    for name in ZOO
]


def expected(model: nn.Module, inputs: dict[str, Any], recipe: str) -> list[Tensor]:
    """Outputs of the quantized graph by the reference kernels."""
    given = without_cache(model, inputs)
    captured = capture_export(model, (), given, dynamic=False)
    prepare(captured.gm)
    apply_plan(captured.gm, None, Recipe.parse(recipe))
    return [t for t in reference.lower(captured.gm)(*captured.flatten((), given)) if isinstance(t, Tensor)]


def run(path: Path, inputs: dict[str, Any]) -> list[Tensor]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})]


@pytest.mark.parametrize(("runtime", "name"), PAIRS)
def test_every_architecture(tmp_path: Path, runtime: str, name: str) -> None:
    model, inputs = ZOO[name]()
    written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8", runtime=runtime)
    first, *_ = expected(model, inputs, "w8a8")
    assert sqnr(first, run(written.path, inputs)[0]) > 38  # equal codes but where a sum lies between two of them
    graph = onnx.load(str(written.path)).graph
    if runtime == "standard":
        assert {node.domain for node in graph.node} == {""}
    kinds = {i.name: TensorProto(i) for i in graph.initializer}
    assert {fqn for fqn, roles in written.formats.items() if roles["w"].startswith("i8")}
    assert not [
        n for n, t in kinds.items() if t.is_float and t.size >= 1024 and n.split(".w_codes")[0] in written.formats
    ]


class TensorProto:
    """What the test looks at of an initializer."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self.is_float = tensor.data_type == onnx.TensorProto.FLOAT
        self.size = int(np.prod(tensor.dims))


PROGRAM = """
import sys
sys.modules["qfx"] = None
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
inputs = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], session.run(None, inputs)[0])
"""


def test_a_program_without_qfx(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8")
    np.savez(tmp_path / "in.npz", **{k: v.numpy() for k, v in inputs.items()})
    command = [sys.executable, "-c", PROGRAM, str(written.path), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert sqnr(run(written.path, inputs)[0], torch.from_numpy(np.load(tmp_path / "out.npy"))) > 100


def test_other_sizes_than_the_example(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8")
    for batch, length in ((1, 3), (4, 9)):
        other = {"input_ids": torch.arange(batch * length).reshape(batch, length) + 3}
        other["attention_mask"] = torch.ones_like(other["input_ids"])
        other["attention_mask"][-1, length // 2 :] = 0
        found = run(written.path, other)[0]
        assert sqnr(expected(model, other, "w8a8")[0], found) > 38


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        difference: Tensor = self.first(x) - self.second(y)
        return difference


def test_a_file_whose_example_was_one_tensor_for_two_inputs(tmp_path: Path) -> None:
    model, x = Pair().eval(), torch.randn(3, 16)
    written = qfx.export_onnx(model, (x, x), tmp_path / "m.onnx", recipe="w8a8")
    other = {"x": torch.randn(3, 16), "y": torch.randn(3, 16)}
    with torch.no_grad():
        assert sqnr(model(**other), run(written.path, other)[0]) > 30


def test_data_whose_batches_are_one_tensor_for_two_inputs() -> None:
    """The first batch is what the graph is traced on; scales are those of all."""
    model = Pair().eval()
    x, y = torch.randn(3, 16), 100 * torch.randn(3, 16)
    plan = qfx.plan(model, "w8a8-static", [(x, x), (x, y)])
    scales = {name: float(tensor) for name, tensor in plan.tensors.items() if name.endswith("scale")}
    assert sorted(scales), plan.tensors.keys()
    assert max(scales.values()) > 20 * min(scales.values()), scales


def test_the_live_model_stays_as_it_is(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8-smooth", data=[inputs])
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_three_ways_to_one_file(tmp_path: Path) -> None:
    """By recipe, by plan, and of a model that was quantized alive."""
    model, inputs = ZOO["bert"]()
    plan = qfx.plan(model, "w8a8-static", data=[inputs])
    by_plan = qfx.export_onnx(model, inputs, tmp_path / "plan.onnx", plan=plan)
    by_recipe = qfx.export_onnx(model, inputs, tmp_path / "recipe.onnx", recipe="w8a8-static", data=[inputs])
    alive = qfx.quantize(copy.deepcopy(model), plan)
    of_alive = qfx.export_onnx(alive, inputs, tmp_path / "alive.onnx")
    outputs = [run(written.path, inputs)[0] for written in (by_plan, by_recipe, of_alive)]
    assert torch.equal(outputs[0], outputs[1])
    assert sqnr(outputs[0], outputs[2]) > 60
    assert by_plan.formats == by_recipe.formats == of_alive.formats


def test_without_a_recipe_it_is_the_float_model(tmp_path: Path) -> None:
    model, inputs = ZOO["vit"]()
    written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx")
    with torch.no_grad():
        assert sqnr(model(**inputs).logits, run(written.path, inputs)[0]) > 90
    assert not written.formats


def test_inputs_of_a_transformers_model_may_be_left_out(tmp_path: Path) -> None:
    model, _ = ZOO["vit"]()
    assert qfx.export_onnx(model, None, tmp_path / "m.onnx", recipe="w8a8").inputs == ("pixel_values",)


@pytest.mark.parametrize(("name", "inputs"), [("bert", 3), ("distilbert", 2)])
def test_then_texts_may_be_padded_and_pairs(tmp_path: Path, name: str, inputs: int) -> None:
    """A file without the mask would let the tokens of a text attend to its padding, with no error."""
    model, given = ZOO[name]()
    ids = given["input_ids"]
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, 3:], types[:, 2:] = 0, 1
    text = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    path = qfx.export_onnx(model, None, tmp_path / "m.onnx").path
    taken = [i.name for i in ort.InferenceSession(path).get_inputs()]
    assert sorted(taken) == sorted(list(text)[:inputs])
    with torch.no_grad():
        wanted, plain = model(**{k: text[k] for k in taken})[0], model(ids)[0]
    (found, *_) = run(path, text)
    assert sqnr(wanted[mask.bool()], found[mask.bool()]) > 90 > sqnr(wanted[mask.bool()], plain[mask.bool()])


def test_a_recipe_for_what_is_quantized_is_refused(tmp_path: Path) -> None:
    model, inputs = ZOO["vit"]()
    plan = qfx.plan(copy.deepcopy(model), "w4a16", data=[inputs])
    model = qfx.quantize(model, "w8a8", data=[inputs])
    for asked in ({"recipe": "w4a16"}, {"plan": plan}):
        with pytest.raises(ValueError, match=r"quantized already: .*\n.*export the float model"):
            qfx.export_onnx(model, inputs, tmp_path / "m.onnx", **asked)
    assert list(tmp_path.iterdir()) == []
    prepared = qfx.prepare_qat(ZOO["vit"]()[0], "w8a8", data=[inputs])
    for recipe in ("w8a8", None):
        with pytest.raises(ValueError, match=r"prepared for training(.|\n)*qfx.convert"):
            qfx.export_onnx(prepared, inputs, tmp_path / "m.onnx", recipe=recipe)


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Neither on what it did before nor on how it orders sets: this one, and another with a seed of its own."""
    program = (
        "import sys, qfx; from tests.zoo import ZOO; m, i = ZOO['llama']();"
        "qfx.export_onnx(m, i, sys.argv[1], recipe='w8a8')"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "b.onnx")]
    root = Path(__file__).parents[2]
    environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=root, env=environment)
    model, inputs = ZOO["llama"]()
    qfx.export_onnx(model, inputs, tmp_path / "a.onnx", recipe="w8a8")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_format_without_a_kernel_keeps_its_codes(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.warns(QfxWarning, match="nf4"):
        written = qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="nf4")
    assert written.notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        assert sqnr(expected(model, inputs, "nf4")[0], run(written.path, inputs)[0]) > 60
    assert written.nbytes < qfx.export_onnx(model, inputs, tmp_path / "f.onnx").nbytes * 0.75


class Unknown(nn.Module):
    """Holds an operator without an ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svd(x).S
        return values


class Counts(nn.Module):
    """Changes a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x) * self.calls
        return y


class Chosen(nn.Module):
    """Chooses a buffer by its inputs before it reads it, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(torch.where(x.max() > 1, torch.full((4,), 2.0), torch.arange(4.0)))
        y: Tensor = x * self.scale
        return y


def test_a_buffer_that_each_call_overwrites_is_no_state(tmp_path: Path) -> None:
    model, path = Chosen().eval(), tmp_path / "m.onnx"
    assert qfx.export_onnx(model, torch.ones(2, 4), path).outputs == ("output",)
    session = ort.InferenceSession(path)
    for x in (torch.ones(2, 4), torch.full((3, 4), 5.0), torch.ones(2, 4)):
        np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], model(x).numpy())


class Views(Chosen):
    """Overwrites a buffer of which another, which it reads (or overwrites too), is a view."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.part: Tensor
        self.register_buffer("part", self.scale[:2])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.writes else x * self.part.sum()
        self.scale.copy_(x.sum(0))
        if self.writes:
            self.part.copy_(x[0, :2] * 3)
        return y * self.scale


@pytest.mark.parametrize("writes", [False, True])
def test_an_overwritten_buffer_that_others_see_is_a_state(tmp_path: Path, writes: bool) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)changes its inputs or buffers.*found: .*scale"):
        qfx.export_onnx(Views(writes=writes).eval(), torch.ones(2, 4), tmp_path / "m.onnx")


LINEAR, X = nn.Linear(4, 4).eval(), torch.ones(2, 4)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "another ending": ((LINEAR, X, "m.bin"), {}, ValueError, r"ends in \.onnx"),
    "no ending": ((LINEAR, X, "m"), {}, ValueError, r"ends in \.onnx"),
    "formats without a kernel": (
        (LINEAR, X, "m.onnx"),
        {"recipe": "fp8"},
        UnsupportedError,
        "next step: other formats for it",
    ),
    "bytes as a text": ((LINEAR, X, "m.onnx"), {"external_bytes": "1MB"}, ValueError, "found: '1MB'"),
    "bytes below zero": ((LINEAR, X, "m.onnx"), {"external_bytes": -1}, ValueError, "found: -1"),
    "an unknown runtime": ((LINEAR, X, "m.onnx"), {"runtime": "tensorrt"}, ValueError, "'onnxruntime' or 'standard'"),
    "a cache format": ((LINEAR, X, "m.onnx"), {"kv": "i8"}, ValueError, "without a cache"),
    "an unknown recipe": ((LINEAR, X, "m.onnx"), {"recipe": "w8a9"}, ValueError, "did you mean"),
    "a recipe as a plan": ((LINEAR, X, "m.onnx"), {"plan": "w8a8"}, ValueError, "expected: a qfx.Plan"),
    "both": ((LINEAR, X, "m.onnx"), {"plan": "w8a8", "recipe": "w8a8"}, ValueError, "one of them"),
    "no data": ((LINEAR, X, "m.onnx"), {"recipe": "w8a8-static"}, ValueError, "needs calibration data"),
    "no model": ((print, X, "m.onnx"), {}, ValueError, r"torch\.nn\.Module"),
    "no inputs": ((LINEAR, None, "m.onnx"), {}, ValueError, "no example of its inputs is known"),
    "no form": ((Unknown(), torch.ones(3, 3), "m.onnx"), {}, UnsupportedError, "svd"),
    "state": ((Counts().eval(), X, "m.onnx"), {}, UnsupportedError, "changes its inputs or buffers"),
}


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("file", ["m.onx", "m.ONNX", "m.gguf", "m.onnx.data"])
def test_an_unknown_ending_is_no_folder(tmp_path: Path, name: str, file: str) -> None:
    """Of models that may become a folder."""
    model = ZOO[name]()[0]
    with pytest.raises(
        ValueError, match=r"unknown ending '\.\w+'\n  expected: a file that ends in \.onnx; .* a folder"
    ):
        qfx.export_onnx(model, None, tmp_path / file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file", ["m", "m.onnx", "llama-3.2", "Qwen2.5-0.5B", "facebook.opt-125m", "gpt2.w8a8", ".hidden", "there.v2"]
)
def test_names_of_files_and_folders(tmp_path: Path, file: str) -> None:
    (tmp_path / "there.v2").mkdir()
    checked_ending(tmp_path / file)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    (model, args, file), options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        qfx.export_onnx(model, args, tmp_path / file, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "i4"}, "expected: 'i8/tok'"),
        ({"prefill": "i8/tok", "runtime": "standard"}, "runtime='onnxruntime'"),
    ],
)
def test_prompts_in_other_ways_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(ValueError, match=message):
        qfx.export_onnx(model, inputs, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8", "nf4"])
def test_channels_that_trace_as_a_size_which_varies(tmp_path: Path, recipe: str) -> None:
    """As those of Whisper's first convolution: torch.export's symbol can only be what the weight was packed for."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.GELU(), nn.Conv1d(8, 5, 3)).eval()
    x = torch.randn(2, 6, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        model = qfx.quantize(model, recipe, [x])
        qfx.export_onnx(model, x, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    more = torch.randn(3, 6, 31)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        assert sqnr(model(more), torch.from_numpy(found)) >= 34


def test_a_compiled_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Any = torch.compile(LINEAR)
    with pytest.raises(ValueError, match="is compiled"):
        qfx.export_onnx(compiled, X, tmp_path / "m.onnx")


def test_a_folder_as_path(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ValueError, match="found: the folder"):
        qfx.export_onnx(LINEAR, X, tmp_path / "m.onnx")


def test_strict_refuses_what_is_not_as_asked(tmp_path: Path) -> None:
    model, inputs = ZOO["mixtral"]()
    with pytest.raises(UnsupportedError, match="experts take only input formats whose scale is found at run time"):
        qfx.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8-static", data=[inputs], strict=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its file takes and gives f32, in which it computes: numpy knows no bf16. Else it is the model's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8)).to(dtype).eval()
    x = torch.randn(4, 32).to(dtype)
    with pytest.warns(
        QfxWarning, match=f"{dtype} values are computed in float32, which inputs and outputs of the file"
    ):
        written = qfx.export_onnx(net, x, tmp_path / "m.onnx")
    assert any("computed in float32" in note.reason for note in written.notes)
    given = {name: x.float() for name in written.inputs}
    (y,) = run(written.path, given)
    with torch.no_grad():
        wanted = copy.deepcopy(net).float()(x.float())
    assert y.dtype == torch.float32 and sqnr(wanted, y) > 80
    assert next(net.parameters()).dtype == dtype
