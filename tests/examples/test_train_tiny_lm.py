"""Training lowers the loss, and the committed model is what its README says."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import train_tiny_lm
from examples.lm_eval import nll, perplexity
from examples.train_tiny_lm import Progress, Settings, batches, encode, learning_rate, model_config, train_tokenizer

ASSETS = Path(__file__).parents[1] / "assets"
ASSET = ASSETS / "tiny_lm"
TEXT = (ASSETS / "eval.txt").read_text(encoding="utf-8")
PERPLEXITY = {512: 29.588, 1024: 29.557}  # measured in float32


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(ASSET, local_files_only=True)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32, local_files_only=True)
    assert isinstance(loaded, LlamaForCausalLM)
    return loaded.eval()


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return encode(tokenizer, [TEXT])


def small_model(seed: int = 0) -> LlamaForCausalLM:
    config = model_config(300)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 16
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def small_run(steps: int, seed: int = 0) -> tuple[LlamaForCausalLM, Progress, list[bool]]:
    stream = encode(train_tokenizer([TEXT], 300), [TEXT])
    model, settings, better = small_model(seed), Settings(steps=steps, seed=seed, batch=1, checks=4), list[bool]()
    progress = train_tiny_lm.train(model, stream, stream[:2048], settings, lambda _, best: better.append(best))
    return model, progress, better


def test_training_lowers_the_loss_and_repeats_exactly() -> None:
    model, progress, better = small_run(24)
    assert progress.step == 24 and progress.done == 1.0
    held = [row[3] for row in progress.curve]
    assert len(held) == len(better) == 5 and held[0] > 5.4
    assert held[-1] < held[0] - 0.5 and progress.best == min(held) and better[-1]
    again, _, _ = small_run(24)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _, _ = small_run(2, seed=1)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_the_script_runs_as_a_file(tmp_path: Path) -> None:
    script = Path(train_tiny_lm.__file__).resolve()
    (tmp_path / "text.txt").write_text(TEXT[:4000], encoding="utf-8")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "json.py").write_text("\n".join(f"value_{i} = {i}" for i in range(3000)), encoding="utf-8")
    options = ["--out", "asset", "--steps", "1", "--threads", "1", "--eval-text", "text.txt", "--stdlib", "lib"]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2,755,008 parameters" in done.stdout and "best validation loss" in done.stdout
    assert re.search(r"\| 1 \| \d+\.\d \| 7\.", (tmp_path / "asset" / "README.md").read_text(encoding="utf-8"))


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(i / 1000, 1.0) for i in range(1001)]
    assert rates[0] == 0.0 and max(rates) > 0.99 and rates.index(max(rates)) in range(25, 35)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_batches_see_each_window_once_an_epoch() -> None:
    stream = torch.arange(33)
    shapes, epoch = [], list[int]()
    for batch in islice(batches(stream, 2, seed=0, window=8), 4):
        shapes.append(tuple(batch.shape))
        if len(epoch) < 32 - 16:
            epoch += batch.flatten().tolist()
    assert shapes == [(4, 4), (4, 4), (4, 4), (2, 8)]
    assert len(set(epoch)) == len(epoch)
    with pytest.raises(ValueError, match="at least 24 tokens, found 20"):
        next(batches(torch.arange(20), 2, seed=0, window=8))


def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (TEXT, "  def f(x):\n\treturn 'é日本\U0001f600'\r\n", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 2048 and tokenizer.eos_token_id == 0


def test_save_writes_the_folder_whole_and_leaves_the_model(tmp_path: Path) -> None:
    tokenizer, model = train_tokenizer([TEXT], 300), small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = tmp_path / "asset"
    for text in ("first", "second"):
        train_tiny_lm.save(model, tokenizer, lambda text=text: text, out)  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]
    assert (out / "README.md").read_text() == "second"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def fails() -> str:
        raise RuntimeError("no numbers")

    with pytest.raises(RuntimeError, match="no numbers"):
        train_tiny_lm.save(model, tokenizer, fails, out)
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]
    assert (out / "README.md").read_text() == "second" and (out / "model.safetensors").is_file()


def test_asset_is_small_and_whole() -> None:
    names = {path.name for path in ASSET.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names == wanted | {"README.md"}
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 6_000_000
    weights = load_file(ASSET / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_asset_is_grouped_query_and_tied(model: LlamaForCausalLM) -> None:
    assert 1e6 <= model.num_parameters() <= 3e6
    assert model.config.num_attention_heads == 3 * model.config.num_key_value_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("window", [512, 1024])
def test_asset_scores(model: LlamaForCausalLM, ids: Tensor, window: int) -> None:
    found = perplexity(model, ids, window)
    readme = (ASSET / "README.md").read_text(encoding="utf-8")
    told = re.search(rf"perplexity per token, window {window:,} \| ([\d.]+) \|", readme)
    assert told and "PSF License" in readme
    assert found <= PERPLEXITY[window] * 1.02
    assert found == pytest.approx(float(told[1]), rel=1e-3)


def test_asset_uses_its_long_context(model: LlamaForCausalLM, ids: Tensor) -> None:
    assert nll(model, ids[:8192], 1024) < nll(model, ids[:8192], 64) - 0.1


def test_asset_knows_python(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer("<|endoftext|>class Reader:\n    def read(", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("<|endoftext|>class Reader:\n    def read(self")
