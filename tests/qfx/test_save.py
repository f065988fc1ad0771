"""qfx.save and qfx.load: a quantized model comes back bit for bit, whole or not at all. The zoo: test_quantize_zoo."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import qfx
from qfx.live.modules import QuantLinear
from qfx.packing import unpack_zeros
from qfx.save import load, save
from tests.graphs import Function
from tests.seeded import randn
from tests.zoo import ZOO, ids

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


class Encoder(nn.Module):
    """A table tied to a head, a shared layer, a patch convolution, a parameter of its own and a passing buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8, padding_idx=1), nn.Linear(8, 12)
        self.head.weight = self.table.weight
        self.first = nn.Linear(8, 8)
        self.second, self.patch = self.first, nn.Conv1d(8, 8, 2, stride=2)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)
        self.bias_again = self.first.bias
        self.register_buffer("passing", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.table(ids)))) + self.passing
        x = self.patch(x.transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.head(self.norm(F.linear(x, self.mix)))
        return found


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


MODELS: list[tuple[str, Callable[[], nn.Module], Tensor]] = [
    ("encoder", Encoder, torch.arange(8).reshape(2, 4)),
    ("bare linear", lambda: nn.Linear(8, 4), randn(3, 8)),
    ("sequential", lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)), randn(3, 8)),
    ("root parameter", lambda: Function(lambda own, x: F.linear(x, own.w), w=randn(4, 8)), randn(3, 8)),
    ("circular", lambda: nn.Sequential(nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular")), randn(2, 3, 9)),
    ("layer", lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), randn(2, 5, 16)),
]


