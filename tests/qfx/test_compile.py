"""torch.compile(backend="qfx"): any shape, any dtype, mutation, options, and nothing else changed."""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning
from qfx.measuring.measure import sqnr_db
from tests.processes import python
from tests.qfx.conftest import Counts
from tests.zoo import ZOO, ids

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def mlp(inputs: int = 32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.GELU(), nn.Linear(64, 16)).eval()


def close(expected: Tensor, found: Tensor, decibel: float = 30) -> bool:
    assert expected.shape == found.shape and expected.dtype == found.dtype
    return sqnr_db(expected, found) > decibel


def test_the_entry_point_names_the_backend() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.torch_dynamo_backends]\nqfx = "qfx.compile:backend"' in project
    named = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "qfx"]
    if not named:
        pytest.skip("qfx is not installed, so it has no entry point: `pip install -e . --no-deps` makes this run")
    assert {e.value for e in named} == {"qfx.compile:backend"}
    assert named[0].load() is qfx.compile.backend


def test_torch_compile_finds_qfx_without_an_import() -> None:
    if not [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "qfx"]:
        pytest.skip("qfx is not installed, so torch cannot find it: `pip install -e . --no-deps` makes this run")
    code = """if True:
        import sys, torch
        model = torch.nn.Linear(16, 8).eval()
        x = torch.randn(3, 16)
        compiled = torch.compile(model, backend="qfx")
        with torch.no_grad():
            error = (compiled(x) - model(x)).abs().max() / model(x).abs().max()
        print(0 < float(error) < 0.05, "passes" in sys.modules, "backends" in sys.modules)
    """
    assert python(code).split() == ["True", "False", "False"]


@torch.no_grad()
def test_six_shapes_take_two_graphs_and_batch_one_a_third(counts: Counts) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="qfx")
    for batch, length in [(2, 5), (3, 7), (4, 9), (5, 11), (6, 2), (9, 3)]:
        x = torch.randn(batch, length, 32)
        assert close(model(x), compiled(x))
    assert counts.graphs <= 2
    for length in (4, 6):
        x = torch.randn(1, length, 32)
        assert close(model(x), compiled(x))
    assert counts.graphs <= 3
    for shape in [(0, 5, 32), (0, 4, 32), (3, 0, 32)]:
        assert compiled(torch.randn(shape)).shape == (*shape[:-1], 16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_batch_and_sequence_of_a_transformer_are_dynamic(name: str, counts: Counts) -> None:
    model, inputs = ZOO[name]()
    compiled = torch.compile(model, backend="qfx")
    for batch, length in [(2, 7), (3, 9), (4, 11), (5, 6), (2, 12), (7, 8), (1, 7), (1, 9)]:
        tokens = torch.randint(3, 100, (batch, length))
        call = {**inputs, "input_ids": tokens}
        if "attention_mask" in call:
            call["attention_mask"] = torch.ones_like(tokens)
        assert close(model(**call)[0], compiled(**call)[0], 20)
    assert counts.graphs <= 3


@torch.no_grad()
def test_static_and_dynamic_are_respected(counts: Counts) -> None:
    model = mlp()
    fixed = torch.compile(model, backend="qfx", dynamic=False)
    for batch in (2, 3, 4):
        assert close(model(x := torch.randn(batch, 32)), fixed(x))
    assert counts.graphs == 3
    torch._dynamo.reset()
    free = torch.compile(model, backend="qfx", dynamic=True, fullgraph=True)
    for batch in (2, 3, 4):
        assert close(model(x := torch.randn(batch, 32)), free(x))
    assert counts.graphs == 4


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.fc(x) * scale + scale
        return out


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
def test_python_numbers_that_change(dynamic: bool | None, counts: Counts) -> None:
    model, x = Scaled().eval(), torch.randn(3, 16)
    compiled = torch.compile(model, backend="qfx", dynamic=dynamic)
    for scale in (0.5, 0.25, 2.0, 0.5, 0.25, 2.0):
        assert close(model(x, scale), compiled(x, scale))
    assert counts.lowered <= 4, "a number seen before is no reason to lower again"


def test_a_graph_break_is_an_error_under_fullgraph() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken().eval(), backend="qfx", fullgraph=True)(torch.randn(2))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "decibel"), [(torch.float32, 33), (torch.bfloat16, 28), (torch.float16, 33)])
def test_dtypes(dtype: torch.dtype, decibel: float) -> None:
    model, x = mlp().to(dtype), torch.randn(3, 32).to(dtype)
    compiled = torch.compile(model, backend="qfx", options={"strict": True})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [compiled(x), compiled(x.repeat(2, 1)), compiled(x[:1])]
    texts = [str(w.message) for w in said if issubclass(w.category, QfxWarning)]
    assert len(texts) == (dtype != torch.float32), "once, though there are several graphs"
    assert all("values are computed in float32" in text for text in texts)
    assert close(model(x), found[0], decibel)


