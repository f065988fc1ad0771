"""What training stacks put around a prepared model: accelerate, autocast, scalers, averages, processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qfx
from qfx.live.modules import quantized_parts
from qfx.qat import quantizers
from tests.qat_nets import DATA, adam, both, ids, net, out, prepared, step

RECIPE = both("u4/g16", "u8")
SCRIPT = Path(__file__).resolve().parents[2] / "qat_processes.py"


@pytest.fixture(scope="module")
def plan() -> qfx.Plan:
    return qfx.plan(net(), RECIPE, DATA)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone; nothing is spawned."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_ddp_and_fsdp_of_one_process_train_as_the_model_itself(plan: qfx.Plan, scales: Any, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    losses, states = [], []
    for wrap in ("none", "ddp", "fsdp"):
        model = prepared(net(), plan, scales=scales)
        run: Any = DistributedDataParallel(model) if wrap == "ddp" else model
        if wrap == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = adam(model)
        losses.append([float(step(run, optimizer, seed)) for seed in range(3)])
        found = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in model.state_dict().items()}
        states.append(found)
        if wrap == "fsdp":
            with pytest.raises(ValueError, match="(?s)sharded over processes.*full_state_dict.*prepared anew"):
                qfx.convert(model)
            again = prepared(net(), plan, scales=scales)
            again.load_state_dict(found)
            trained = out(again)
            assert torch.allclose(out(qfx.convert(again)), trained, atol=1e-5)
        if wrap == "ddp":
            with pytest.raises(ValueError, match=r"convert\(model.module\)"):
                qfx.convert(run)
    assert all(found == pytest.approx(losses[0], rel=1e-6) for found in losses[1:])
    for other in states[1:]:
        assert all(torch.allclose(t, other[n], rtol=1e-4, atol=1e-6) for n, t in states[0].items())


class Reading(nn.Module):
    """Parameters that other forwards than a linear's read: of nn.MultiheadAttention, and a table's, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mixed = nn.Embedding(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y: Tensor = self.mixed(x, x, x)[0] @ self.table.weight.t()
        return y


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.parametrize("parts", [(), ("mixed",)])
def test_fsdp_shards_parameters_that_other_forwards_read(parts: tuple[str, ...], one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    index = torch.randint(0, 12, (2, 5))
    model = prepared(Reading().eval(), both("u4/g16", table="u4/g16"), [index])
    sharded = copy.deepcopy(model)
    for part in (*map(sharded.get_submodule, parts), sharded):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    first = model(index).detach()
    for _ in range(2):
        losses = []
        for one in (model, sharded):
            optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
            loss = one.train()(index).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not torch.allclose(model(index), first, rtol=1e-3), "it trains"
    state = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in sharded.state_dict().items()}
    again = prepared(Reading().eval(), both("u4/g16", table="u4/g16"), [index])
    again.load_state_dict(state)
    with torch.no_grad():
        trained = again.eval()(index)
        assert torch.allclose(trained, model.eval()(index), atol=1e-5)
        assert torch.allclose(qfx.convert(again)(index), trained, atol=1e-5)


def test_fsdp_in_bfloat16_computes_scales_in_float32(plan: qfx.Plan, one_process: None) -> None:
    """The policy casts every parameter in the forward; a scale is near to what it is in float32 all the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = prepared(net(), plan)
    quantizer = quantizers(model)["up.fake_quant.weight.parts.0"]
    quantizer.log_scale.data.fill_(0.1 + 1e-4)
    wanted, seen = quantizer.current()[0].detach().clone(), []
    quantizer.register_forward_hook(
        lambda module, *_: seen.append((module.log_scale.dtype, module.current()[0].detach()))
    )
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    optimizer = adam(model)
    losses = [float(step(model, optimizer)) for _ in range(6)]
    assert losses[-1] < 0.7 * losses[0]
    dtype, scale = seen[0]
    assert dtype == torch.bfloat16 and scale.dtype == torch.float32
    assert torch.allclose(scale, wanted, rtol=3e-3)  # bfloat16 has 0.4 % of 0.1, thrice that in the exponent: 0.1 %


def _run(processes: int, *arguments: str) -> dict[str, Any]:
    """What the script prints on process 0, run by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    root = SCRIPT.parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(SCRIPT), *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_as_one(tmp_path: Path) -> None:
    """Losses and scales are those of one process on both shards; what two have saved one loads, and the other way."""
    first, second, third = (str(tmp_path / name) for name in "abc")
    one = _run(1, first, "")
    two = _run(2, second, first)
    last = _run(1, third, second)
    assert len(one) == 4
    for name, wanted in one.items():
        found = two[name]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-5), name
        assert found["scales"] == pytest.approx(wanted["scales"], rel=1e-3, abs=1e-5), name
        assert found["apart"] == 0.0, "every process has the same observed averages"
        assert found["again"] == pytest.approx(wanted["losses"][2:], rel=2e-5), "two go on from what one saved"
        assert last[name]["again"] == pytest.approx(wanted["losses"][2:], rel=2e-5), "one goes on from what two saved"


def test_an_average_of_the_weights_is_converted(plan: qfx.Plan) -> None:
    model = prepared(net(), plan)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = adam(model)
    for seed in range(3):
        step(model, optimizer, seed)
        average.update_parameters(model)
    name = "up.fake_quant.weight.parts.0"
    logs = [quantizers(m)[n].log_scale.detach() for m, n in ((model, name), (average, f"module.{name}"))]
    assert float((logs[0] - logs[1]).abs().max()) > 0
    trained = out(average)
    with pytest.raises(ValueError, match=r"inside AveragedModel, under 'module'"):
        qfx.convert(average)
    assert torch.allclose(out(qfx.convert(average.module)), trained, atol=1e-5)
    assert not quantized_parts(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_trains_and_its_scales_stay_in_float32(plan: qfx.Plan, dtype: torch.dtype) -> None:
    model = prepared(net(), plan).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    kinds = {p.dtype for n, p in model.named_parameters() if "log_scale" in n or "zero_shift" in n}
    assert kinds == {torch.float32} and model.up.weight.dtype == dtype
    trained = out(model)
    assert float((out(qfx.convert(model)) - trained).norm() / trained.norm()) < 0.05


def test_a_gradient_scaler_skips_the_step_that_overflows(plan: qfx.Plan) -> None:
    """float16: a scale of 65536 overflows at once; the step is skipped, scales stay finite, then training goes on."""
    model = prepared(net(), plan).train()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(model.state_dict())
    moved = []
    for _ in range(30):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().roll(1, 1).flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(model.up.weight, before["up.weight"]))
        found = [q.qparams().scale for q in quantizers(model).values()]
        assert all(bool((scale > 0).all() and scale.isfinite().all()) for scale in found)
    assert not moved[0] and moved[-1]
    assert torch.isfinite(out(qfx.convert(model))).all()


def test_accelerate(plan: qfx.Plan) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = prepared(net(), plan)
    wrapped, optimizer = accelerator.prepare(model, adam(model))
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(wrapped(ids()).flatten(0, 1), ids().roll(1, 1).flatten())
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.warns(qfx.QfxWarning, match="(?s)accelerate's autocast.*keep_fp32_wrapper=False"):
        qfx.convert(copy.deepcopy(accelerator.unwrap_model(wrapped)))
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    trained = out(model)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)
