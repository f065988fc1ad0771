"""What neither becomes a GGUF file nor is read from one, with its message; and what is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.interop import gguf_import
from qfx.interop.gguf_file import read_gguf
from tests import tiny
from tests.gguf_models import SIZES, random_model, run
from tests.processes import python

transformers = pytest.importorskip("transformers", reason="the models are transformers models: pip install qfx[hf]")
gguf = pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(4, 4), r"a model of transformers is needed[\s\S]*found: Linear"),
        (lambda: 3, r"a model of transformers is needed[\s\S]*found: int"),
    ],
)
def test_what_is_no_model(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        qfx.export_gguf(model(), tmp_path / "m.gguf")


def test_other_architectures(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=80)
    with pytest.raises(UnsupportedError, match=r"expected: llama, mistral, qwen2, qwen3, bert[\s\S]*model type 'gpt2'"):
        qfx.export_gguf(transformers.GPT2LMHeadModel(config), tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="found: activation 'gelu'"):
        qfx.export_gguf(random_model("llama", hidden_act="gelu"), tmp_path / "m.gguf")
    dynamic = random_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedError, match="found: rotary embedding 'dynamic'"):
        qfx.export_gguf(dynamic, tmp_path / "m.gguf", tokenizer=False)
    with pytest.raises(UnsupportedError, match=r"LlamaModel is no whole LlamaForCausalLM[\s\S]*lm_head|model.embed"):
        qfx.export_gguf(random_model("llama").model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_was_added_to_the_model(tmp_path: Path) -> None:
    model = random_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"no place in GGUF[\s\S]*model.layers.0.mlp.extra.weight"):
        qfx.export_gguf(model, tmp_path / "m.gguf", tokenizer=False)


class Adapted(nn.Module):
    """A linear with what an adapter adds, as peft puts it into a model."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias


