"""The benchmark of quantized caches: its attention is right, its rows say what was timed, it runs small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from examples.benchmarks import kv_decode
from examples.benchmarks.peers.decoding import DecoderJob
from qfx.measuring.measure import cosine

TINY = kv_decode.HEADS["tiny"]


@pytest.mark.parametrize("masked", [True, False])
def test_every_cache_gives_the_same_attention(masked: bool) -> None:
    """What is timed computes: codes of 8 and 4 bits attend nearly as the floats that they were made of."""
    found = {
        name: kv_decode.attention_run(TINY, bits, 32, 2, 1, masked=masked)() for name, bits in kv_decode.CACHES.items()
    }
    wanted = torch.from_numpy(found["float32"][0])
    assert wanted.shape == (1, 1, TINY[0] * TINY[2])
    assert all(np.array_equal(one, two) for one, two in found.values()), "every layer has the same cache"
    assert cosine(wanted, torch.from_numpy(found["i8"][0])) > 0.999
    assert 0.9 < cosine(wanted, torch.from_numpy(found["i4"][0])) < 0.9999


def test_a_mask_of_zeros_is_no_mask() -> None:
    one, two = (kv_decode.attention_run(TINY, 8, 16, 2, 1, masked=masked)()[0] for masked in (True, False))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_rows_are_relative_to_float32() -> None:
    rows = kv_decode.as_rows({"float32": 4.0, "i8": 2.0}, "attention x", 7, share=0.5)
    assert [(r["peer"], r["tokens"], r["ms"], r["times"]) for r in rows] == [
        ("attention x float32", 7, 2000.0, 1.0),
        ("attention x i8", 7, 1000.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"part": ["encode"]}, "encode is none of attention, decode, prefill"), ({"shape": ["gpt"]}, "gpt is none of"),
     ({"model": "nothing"}, "nothing is none of")],
)  # fmt: skip
def test_unknown_names_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        kv_decode.main(**given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the export; the rows are what is looked at
def test_models_decode_and_read_prompts(tmp_path: Path) -> None:
    job = DecoderJob("tiny", 32, 1, 2, 1, str(tmp_path))
    rows = kv_decode.model_rows(job, "float32", ["decode", "prefill"], [32, 48], 1)
    assert [(r["peer"].split(" ")[0], r["peer"].split(" ")[-1], r["tokens"]) for r in rows] == [
        (part, name, n)
        for part, lengths in (("decode", (32, 48)), ("prefill", (32,)))
        for n in lengths
        for name in kv_decode.CACHES
    ]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "times.png"
    command = [sys.executable, str(Path(kv_decode.__file__)), "--quick", "--threads", "1", "--part", "attention"]
    command += ["--json", str(numbers), "--plot", str(picture)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    assert [row["peer"] for row in rows] == 2 * [f"attention tiny {name}" for name in kv_decode.CACHES]
    assert "attention tiny i4" in said and picture.stat().st_size > 1000
