"""A prepared model under torch.compile: one graph, few compilations, and operations that Inductor sees and fuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from qfx.backends.qat import fake_quantize
from qfx.format import Format
from tests.qat_nets import DATA, VOCAB, both, net, prepared

RULES: dict[str, Any] = {
    "w4a8": both("i4/ch", "i8/tok"),
    "static": both("i8/ch", "u8"),
    "int8-int4": both("i4/g16", "u8/tok"),
    "nf4": both("nf4/g16/dq"),
}
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, on any Function
]


class Graphs:
    """A backend that keeps the graphs that AOTAutograd makes: `forward`s and `backward`s, in order."""

    def __init__(self) -> None:
        self.forward: list[fx.GraphModule] = []
        self.backward: list[fx.GraphModule] = []
        self.inference: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        def keep(kept: list[fx.GraphModule]) -> Callable[..., Any]:
            def compiler(found: fx.GraphModule, _: Any) -> Any:
                kept.append(found)
                return make_boxed_func(found.forward)

            return compiler

        backend = aot_autograd(
            fw_compiler=keep(self.forward), bw_compiler=keep(self.backward), inference_compiler=keep(self.inference),
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip
        return backend(gm, inputs)

    @property
    def count(self) -> int:
        """Graphs with a gradient and without."""
        return len(self.forward) + len(self.inference)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows + length))


@pytest.mark.parametrize("scales", ["learned", pytest.param("observed", marks=pytest.mark.slow)])
def test_steps_and_modes_compile_once_each(scales: Any) -> None:
    """Many steps of an optimizer: one graph. The first evaluation: one more. Back and forth: none."""
    graphs = Graphs()
    model = prepared(net(), RULES["static"], DATA, scales=scales)
    run: Any = torch.compile(model, backend=graphs, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    evaluated = torch.empty(0)
    for _ in range(2):
        for _ in range(3):
            model.train()
            run(tokens(4, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            evaluated = run.eval()(tokens(4, 6))
    assert (len(graphs.forward), len(graphs.backward), len(graphs.inference)) == (1, 1, 1)
    with torch.no_grad():
        assert torch.allclose(evaluated, model(tokens(4, 6)), atol=1e-5)


def gradient_gap(model: nn.Module, other: nn.Module) -> float:
    """The greatest relative difference of two models' gradients."""
    gaps = []
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        gaps.append(float((p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-6)))
    return max(gaps)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_other_shapes_compile_once_more(scales: Any) -> None:
    """The second size makes it symbolic, the gradient scale of a static input with it. Gradients are those of eager."""
    graphs = Graphs()
    eager = prepared(net(), RULES["static"], DATA, scales=scales).train()
    model = copy.deepcopy(eager)
    run: Any = torch.compile(model, backend=graphs, fullgraph=True)
    for rows in (4, 3, 5):
        for each in (model, eager):
            each.zero_grad()
            (run if each is model else each)(tokens(rows, 6)).square().mean().backward()
        assert gradient_gap(model, eager) < 1e-4
    assert graphs.count == 2


SLOW = ("static", "int8-int4")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RULES])
def test_the_compiler_sees_plain_operations(name: str) -> None:
    """No operator of qfx and no Python function is left in what AOTAutograd hands to Inductor."""
    graphs = Graphs()
    model = prepared(net(), RULES[name], DATA).train()
    run: Any = torch.compile(model, backend=graphs, fullgraph=True)
    run(tokens(4, 6)).square().mean().backward()
    called = [n.target for gm in (*graphs.forward, *graphs.backward) for n in gm.graph.nodes if n.op == "call_function"]
    foreign = {str(t) for t in called if not str(t).startswith(("aten.", "prims.", "<built-in function getitem>"))}
    assert called and not foreign


def saved(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What the compiled forward makes for the backward beside its inputs and its output."""
    graphs = Graphs()
    run: Any = torch.compile(model, backend=graphs, fullgraph=True)
    run(*inputs).square().mean().backward()
    (gm,) = graphs.forward
    (returned,) = gm.graph.output_node().args
    assert isinstance(returned, tuple | list)
    return [n.meta["val"] for n in returned[1:] if isinstance(n, fx.Node) and n.op != "placeholder"]


@pytest.mark.parametrize("x_format", ["i8/tok", "u8/tok"])
def test_scales_of_tokens_keep_nothing_for_the_backward(x_format: str) -> None:
    """The product keeps its input as it was rounded beside tanh's own output: no mask, no codes, no scales."""
    torch.manual_seed(0)
    x, found = torch.randn(5, 32, requires_grad=True), []
    for recipe in (None, both("i4/ch", x_format)):
        torch._dynamo.reset()
        model: nn.Module = nn.Sequential(nn.Tanh(), nn.Linear(32, 16))
        model = model if recipe is None else prepared(model, recipe, [x.detach()])
        found.append([t.dtype for t in saved(model.train(), x) if t.shape[0] == 5])
    plain, fake = found
    assert plain == [torch.float32] and fake == 2 * [torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize(("scales", "most"), [("learned", 1e-5), ("observed", 0.05)])
def test_a_checkpointed_model_compiles(scales: Any, most: float) -> None:
    """Averages move once; the recomputed forward reads them as they are by then: its gradients are near, not equal."""
    from torch.utils.checkpoint import checkpoint

    ids, eager = tokens(4, 6), prepared(net(), RULES["static"], DATA, scales=scales).train()
    model = copy.deepcopy(eager)

    def run(ids: Tensor) -> Tensor:
        found: Tensor = checkpoint(model, ids, use_reentrant=False)
        return found

    eager(ids).square().mean().backward()
    torch.compile(run, backend="aot_eager", fullgraph=True)(ids).square().mean().backward()
    for (name, one), two in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name
    assert gradient_gap(model, eager) < most


def loops(code: str, *sizes: int) -> int:
    """Nests of loops over `sizes`, the outermost first, in generated C++."""
    bounds = re.findall(
        r"^( *)for\(int64_t \w+=static_cast<int64_t>\(0L\); \w+<static_cast<int64_t>\((\d+)L\)", code, re.M
    )
    stack: list[tuple[int, int]] = []
    found = 0
    for indent, size in ((len(i), int(s)) for i, s in bounds):
        stack = [outer for outer in stack if outer[0] < indent] + [(indent, size)]
        found += [s for _, s in stack] == list(sizes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shape"), [("i4/ch", (40, 96)), ("u4/g32", (120, 32))])
def test_a_weight_is_rounded_in_one_pass_each_way(text: str, shape: tuple[int, ...]) -> None:
    """Inductor's code: one nest of loops over the weight forward, and one backward, which sums by scale as it goes."""
    from torch._inductor.utils import run_and_get_code

    fmt = Format.parse(text)
    weight = torch.randn(40, 96, requires_grad=True)
    scale = torch.full(fmt.scale_shape(weight.shape), 0.2, requires_grad=True)
    zero = torch.full_like(scale, 7.0) if fmt.has_zero else None

    def both_ways() -> None:
        run = torch.compile(lambda w, s: fake_quantize(w, fmt, s, zero), fullgraph=True)
        run(weight, scale).backward(torch.randn(40, 96))

    _, codes = run_and_get_code(both_ways)
    assert len(codes) == 2 and all(len(re.findall(r"async_compile\.cpp", code)) == 1 for code in codes)
    assert [loops(code, *shape) for code in codes] == [1, 1]
    assert weight.grad is not None and scale.grad is not None
