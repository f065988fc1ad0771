"""The benchmark of caches: bytes are those that are held, times are of steps, rows and verdicts say what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import DynamicCache

import qfx
from examples.benchmarks import kv_accuracy
from examples.benchmarks.kv_accuracy import FIRST, WINDOW, Entry
from qfx.kv.judge import Judgement


@pytest.fixture(scope="module")
def model() -> Any:
    return kv_accuracy.load()


def entry(name: str) -> Entry:
    return next(e for e in kv_accuracy.ENTRIES if e.name == name)


def per_token(model: Any) -> int:
    """Bytes of one token in float16."""
    config = model.config
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def test_bytes_are_those_of_tensors_counted_once(model: Any) -> None:
    cache = DynamicCache()
    kv_accuracy.fill(model, cache, 40)
    assert cache.get_seq_length() == 40
    assert kv_accuracy.size_of(cache, model.config) == kv_accuracy.held(cache) == 40 * per_token(model)
    layer = cache.layers[0]
    layer.again = [layer.keys, {"codes": torch.zeros(5, dtype=torch.uint8)}]
    assert kv_accuracy.held(cache) == 40 * per_token(model) + 5


def test_bytes_of_qfx_are_those_of_its_format(model: Any) -> None:
    """int8 of heads of 32 with a 16-bit scale: 34 bytes where float16 has 64."""
    cache = qfx.QuantizedCache(model.config, {"k": "i8", "v": "i8", "residual": 0})
    kv_accuracy.fill(model, cache, 64)
    assert kv_accuracy.size_of(cache, model.config) == pytest.approx(64 * per_token(model) * 34 / 64)
    assert cache.nbytes() >= kv_accuracy.size_of(cache, model.config), "it holds room to grow too"


def test_few_tokens_fill_at_once(model: Any) -> None:
    cache = DynamicCache()
    kv_accuracy.fill(model, cache, FIRST)
    assert cache.get_seq_length() == FIRST


def test_steps_and_sizes_of_every_cache(model: Any) -> None:
    found = kv_accuracy.sizes_and_times(model, [entry("float"), entry("qfx i2")], WINDOW + 32)
    assert found["float"][0] == pytest.approx(per_token(model))
    assert 0.2 * per_token(model) < found["qfx i2"][0] < 0.8 * per_token(model)
    assert all(0 < ms < 10_000 for _, ms in found.values())


def test_times_of_another_shape(model: Any) -> None:
    mixed = Entry("mixed", lambda m: qfx.QuantizedCache(m.config, ["i8", "i4"] * 3))
    chosen = kv_accuracy.usable(model, [entry("qfx i8"), mixed])[0]
    (found,) = kv_accuracy.timings(model, "tiny", chosen, [WINDOW + 32], 1).values()
    assert found["qfx i8"][1] > 0 and "mixed" not in found, "its layers are those of one model"
    with pytest.raises(typer.BadParameter, match="gpt is none of llama-1b"):
        kv_accuracy.main(timed="gpt")


def test_a_cache_that_fails_is_told(model: Any) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("not here")

    good, failed = kv_accuracy.usable(model, [entry("float"), Entry("broken", broken), entry("qfx i4")])
    assert [e.name for e in good] == ["float", "qfx i4"]
    assert failed == {"broken": "RuntimeError: not here"}
    made = good[1].make(model)
    assert made.formats == qfx.QuantizedCache(model.config, "i4").formats and made.get_seq_length() == 0


def test_greedy_texts_of_the_float_cache_are_its_own(model: Any) -> None:
    zero = Entry("nothing", lambda m: qfx.QuantizedCache(m.config, {"k": "u2/g32/f16", "v": "u2/g32/f16"}))
    found = kv_accuracy.agreement(model, [entry("float"), entry("float"), zero], 2, new=6)
    assert found["float"] == (1.0, 1.0)
    assert all(0 <= share <= 1 for share in found["nothing"])


def judgement(kld: float) -> Judgement:
    return Judgement(kld, 10 * (1 + kld), 10.0, 0.9, 64, None, ((0, kld), (8, kld)))


def test_rows_and_verdicts() -> None:
    names = ("float", "qfx i4", "qfx i8", "quanto int4", "hqq int2")
    entries = [Entry(name, lambda _: None) for name in (*names, "gone")]
    klds, sizes = (0.0, 0.01, 0.001, 0.02, 0.5), (100.0, 30.0, 50.0, 31.0, 10.0)
    judged = {name: judgement(kld) for name, kld in zip(names, klds, strict=True)}
    size = {name: (found, 0.0) for name, found in zip(names, sizes, strict=True)}
    times = {64: {name: (0.0, ms) for name, ms in zip(names, (1.0, 2.0, 3.0, 8.0, 9.0), strict=True)}}
    rows = kv_accuracy.rows_of(entries, {"gone": "ImportError: no gone"}, judged, size, times, {"float": (1.0, 1.0)})
    assert rows[-1] == {"peer": "gone", "failed": "ImportError: no gone"}
    assert rows[1]["ratio"] == pytest.approx(0.3) and rows[1]["change"] == pytest.approx(0.01)
    assert rows[0]["same_prompts"] == 1.0 and "same_prompts" not in rows[1]
    four, two = kv_accuracy.verdicts(rows)
    assert "qfx i4 (30 bytes, KLD 0.010000) has 0.500 of it and is 4.0x at 64" in four
    rows[3]["kld"] = 0.0
    assert "of it" not in kv_accuracy.verdicts(rows)[0], "nothing lost: no share of it"
    assert two == "hqq int2: no cache of qfx has as few bytes"


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "curve.png"
    command = [sys.executable, str(Path(kv_accuracy.__file__)), "--tokens", "96", "--texts", "2", "--step", "8"]
    command += ["--at", "0", "--agree", "2", "--threads", "1", "--json", str(numbers), "--plot", str(picture)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {row["peer"]: row for row in json.loads(numbers.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [e.name for e in kv_accuracy.ENTRIES]
    assert rows["float"]["kld"] == 0 and rows["qfx i8"]["kld"] < rows["qfx i2"]["kld"]
    assert not [name for name, row in rows.items() if name.startswith("qfx") and row.get("failed")]
    assert "qfx k4v2" in said and picture.stat().st_size > 1000