def test_an_adapter_is_not_lost(tmp_path: Path) -> None:
    model = random_model("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(UnsupportedError, match=r"no place in GGUF[\s\S]*self_attn.q_proj.lora_A.weight"):
        qfx.export_gguf(model, tmp_path / "m.gguf", "F16", tokenizer=False)
    bert = transformers.BertModel(transformers.BertConfig(**SIZES))
    bert.encoder.layer[0].attention.self.query = Adapted(bert.encoder.layer[0].attention.self.query)
    with pytest.raises(UnsupportedError, match=r"no place in GGUF[\s\S]*self.query.lora_A.weight"):
        qfx.export_gguf(bert, tmp_path / "m.gguf", "F16", tokenizer=False)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    for mix in ("Q8_0", "F16", "F32"):
        with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight.*not finite"):
            qfx.export_gguf(model, tmp_path / "m.gguf", mix, tokenizer=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown GGUF type 'Q4_X'"):
        qfx.export_gguf(random_model("llama"), tmp_path / "m.gguf", "Q4_X")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    qfx.export_gguf(random_model("llama"), path, "Q8_0", tokenizer=False)
    return path


@pytest.mark.parametrize("keep", [2, 40, 900, 0.5, 0.98])
def test_files_cut_short(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(ValueError, match=r"cut short|no GGUF file"):
        qfx.import_gguf(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        qfx.import_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is no such file")
    with pytest.raises(ValueError, match="is no GGUF file"):
        qfx.import_gguf(tmp_path / "text.gguf")


def rewritten(
    file: Path, arch: str = "llama", leave_out: str = "", tensors: dict[str, Any] | None = None, **said: int
) -> Path:
    """The file again with other metadata (said: of keys that end so) or tensors."""
    held = read_gguf(file)
    out = file.with_name("other.gguf")
    writer = gguf.GGUFWriter(str(out), arch)
    for name, value in held.fields.items():
        if name != leave_out and name.startswith(("llama.", "tokenizer.")):
            kind = writer.add_string if isinstance(value, str) else writer.add_uint32
            kind = writer.add_float32 if isinstance(value, float) else kind
            kind(name, said.get(name.rpartition(".")[2], value))
    for name, tensor in held.tensors.items():
        if name != leave_out:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_files_that_do_not_hold_their_model(file: Path) -> None:
    qfx.import_gguf(rewritten(file))  # the rewriting itself harms nothing
    with pytest.raises(ValueError, match=r"tensor 'blk.1.ffn_up.weight', for 'model.layers.1.mlp.up_proj.weight'"):
        qfx.import_gguf(rewritten(file, leave_out="blk.1.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"not complete[\s\S]*the key 'llama.block_count'"):
        qfx.import_gguf(rewritten(file, leave_out="llama.block_count"))
    with pytest.raises(ValueError, match=r"expected: tensors of LlamaForCausalLM only[\s\S]*also blk.0.more.weight"):
        qfx.import_gguf(rewritten(file, tensors={"blk.0.more.weight": torch.ones(2).numpy()}))
    with pytest.raises(UnsupportedError, match="of architecture 'gemma' cannot be read"):
        qfx.import_gguf(rewritten(file, arch="gemma"))


@pytest.mark.parametrize("key", ["block_count", "vocab_size", "feed_forward_length", "head_count", "head_count_kv"])
def test_sizes_that_the_tensors_do_not_have_make_no_model(
    key: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit in the metadata would be a model of many GB."""
    monkeypatch.setattr(gguf_import, "_empty", None)
    changed: dict[str, Any] = {key: 1 << 27}
    with pytest.raises(ValueError, match=r"metadata (.*\n.*|.*)\d{9}") as caught:
        qfx.import_gguf(rewritten(file, **changed))
    assert "other.gguf" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))


def test_rows_of_another_number(file: Path) -> None:
    wide = rewritten(file, leave_out="output_norm.weight", tensors={"output_norm.weight": torch.ones(3).numpy()})
    with pytest.raises(ValueError, match=r"'output_norm.weight' of shape \[64\][\s\S]*found: \[3\]"):
        qfx.import_gguf(wide)


def test_types_that_qfx_does_not_read(file: Path) -> None:
    held = torch.ones(2, 3, dtype=torch.float64).numpy()
    with pytest.raises(UnsupportedError, match="tensor 'blk.0.more.weight' is of type F64"):
        qfx.import_gguf(rewritten(file, tensors={"blk.0.more.weight": held}))


def test_weights_that_become_float_are_told_once(tmp_path: Path) -> None:
    model = random_model("llama", hidden_size=256, intermediate_size=256)
    qfx.export_gguf(model, tmp_path / "m.gguf", "Q4_K_S", tokenizer=False)
    with pytest.warns(QfxWarning) as told:
        qfx.import_gguf(tmp_path / "m.gguf")
    said = [str(w.message).partition("; ")[0].partition(" (")[::2] for w in told]
    assert [names.partition(", ")[0] for names, _ in said] == [
        "model.embed_tokens.weight",
        "model.layers.0-1.self_attn.v_proj.weight",
    ]
    assert [text for _, text in said] == [
        "13 nodes): no format has the values of Q4_K blocks: it is float",
        "2 nodes): no format has the values of Q5_K blocks: it is float",
    ]
    with pytest.raises(UnsupportedError, match="no format has the values of Q4_K"):
        qfx.import_gguf(tmp_path / "m.gguf", strict=True)


def test_an_imported_model_needs_the_file_no_more(file: Path) -> None:
    model = qfx.import_gguf(file, dtype=torch.float64)
    wanted = run(model)
    shutil.rmtree(file.parent)
    assert torch.equal(run(model), wanted)
    assert wanted.dtype == torch.float64


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    """Also where but the last bytes, which lie in a buffer, find no room."""
    out = tmp_path / "m.gguf"
    whole = qfx.export_gguf(tiny.build("llama"), out, "F16", tokenizer=False).path.read_bytes()
    code = (
        "import resource, signal, qfx\nfrom tests import tiny\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "for less in (1, 100, 5000):\n"
        f"  resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole)} - less, -1))\n"
        f"  try: qfx.export_gguf(tiny.build('llama', 1), {str(out)!r}, 'F16', tokenizer=False)\n"
        "  except OSError as error: print(error)\n"
    )
    assert python(code).count("the disk is full; nothing was changed") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and out.read_bytes() == whole


def test_exports_replace_files_whole(file: Path) -> None:
    before = file.read_bytes()
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        qfx.export_gguf(model, file, "Q8_0", tokenizer=False)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