# Every recipe on the encoder, every model in one recipe.
BOTH = [
    pytest.param(*model, recipe, id=f"{model[0]}-{recipe}", marks=[] if quick else pytest.mark.slow)
    for model in MODELS
    for recipe in ("w8a8", "w8a8-smooth", "w4a16", "nf4")
    for quick in [model[0] == "encoder" or recipe == ("w4a16" if model[0] == "layer" else "w8a8")]
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "build", "x", "recipe"), BOTH)
def test_plain_models_come_back(
    name: str, build: Callable[[], nn.Module], x: Tensor, recipe: str, tmp_path: Path
) -> None:
    model = qfx.quantize(make(build), recipe, [x])
    wanted = model(x)
    save(model, tmp_path)
    skeleton = make(build, seed=1)
    skeleton.train()
    loaded = load(tmp_path, skeleton)
    assert torch.equal(loaded(x), wanted)
    assert not any(m.training for m in loaded.modules())
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in model.modules()]
    rows_before, rows_after = qfx.report(model).rows, qfx.report(loaded).rows
    assert rows_before == rows_after and len(rows_after) > 0
    save(loaded, tmp_path / "again")
    files = [json.loads((folder / "qfx.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


def test_what_was_one_is_one_again(tmp_path: Path) -> None:
    model = qfx.quantize(make(Encoder), "w8a8", [torch.arange(8).reshape(2, 4)])
    save(model, tmp_path)
    loaded: Any = load(tmp_path, make(Encoder, seed=1))
    assert loaded.first is loaded.second
    assert loaded.table.w_codes.data_ptr() == loaded.head.w_codes.data_ptr()
    assert loaded.bias_again is loaded.first.bias
    assert loaded.table.padding_idx == 1 and loaded.first.sqnr_db == model.get_submodule("first").sqnr_db
    stored = sum(t.numel() * t.element_size() for t in {id(t): t for t in loaded.state_dict().values()}.values())
    assert (tmp_path / "model.safetensors").stat().st_size < stored + 4000


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        *(pytest.param("gpt2", dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.bfloat16)),
        pytest.param("llama", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_casts_survive(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    model = qfx.quantize(model).to(dtype)
    save(model, tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        wanted, found = model(**inputs).logits, loaded(**inputs).logits
    assert wanted.dtype == found.dtype == dtype and torch.equal(wanted, found)
    kinds = {n: t.dtype for n, t in (*model.named_buffers(), *model.named_parameters())}
    assert {n: t.dtype for n, t in (*loaded.named_buffers(), *loaded.named_parameters())} == kinds


def test_transformers_configs_come_along(tmp_path: Path) -> None:
    model: Any = ZOO["gpt2"]()[0]
    model.generation_config.max_new_tokens = 5
    model.generation_config.pad_token_id = 0
    model.config._attn_implementation = "eager"
    model = qfx.quantize(model)
    save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "qfx.json"
    ]  # fmt: skip
    loaded: Any = load(tmp_path)
    assert isinstance(loaded, transformers.GPT2LMHeadModel)
    assert loaded.generation_config.max_new_tokens == 5 and loaded.config._attn_implementation == "eager"
    first = model.generate(ids(), do_sample=False)
    assert torch.equal(first, loaded.generate(ids(), do_sample=False)) and first.shape[1] == ids().shape[1] + 5


def test_parts_keep_the_attention_that_each_runs(tmp_path: Path) -> None:
    """Also where a part knows no other: the backbone of a DETR."""
    model, inputs = ZOO["clip"]()
    model.set_attn_implementation({"": "sdpa", "vision_config": "eager"})  # type: ignore[operator]
    qfx.save(qfx.quantize(model, "w8a8"), tmp_path)
    loaded: Any = qfx.load(tmp_path)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert loaded.vision_model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_loading_uses_up_no_random_numbers_and_no_weights(tmp_path: Path) -> None:
    save(qfx.quantize(ZOO["gpt2"]()[0]), tmp_path)
    state = torch.random.get_rng_state()
    loaded = load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.dim() for p in loaded.parameters()} == {1} or all(
        "wpe" in n for n, p in loaded.named_parameters() if p.dim() > 1
    )


def test_the_compiled_model_saves_the_module_within(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = qfx.quantize(make(lambda: nn.Sequential(nn.Linear(8, 4))), "w8a8", [randn(3, 8)])
    save(torch.compile(model, backend="qfx"), tmp_path)  # type: ignore[arg-type]
    loaded = load(tmp_path, make(lambda: nn.Sequential(nn.Linear(8, 4)), seed=1))
    assert torch.equal(loaded(randn(3, 8)), model(randn(3, 8)))


@torch.no_grad()
def test_a_folder_of_version_1_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a byte for each zero point."""
    model, inputs = ZOO["llama"]()
    model = qfx.quantize(model, qfx.Recipe(name="r", rules=(qfx.Rule(target="linear", w="u3/g8"),)))
    wanted = model(**inputs).logits
    for module in model.modules():
        if isinstance(module, QuantLinear):
            zero = unpack_zeros(module.w_zero, qfx.Format.parse(module.w_format), module.w_scale)
            assert zero is not None and module.w_zero is not None and zero.shape[-1] > module.w_zero.shape[-1]
            module.w_zero = zero
    for name in ("qfx.save", "qfx.hf.quantization_config"):
        monkeypatch.setattr(sys.modules[name], "VERSION", 1)
    save(model, tmp_path)
    assert json.loads((tmp_path / "qfx.json").read_text())["version"] == 1
    monkeypatch.undo()
    for reader in (load, transformers.AutoModelForCausalLM.from_pretrained):
        assert torch.equal(reader(tmp_path)(**inputs).logits, wanted), reader


def test_a_failed_save_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = qfx.quantize(make(lambda: nn.Sequential(nn.Linear(8, 4))), "w8a8", [randn(3, 8)])
    save(first, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(sys.modules["qfx.save"], "_digest", lambda _: 1 / 0)
    other = qfx.quantize(make(lambda: nn.Sequential(nn.Linear(8, 4)), seed=2), "w4a16", [randn(3, 8)])
    with pytest.raises(ZeroDivisionError):
        save(other, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ZeroDivisionError):
        save(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 4))

    save(qfx.quantize(make(build), "w8a8", [randn(3, 8)]), tmp_path)
    other = qfx.quantize(make(build, seed=2), "w4a16", [randn(3, 8)])
    save(other, tmp_path)
    assert torch.equal(load(tmp_path, make(build))(randn(3, 8)), other(randn(3, 8)))


@pytest.mark.parametrize("file", ["config.json", pytest.param("generation_config.json", marks=pytest.mark.slow)])
def test_configs_that_are_edited_hold_which_is_told(file: str, tmp_path: Path) -> None:
    model, inputs = ZOO["gpt2"]()
    save(qfx.quantize(model), tmp_path)
    (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), "pad_token_id": 7}))
    with pytest.warns(qfx.QfxWarning, match=f"{file} was altered\n  next step: nothing, if you changed it"):
        loaded: Any = load(tmp_path)
    assert (loaded.config if file == "config.json" else loaded.generation_config).pad_token_id == 7
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("file", ["config.json", pytest.param("generation_config.json", marks=pytest.mark.slow)])
def test_truncated_and_missing_configs_are_refused(file: str, tmp_path: Path) -> None:
    save(qfx.quantize(ZOO["gpt2"]()[0]), tmp_path)
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=f"{file} (.|\n)*copy it again"):
        load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load(tmp_path)


def test_an_unknown_class_is_told(tmp_path: Path) -> None:
    class Own(transformers.GPT2LMHeadModel):  # type: ignore[misc]
        """A class that transformers does not have."""

    model = Own(ZOO["gpt2"]()[0].config).eval()
    model = qfx.quantize(model)
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"no class 'Own'(.|\n)*qfx\.load\(folder, model\)"):
        load(tmp_path)
    loaded = load(tmp_path, Own(copy.deepcopy(model.config)))
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    float_model = nn.Sequential(nn.Linear(8, 4), Extra(4, 4)).eval()
    model = qfx.quantize(float_model, qfx.Recipe.parse("w8a8").override(ignore=("1",)), [randn(3, 8)])
    with pytest.raises(ValueError, match=r"'1\._extra_state' is no tensor but dict"):
        save(model, tmp_path)


def test_weights_over_several_files(tmp_path: Path) -> None:
    model: Any = qfx.quantize(ZOO["gpt2"]()[0])
    save(model, tmp_path)
    whole = (tmp_path / "model.safetensors").stat().st_size
    save(model, tmp_path, shard_bytes=whole // 3)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files), "and the one of before is gone"
    for found in (load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(found(ids()).logits, model(ids()).logits)
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists() and load(tmp_path) is not None
    save(model, tmp_path / "other", shard_bytes=1)
    (sorted((tmp_path / "other").glob("*.safetensors"))[1]).unlink()
    with pytest.raises(FileNotFoundError, match="no such safetensors file"):
        load(tmp_path / "other")
    with pytest.raises(ValueError, match="1 byte or more, found a limit of 0"):
        save(model, tmp_path, shard_bytes=0)