@torch.no_grad()
def test_a_tensor_that_is_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            total[:, 2:4] += x.sum()
            x.mul_(2)
            out: Tensor = self.fc(x) + total[:, :1]
            return out

    model = InPlace().eval()
    compiled = torch.compile(model, backend="qfx")
    x, total = torch.randn(3, 16), torch.zeros(3, 8)
    theirs, ours = (x.clone(), total.clone()), (x.clone(), total.clone())
    for _ in range(2):
        assert close(model(*theirs), compiled(*ours))
        assert all(torch.allclose(a, b) for a, b in zip(theirs, ours, strict=True))
    assert ours[1][:, 2].abs().sum() > 0


class Cached(nn.Module):
    """A cache of fixed size in buffers, written with index_copy_, and a counter."""

    cache: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(2, 6, 8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.cache.index_copy_(1, at, self.fc(x)[:, None])
        self.steps.add_(1)
        return self.cache.sum(1) * self.steps


@torch.no_grad()
def test_buffers_that_the_model_writes(counts: Counts) -> None:
    model, theirs = Cached().eval(), Cached().eval()
    theirs.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="qfx")
    for step in range(5):
        x, at = torch.randn(2, 8), torch.tensor([step])
        assert close(theirs(x, at), compiled(x, at))
        assert close(theirs.cache, model.cache) and int(model.steps) == step + 1
    assert counts.lowered == 1, "a buffer that the graph writes is an input, not a weight"


@torch.no_grad()
@pytest.mark.parametrize("backend", ["onnx", "reference"])
@pytest.mark.parametrize(
    "copied",
    [lambda x: x * 1, lambda x: (x * 1).chunk(2)[0], lambda x: torch.einsum("ij->ji", x * 1), lambda x: x.clone()],
    ids=["whole", "part", "turned", "clone"],
)
def test_what_was_in_a_buffer_before_it_was_written(copied: Callable[[Tensor], Tensor], backend: str) -> None:
    class Delayed(nn.Module):
        """Gives a copy of its state, by operators that change no value, and then the next state."""

        held: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("held", torch.randn(4, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            before = copied(self.held)
            self.held.add_(x)
            return self.fc(x), before

    model = Delayed().eval()
    compiled = torch.compile(model, backend="qfx", options={"backend": backend, "cache": False})
    for _ in range(3):
        held, x = model.held.clone(), torch.randn(4, 8)
        before = compiled(x)[1]
        assert torch.equal(before, copied(held))
        assert torch.equal(model.held, held + x)


@torch.no_grad()
def test_buffers_that_something_else_writes(counts: Counts) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("shift", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) + self.shift
            return out

    model = Shifted().eval()
    compiled = torch.compile(model, backend="qfx")
    for step in range(5):
        model.get_buffer("shift").fill_(step) if step % 2 else setattr(model, "shift", torch.full((8,), float(step)))
        assert close(model(x := torch.randn(3, 8)), compiled(x))
    assert counts.lowered == 2, "a buffer that changed once is an input from then on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"recpie": "w8a8"}}, r"unknown option 'recpie', did you mean 'recipe'\?"),
        ({"options": {"recipe": "w8a8-static"}}, "needs calibration data"),
        ({"mode": "max-autotune"}, r"mode 'max-autotune' is Inductor's[\s\S]*leave mode= out"),
    ],
)
def test_wrong_options_are_refused_at_the_first_call(arguments: dict[str, Any], message: str) -> None:
    compiled = torch.compile(mlp(), backend="qfx", **arguments)
    with torch.no_grad(), pytest.raises(Exception, match=message) as refused:
        compiled(torch.randn(2, 32))
    causes = [refused.value, refused.value.__cause__, getattr(refused.value, "inner_exception", None)]
    assert any(isinstance(cause, ValueError) for cause in causes)


