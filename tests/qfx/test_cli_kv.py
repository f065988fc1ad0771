"""`qfx kv`: the table, the numbers behind it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.qfx.commands import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds its configuration alone."""
    found = tmp_path_factory.mktemp("model")
    config = tiny.config("llama")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(found)
    return found


def test_the_table(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    result = run("kv", folder, "--formats", "i8,kv-k4v2,i8:u2/g8/f16", "--memory", "1MiB", "--json", file)
    assert result.exit_code == 0, result.output
    assert "one sequence" in result.output and "the model takes 32" in " ".join(result.output.split())
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    names = [one["name"] for one in found["caches"]]
    assert names == ["float", "i8", "kv-k4v2", "i8:u2/g8/f16"]
    assert all(name in result.output for name in names)
    plain, eight = found["caches"][:2]
    assert (plain["token_bytes"], eight["token_bytes"]) == (128, 36)
    assert eight["ratio"] == eight["cache_bytes"] / plain["cache_bytes"] == 1, "all 32 tokens are the newest"
    assert found["context"] == 32 and plain["cache_bytes"] == 32 * 128
    assert plain["longest"] < eight["longest"] < 2**20 / 36
    assert f"{eight['longest']:,}" in result.output


@pytest.mark.slow
def test_no_room(folder: Path) -> None:
    result = run("kv", folder, "--formats", "i8", "--memory", "9kB", "--batch", "2", "--context", "100")
    assert result.exit_code == 0 and result.output.count("no room") == 2 and "2 sequences" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "much"), "an amount of memory"),
        (("--dtype", "i8"), "--dtype is f32, f16, bf16"),
        (("--formats", "i9"), "i9"),
        (("--recipe", "w4a61"), "unknown preset 'w4a61'"),
        (("--recipe", "w4a16-gptq"), "chooses its formats by data"),
    ],
)
def test_mistakes_are_short_messages(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("kv", folder, *arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_quantized_model_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = run("kv", tmp_path)
    assert result.exit_code == 2 and "is quantized" in result.output
