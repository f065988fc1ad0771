"""Folders opened without reading their weights: the same model, quantized the same, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import qfx
from qfx.errors import QfxWarning
from qfx.storage import spill, streamed
from qfx.storage.spill import Spill, is_mapped

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6) * 7 % 290


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, **more)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SMALL))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=32))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3))


@pytest.fixture
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the smallest tensor has a place in a file."""
    monkeypatch.setattr(spill, "LEAST", 1)


def saved(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: str = "50KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal, or are on one side only."""
    return sorted(one.keys() ^ other.keys()) + [k for k in one if k in other and not torch.equal(one[k], other[k])]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return not different(one, other)


class TestOpen:
    @pytest.mark.parametrize("make", [llama, bert, gpt2, mixtral, lambda: llama(tie_word_embeddings=True)])
    def test_it_is_the_model_that_transformers_loads(
        self, tmp_path: Path, make: Callable[[], PreTrainedModel], all_in_files: None
    ) -> None:
        model = saved(make(), tmp_path)
        wanted = type(make()).from_pretrained(model, dtype=torch.bfloat16).eval()
        found: Any = streamed.load(model).model
        assert type(found) is type(wanted) and not found.training
        assert same(states(found), states(wanted))
        assert all(is_mapped(p) and p.dtype == torch.bfloat16 for p in found.parameters())
        buffers = dict(wanted.named_buffers())
        assert all(torch.equal(b, buffers[name]) and not b.is_meta for name, b in found.named_buffers())
        ties = [name for name, _ in found.named_parameters()]
        assert ties == [name for name, _ in wanted.named_parameters()], "what was tied is"
        with torch.no_grad():
            assert torch.equal(found(IDS).logits, wanted(IDS).logits)

    def test_merged_and_cast_weights_leave_memory_as_they_are_made(
        self, tmp_path: Path, all_in_files: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mixtral's experts lie one by one in the file and are one weight in the model; no two wait in memory."""
        made, rested, settled, rest = list[Tensor](), set[int](), list[list[str]](), spill.rest

        def kept(place: Spill, tensor: Tensor) -> Tensor:
            made.append(keep(place, tensor))
            return made[-1]

        def resting(*tensors: Tensor) -> None:
            rested.update(tensor.data_ptr() for tensor in tensors)
            rest(*tensors)

        def checked(model: nn.Module, place: Spill) -> None:
            settled.append([name for name, p in model.named_parameters() if not is_mapped(p)])
            settle(model, place)

        keep, settle = Spill.keep, streamed._settled
        monkeypatch.setattr(Spill, "keep", kept)
        monkeypatch.setattr(streamed, "rest", resting)
        monkeypatch.setattr(streamed, "_settled", checked)
        folder = saved(mixtral(), tmp_path)
        hooks = torch.nn.modules.module._global_parameter_registration_hooks
        model = streamed.load(folder).model
        merged = [p for name, p in model.named_parameters() if ".experts." in name]
        assert len(merged) == 4 and settled == [[]]
        assert {p.data_ptr() for p in merged} <= {t.data_ptr() for t in made} & rested
        assert not hooks, "nothing global is left"
        assert all(getattr(p, "_is_hf_initialized", False) for p in merged)

    def test_modules_of_other_threads_are_left_alone(self, tmp_path: Path, all_in_files: None) -> None:
        others: list[nn.Module] = []
        with streamed._kept_as_made(Spill(tmp_path), {}):
            worker = threading.Thread(target=lambda: others.append(nn.Linear(64, 64)))
            worker.start()
            worker.join()
            assert is_mapped(nn.Linear(64, 64).weight)
        assert not is_mapped(others[0].get_parameter("weight")) and not is_mapped(nn.Linear(64, 64).weight)

    def test_one_file_and_a_generation_config(self, tmp_path: Path) -> None:
        model = llama()
        model.generation_config.max_new_tokens = 3
        found: Any = streamed.load(saved(model, tmp_path, dtype=torch.float32, shards="1GB")).model
        assert found.dtype == torch.float32 and (tmp_path / streamed.SINGLE).is_file()
        assert found.generate(IDS, do_sample=False).shape == (2, 9)
        assert found.config.name_or_path == str(tmp_path)

    def test_the_dtype_is_the_one_that_most_weights_have(self, tmp_path: Path) -> None:
        saved(llama(), tmp_path, shards="1GB")
        tensors = load_file(tmp_path / streamed.SINGLE)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        save_file(tensors, tmp_path / streamed.SINGLE)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
        assert {p.dtype for p in streamed.load(tmp_path).model.parameters()} == {torch.bfloat16}

    def test_tensors_that_are_not_aligned_are_read(self, tmp_path: Path, all_in_files: None) -> None:
        values = {"a": torch.arange(3, dtype=torch.int8), "b": torch.arange(5.0), "c": torch.zeros(0, 2)}
        fields, data = {}, b""
        for name, kind in (("a", "I8"), ("b", "F32"), ("c", "F32")):
            raw = values[name].numpy().tobytes()
            shape = list(values[name].shape)
            fields[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / streamed.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert same(streamed.mapped(tmp_path, Spill(tmp_path)), values)

    def test_weights_that_the_class_does_not_have_are_told(self, tmp_path: Path) -> None:
        saved(llama(), tmp_path, shards="1GB")
        tensors = load_file(tmp_path / streamed.SINGLE)
        save_file({**tensors, "model.extra": torch.zeros(2)}, tmp_path / streamed.SINGLE)
        with pytest.warns(QfxWarning, match=r"1 weights in .* are none of LlamaForCausalLM .* model\.extra"):
            streamed.load(tmp_path)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def patched(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def move_to_index(folder: Path) -> None:
    """The index names a tensor in a shard that does not hold it."""
    places = json.loads((folder / streamed.INDEX).read_text())["weight_map"]
    patched(folder, streamed.INDEX, weight_map=places | {"model.norm.weight": first_shard(folder).name})


def as_bin(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def wrong_place(folder: Path) -> None:
    path = first_shard(folder)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    next(value for name, value in fields.items() if name != "__metadata__")["shape"] = [1, 1]
    text = json.dumps(fields).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "shard missing": (lambda f: first_shard(f).unlink(), FileNotFoundError, r"1 of \d+ shards of .* model-00001-of"),
    "shard cut short": (lambda f: cut(first_shard(f), 8), ValueError, r"model-00001.* is truncated .* should have \d+"),
    "only a header": (lambda f: first_shard(f).write_bytes(b"\x20" + b"\0" * 9), ValueError, "header is not complete"),
    "empty shard": (lambda f: first_shard(f).write_bytes(b""), ValueError, r"\(0 bytes\): its header is not complete"),
    "no header": (lambda f: first_shard(f).write_bytes(b"\x02" + b"\0" * 7 + b"{]"), ValueError, "be read: JSON"),
    "other shape": (wrong_place, ValueError, r"the place of .* does not fit its shape \[1, 1\]"),
    "index cut short": (lambda f: cut(f / streamed.INDEX, 9), ValueError, "index.json is truncated or no index of sh"),
    "index of others": (move_to_index, ValueError, r"not the shard that .* expected: a tensor 'model.norm.weight'"),
    "pickled weights": (as_bin, FileNotFoundError, r"no weights that can stay on disk.*found: pytorch_model.bin"),
    "other class": (
        lambda f: patched(f, "config.json", architectures=["LlamaForQuestionAnswering"]),
        ValueError, r"not those of LlamaForQuestionAnswering.*found: \d+ of its weights are missing",
    ),
    "other sizes": (
        lambda f: patched(f, "config.json", intermediate_size=80),
        ValueError, r"not those of LlamaForCausalLM, which its config.json names",
    ),
    "other family": (
        lambda f: patched(f, "config.json", architectures=["BertModel"], model_type="bert"),
        ValueError, r"not those of BertModel.*next step: copy config.json and the weights of one model",
    ),
    "quantized": (
        lambda f: patched(f, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ValueError, "is quantized already, by gptq",
    ),
    "of qfx": (lambda f: (f / "qfx.json").write_text("{}"), ValueError, "is quantized already.*qfx.load opens it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused(tmp_path: Path, case: str) -> None:
    change, kind, message = BROKEN[case]
    saved(llama(), tmp_path)
    change(tmp_path)
    with pytest.raises(kind, match=f"(?s){message}"):
        streamed.load(tmp_path)


BATCHES = [{"input_ids": IDS + i} for i in range(3)]


class TestQuantize:
    @pytest.mark.parametrize(
        ("recipe", "data", "fields"),
        [
            ("w4a16", None, {}),
            pytest.param("w8a8", None, {"rounding": "mse"}, marks=pytest.mark.slow),
            pytest.param("w8a8-smooth", BATCHES, {}, marks=pytest.mark.slow),
            ("w4a16", BATCHES, {"rounding": "gptq"}),
        ],
        ids=["rtn", "mse", "smooth", "gptq"],
    )
    @pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")
    def test_a_folder_gives_what_the_module_gives(
        self, tmp_path: Path, recipe: str, data: Any, fields: dict[str, Any], all_in_files: None
    ) -> None:
        folder = saved(llama(), tmp_path / "model")
        before = digests(folder)
        plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        wanted = qfx.quantize(plain, recipe, data, **fields)
        found = qfx.quantize(folder, recipe, data, **fields)
        assert different(states(found), states(wanted)) == []
        packed = {name: b for name, b in found.named_buffers() if "w_" in name}
        assert packed and all(map(is_mapped, packed.values())), "nothing packed stays in memory"
        assert digests(folder) == before, "the files are only read"
        qfx.save(found, tmp_path / "out")
        assert different(states(qfx.load(tmp_path / "out")), states(wanted)) == []
        with torch.no_grad():
            assert torch.equal(found(IDS).logits, wanted(IDS).logits)

    def test_a_plan_of_a_folder_fits_it(self, tmp_path: Path) -> None:
        folder = saved(llama(), tmp_path / "model")
        made = qfx.plan(folder, "w8a8", rewrites=("norm-fold",))
        assert made.check(streamed.load(folder).model, strict=True) == []
        found = qfx.quantize(folder, made)
        assert different(states(found), states(qfx.quantize(llama().to(torch.bfloat16), made))) == []

    def test_rewritten_weights_go_to_the_temporary_file(self, tmp_path: Path, all_in_files: None) -> None:
        model = streamed.load(saved(llama(), tmp_path)).model
        table = model.get_parameter("lm_head.weight")
        found = qfx.quantize(model, "w8a8", rewrites=("norm-fold",), ignore=("*.mlp.up_proj",))
        changed = found.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert is_mapped(changed) and not torch.equal(changed, load_all(tmp_path)["model.layers.0.mlp.up_proj.weight"])
        assert torch.equal(table, load_all(tmp_path)["lm_head.weight"]), "who holds the old one keeps it"


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