@torch.no_grad()
def test_mode_default_is_no_mode() -> None:
    model, x = mlp(), torch.randn(2, 32)
    assert close(model(x), torch.compile(model, backend="qfx", mode="default")(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["reference", "onnx"])
def test_the_backend_can_be_chosen(name: str) -> None:
    model, x = mlp(), torch.randn(3, 32)
    compiled = torch.compile(model, backend="qfx", options={"backend": name})
    assert close(model(x), compiled(x))
    assert all(("(reference)" in row.kernel) == (name == "reference") for row in qfx.report(compiled).rows)


@torch.no_grad()
def test_a_plan_and_its_folder(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(64, 32)
    plan = qfx.plan(model, "w8a8-static", [x], progress=False)
    plan.save(tmp_path)
    found = []
    for given in (plan, tmp_path, str(tmp_path)):
        torch._dynamo.reset()
        options: Any = {"plan": given, "strict": True}
        compiled = torch.compile(model, backend="qfx", options=options)
        found.append(compiled(x))
        assert [row.asked for row in qfx.report(compiled).rows] == ["x=u8 w=i8/ch"] * 2
    assert close(model(x), found[0]) and all(torch.equal(found[0], other) for other in found)


def snapshot() -> dict[str, Any]:
    """Everything of the process that a compiler might be tempted to change."""
    flags = torch._dynamo.config.get_config_copy()
    return {
        "dynamo": {k: repr(v) for k, v in flags.items()},
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "logging": {name: logging.getLogger(name).level for name in ["", *logging.root.manager.loggerDict]},
        "disabled": logging.root.manager.disable,
        "filters": list(warnings.filters),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "fusion": torch.backends.mha.get_fastpath_enabled(),
        "rng": torch.random.get_rng_state().tolist(),
        "seen": F.linear is torch.nn.functional.linear,
    }


@torch.no_grad()
def test_nothing_else_is_changed() -> None:
    model, inputs = ZOO["bert"]()
    torch.compile(mlp(), backend="eager")(torch.randn(2, 32))  # what Dynamo itself sets up
    import onnxruntime  # noqa: F401

    before = snapshot()
    compiled = torch.compile(model, backend="qfx")
    compiled(**inputs)
    qfx.report(compiled, data=inputs)
    after = snapshot()
    new_loggers = set(after["logging"]) - set(before["logging"])
    assert all(after["logging"].pop(name) == logging.NOTSET for name in new_loggers)
    assert {k: v for k, v in after.items() if before[k] != v} == {}


@torch.no_grad()
def test_outputs_that_are_inputs_views_and_weights() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x, x.view(-1), self.fc(x), self.fc.weight, x.t(), {"shape": x.shape[0], "nothing": None}

    model, x = Plain().eval(), torch.randn(4, 16)
    expected, found = model(x), torch.compile(model, backend="qfx")(x)
    assert found[0] is x and found[3] is model.fc.weight and found[5] == expected[5]
    assert all(torch.equal(a, b) for a, b in zip(expected[:2] + expected[3:5], found[:2] + found[3:5], strict=True))
    assert close(expected[2], found[2])


@torch.no_grad()
def test_under_autocast_outputs_have_the_dtype_of_eager() -> None:
    model, x = mlp(), torch.randn(3, 32)
    fast = torch.compile(model, backend="qfx")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(QfxWarning, match="computed in float32"):
        assert close(model(x), fast(x), 25)
    assert close(model(x), fast(x))


@torch.no_grad()
def test_keyword_arguments_and_nested_outputs() -> None:
    model, _ = ZOO["bert"]()
    compiled = torch.compile(model, backend="qfx")
    plain, found = model(input_ids=ids()), compiled(input_ids=ids())
    assert type(plain) is type(found) and list(plain) == list(found)
    assert close(plain.last_hidden_state, found.last_hidden_state, 20)


def test_a_quantized_model_keeps_what_its_recipe_left_in_float() -> None:
    model, inputs = ZOO["llama"]()
    quantized = qfx.quantize(model, "w8a8", ignore=("lm_head",))
    with torch.no_grad():
        as_it_is = torch.compile(quantized, backend="qfx")
        assert close(quantized(**inputs).logits, as_it_is(**inputs).logits, 90)
        asked = {row.node: row.asked for row in qfx.report(as_it_is)}
        assert asked["lm_head"] == "" and asked["model.layers.0.mlp.up_proj"] == "x=i8/tok w=i8/ch"
        torch._dynamo.reset()
        further = torch.compile(quantized, backend="qfx", options={"recipe": "w8a8"})
        further(**inputs)
        assert {row.node: row.asked for row in qfx.report(further)}["lm_head"] == "x=i8/tok w=i8/ch"


def test_activations_that_a_weight_only_kernel_rounds_are_told() -> None:
    model, x = mlp(), torch.randn(3, 32)
    weight_only = torch.compile(model, backend="qfx", options={"recipe": "w8a16"})
    with torch.no_grad(), pytest.warns(QfxWarning, match="rounds them to 8 bits per block") as caught:
        found = weight_only(x)
    assert len(caught) == 1
    assert close(model(x).detach(), found, 30)
    assert all("8-bit activations" in row.kernel for row in qfx.report(weight_only) if row.op == "linear")
    torch._dynamo.reset()
    exact = torch.compile(model, backend="qfx", options={"recipe": "w8a16", "backend": "reference"})
    with torch.no_grad():
        exact(x)
