"""GPTQ into GGUF's blocks: less error of what layers compute, in the same bytes, in a file like any other."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.interop.gguf_blocks import BLOCK_TYPES, block_type, unpack
from qfx.interop.gguf_encode import encode
from qfx.interop.gguf_file import read_gguf
from qfx.interop.gguf_rounding import _Blocks, gptq, round_blocks
from qfx.passes._hessian import Hessian
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.rounding.method_options import GptqOptions
from tests.gguf_models import ids, random_model, run

pytest.importorskip("transformers", reason="the models are transformers models: pip install qfx[hf]")
pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")

NAMES = sorted(BLOCK_TYPES)
OPTIONS = GptqOptions(act_order=False, clip=True, sweeps=2)


def weight(rows: int = 16, columns: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(count: int = 1024, columns: int = 256, *, shared: float = 1.0, seed: int = 1) -> Tensor:
    """Inputs of which a part is the same few directions in all columns."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(count, columns // 8, generator=generator) @ torch.randn(
        columns // 8, columns, generator=generator
    )
    return shared * few / math.sqrt(columns // 8) + 0.3 * torch.randn(count, columns, generator=generator)


def seen(x: Tensor) -> Hessian:
    found = Hessian(x.shape[1])
    found.add(x)
    return found


def lost(w: Tensor, found: Tensor, x: Tensor) -> float:
    return float(((w - found) @ x.T).square().sum() / (w @ x.T).square().sum())


def searched(w: Tensor, name: str, x: Tensor) -> Tensor:
    kind = block_type(name)
    data = encode(w, name, x.square().mean(0))
    return unpack(data.reshape(-1, kind.nbytes), kind).values().reshape(w.shape)


def by_gptq(w: Tensor, name: str, x: Tensor, **options: Any) -> Tensor:
    kind = block_type(name)
    data, values = gptq(w, kind, seen(x), OPTIONS.model_copy(update=options), name="fc")
    assert torch.equal(unpack(data.reshape(-1, kind.nbytes), kind).values().reshape(w.shape).to(w.dtype), values)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_less_is_lost_of_what_a_layer_computes(name: str) -> None:
    w, x = weight(), inputs()
    plain, once, swept = searched(w, name, x), by_gptq(w, name, x, sweeps=0), by_gptq(w, name, x)
    assert lost(w, once, x) < 0.6 * lost(w, plain, x)
    assert lost(w, swept, x) < lost(w, once, x)
    assert lost(w, swept, inputs(seed=2)) < 2 * lost(w, plain, inputs(seed=2)), "other data of other directions"


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q3_K", "Q4_K"])
def test_nothing_to_make_good_where_columns_are_alone(name: str) -> None:
    """The negative control: of inputs that have nothing in common GPTQ is rounding to nearest."""
    w, x = weight(), inputs(8192, shared=0.0)
    assert lost(w, by_gptq(w, name, x, dampening=1.0), x) == pytest.approx(lost(w, searched(w, name, x), x), rel=0.06)


def test_rows_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time give what all rows give."""
    w, x = weight(), inputs()
    whole = by_gptq(w, "Q4_K", x)
    monkeypatch.setattr("qfx.passes._columns._ELEMENTS", 4 * 256)
    monkeypatch.setattr("qfx.interop.gguf_rounding._ELEMENTS", 3 * 256)
    assert (by_gptq(w, "Q4_K", x) == whole).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    w, x = weight().to(dtype), inputs()
    found = by_gptq(w, "Q4_K", x)
    assert found.dtype == dtype and torch.equal(found, by_gptq(w.float(), "Q4_K", x).to(dtype))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q2_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_zeros_and_dead_columns(name: str) -> None:
    w, x = weight(4), inputs()
    w[1], x[:, 40:72] = 0, 0
    found = by_gptq(w, name, x)
    assert not found[1].any() and bool(torch.isfinite(found).all())
    assert float((found - w)[:, 40:72].norm() / w[:, 40:72].norm()) < 0.7, "they may be seen later"


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "'fc'.*1 NaN"), (math.inf, "'fc'.*1 Inf"), (1e9, "fc holds values that Q4_0 cannot")],
)
def test_bad_weights_are_named(value: float, message: str) -> None:
    w = weight()
    w[3, 5] = value
    with pytest.raises(ValueError, match=f"(?s){message}"):
        by_gptq(w, "Q4_0", inputs())


class Two(nn.Module):
    """Two linears, the second behind the first, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def quietly(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.export_gguf(*args, **kwargs)


def test_each_layer_sees_what_is_rounded_before_it() -> None:
    torch.manual_seed(0)
    model, x = Two(), inputs(512, 64)
    kinds = {"first": "Q4_0", "second": "Q4_1"}
    data, notes = round_blocks(model, kinds, [x[:256], x[256:]])
    assert set(data) == {"first", "second"} and notes == []
    assert data["first"].shape == (96, 2 * 18) and data["second"].shape == (32, 3 * 20)
    first = unpack(data["first"].reshape(-1, 18), block_type("Q4_0")).values().reshape(96, 64)
    with torch.no_grad():
        behind = torch.relu(x @ first.T + model.first.bias)
        wanted = gptq(model.second.weight.detach(), block_type("Q4_1"), seen(behind), OPTIONS, name="second")
        other = gptq(model.second.weight.detach(), block_type("Q4_1"), seen(model.first(x).relu()), OPTIONS, name="s")
    codes = [unpack(d.reshape(-1, 20), block_type("Q4_1")).codes for d in (data["second"], wanted[0], other[0])]
    same = [float((codes[0] == found).float().mean()) for found in codes[1:]]
    assert same[0] > 0.995, "by its inputs in the rounded model"
    assert same[1] < 0.99, "not by those in the float one"


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_no_more_than_one_layer_is_held_again(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is written. A table and the output that reads it, in other layers, stay one."""
    model, made, most = random_model("llama tied"), list[Plan](), list[int]()
    layers = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "up_proj")]
    tied = ["model.embed_tokens", "lm_head"] if rounding == "gptq" else []
    plan_of, taken = Plan.of, _Blocks._taken

    def kept(model: nn.Module, recipe: Recipe) -> Plan:
        made.append(plan_of(model, recipe))
        return made[-1]

    def watched(self: _Blocks, *args: Any) -> Any:
        most.append(sum(tensor.nbytes for tensor in made[0].tensors.values()))
        return taken(self, *args)

    monkeypatch.setattr(Plan, "of", kept)
    monkeypatch.setattr(_Blocks, "_taken", watched)
    found, _ = round_blocks(model, dict.fromkeys(layers + tied, "Q4_0"), [{"input_ids": ids()}], rounding=rounding)
    assert set(found) == {*layers, *tied}
    assert 0 < max(most) < 1.1 * model.model.layers[0].mlp.gate_proj.weight.nbytes


def test_a_layer_that_is_not_called_is_left_out() -> None:
    data, _ = round_blocks(Two(), {"first": "Q4_0", "third": "Q4_0"}, [torch.randn(300, 64)])
    assert set(data) == {"first"}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("llama", torch.float32, marks=pytest.mark.slow),
        ("llama tied", torch.bfloat16),
        pytest.param("llama biases", torch.float16, marks=pytest.mark.slow),
        ("qwen3", torch.float32),
    ],
)
def test_a_model_is_nearer_in_the_same_bytes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(kind).to(dtype)
    batches = [torch.randint(0, 80, (8, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    off, files, wanted = {}, {}, run(model).float()
    for rounding in ("mse", "gptq", "learned"):
        data = ({"input_ids": ids} for ids in batches)  # of which each can be taken once
        done = quietly(model, tmp_path / rounding, "Q4_0", tokenizer=False, data=data, rounding=rounding)
        files[rounding] = read_gguf(tmp_path / rounding).tensors
        off[rounding] = float((run(qfx.import_gguf(tmp_path / rounding)).float() - wanted).norm())
        assert done.nbytes == (tmp_path / "mse").stat().st_size
    assert off["gptq"] < 0.9 * off["mse"] and off["learned"] < 0.9 * off["mse"]
    assert [t.tensor_type for t in files["gptq"].values()] == [t.tensor_type for t in files["mse"].values()]
    changed = {n for n, t in files["gptq"].items() if not (t.data == files["mse"][n].data).all()}
    assert changed == {n for n in files["mse"] if "tied" in kind or n != "token_embd.weight"} - {
        n for n in files["mse"] if "norm" in n or n.endswith("bias")
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "it is read alone"


def test_what_is_packed_keeps_its_values(tmp_path: Path) -> None:
    model = random_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        qfx.quantize(model, {"rules": [{"target": "*.mlp.*", "w": "i8/g32/f16"}]})
    data = [{"input_ids": torch.randint(0, 80, (16, 32))}]
    for rounding in ("mse", "gptq"):
        quietly(model, tmp_path / rounding, "Q4_0", tokenizer=False, data=data, rounding=rounding)
    a, b = (read_gguf(tmp_path / name).tensors for name in ("mse", "gptq"))
    same = {name for name in a if (a[name].data == b[name].data).all()}
    assert {name for name in a if "ffn" in name} <= same
    assert not any("attn_q" in name or "attn_output.w" in name for name in same)


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = random_model("llama")
    ids = torch.randint(0, 80, (8, 32), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    for name, filler in (("a", 7), ("b", 70)):
        batch = {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
        quietly(model, tmp_path / name, "Q4_0", tokenizer=False, data=[batch], rounding="gptq")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_learned_blocks_follow_each_other() -> None:
    """The second block is fitted to the float model's results behind the first one as it is rounded."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(2)]
    model, x = nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers)), inputs(512, 64)
    kinds = {"0.0": "Q4_1", "1.0": "Q4_0"}
    learned, notes = round_blocks(model, kinds, list(x.split(64)), rounding="learned")
    assert notes == []
    searched = {n: encode(layer.weight.detach(), kind) for (n, kind), layer in zip(kinds.items(), layers, strict=True)}

    @torch.no_grad()
    def off(data: dict[str, Tensor]) -> float:
        y = x
        for (name, kind), layer in zip(kinds.items(), layers, strict=True):
            held = block_type(kind)
            w = unpack(data[name].reshape(-1, held.nbytes), held).values().reshape(64, 64)
            y = torch.relu(y @ w.T + layer.bias)
        return float((y - model(x)).norm())

    assert off(learned) < 0.8 * off(searched)


def exported(model: Any, path: Path, mix: str = "Q8_0", **options: Any) -> dict[str, Any]:
    """Tensors of the file of a model rounded by GPTQ, strictly."""
    data = options.pop("data", None) or [{"input_ids": torch.randint(0, 80, (16, 32))}]
    qfx.export_gguf(model, path, mix, tokenizer=False, data=data, rounding="gptq", **options)
    return {name: torch.from_numpy(tensor.data.copy()) for name, tensor in read_gguf(path).tensors.items()}


def test_a_table_that_is_the_output_too_is_no_remark(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    """A file of a tied model has it once, whatever the rounding."""
    exported(random_model("llama tied"), tmp_path / "m.gguf", strict=True)
    assert not [w for w in recwarn if "reads the same weight" in str(w.message)]


def test_data_that_goes_round_the_table(tmp_path: Path) -> None:
    """The output reads it all the same."""
    model = random_model("llama tied")
    found = exported(model, tmp_path / "a", strict=True, data=[{"inputs_embeds": torch.randn(8, 32, 64)}])
    quietly(model, tmp_path / "b", "Q8_0", tokenizer=False)
    plain = torch.from_numpy(read_gguf(tmp_path / "b").tensors["token_embd.weight"].data.copy())
    assert 0.01 < float((found["token_embd.weight"] != plain).float().mean()) < 0.6


def test_one_weight_of_two_layers_is_rounded_once(tmp_path: Path) -> None:
    model = random_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    with pytest.warns(QfxWarning, match=r"'model\.layers\.1\.mlp\.up_proj' reads the same weight"):
        found = exported(model, tmp_path / "m.gguf", strict=True)
    assert torch.equal(found["blk.0.ffn_up.weight"], found["blk.1.ffn_up.weight"])
    assert not torch.equal(found["blk.0.ffn_down.weight"], found["blk.1.ffn_down.weight"])


def test_a_weight_that_the_graph_computes_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model = random_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.warns(
        QfxWarning, match=r"0\.mlp\.up_proj: .* has no weight of this name, so not 'gptq' rounds it but 'mse'"
    ):
        found = exported(model, tmp_path / "m.gguf")
    data = found["blk.0.ffn_up.weight"].reshape(-1, 34)
    values = unpack(data, block_type("Q8_0")).values().reshape(96, 64)
    assert torch.allclose(values, model.model.layers[0].mlp.up_proj.weight, atol=1e-3)


def test_a_file_without_blocks_says_so(tmp_path: Path) -> None:
    with pytest.warns(QfxWarning, match="'gptq' rounds float linears into blocks, of which this file in F16 has none"):
        exported(random_model("llama"), tmp_path / "m.gguf", "F16", strict=True)


def test_refusals(tmp_path: Path) -> None:
    model, target = random_model("llama"), tmp_path / "m.gguf"
    batch = {"input_ids": torch.randint(0, 80, (8, 32))}
    with pytest.raises(ValueError, match=r"rounding='gptq' needs data\n  next step: pass data="):
        qfx.export_gguf(model, target, "Q4_0", tokenizer=False, rounding="gptq")
    with pytest.raises(ValueError, match="unknown rounding 'gtpq': did you mean 'gptq'"):
        qfx.export_gguf(model, target, "Q4_0", tokenizer=False, data=[batch], rounding="gtpq")
    with pytest.raises(ValueError, match="the data holds no batch"):
        qfx.export_gguf(model, target, "Q4_0", tokenizer=False, data=[], rounding="gptq")
    for one, message in ((batch, r"found one dict\n  next step: put it in a list"), (5, "expected, found int")):
        with pytest.raises(ValueError, match=message):
            qfx.export_gguf(model, target, "Q8_0", tokenizer=False, data=one, rounding="gptq")  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quietly(model, target, "Q4_0", tokenizer=False, data=[batch], rounding="gptq")
    assert list(tmp_path.iterdir()) == []


class Looking(nn.Module):
    """A forward that torch.export does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) if float(x.sum()) > 0 else self.fc(-x)
        return y


def test_a_model_that_is_no_one_graph() -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.export"):
        round_blocks(Looking(), {"fc": "Q4_0"}, [torch.ones(8, 32)])
