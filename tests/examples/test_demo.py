"""The demo runs from start to end, and what it shows is right."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from examples import demo
from qfx.measuring import compare


def test_sentences_that_mean_the_same_lie_near() -> None:
    loaded = demo.minilm()
    near, also_near, far = demo.sentence_scores(loaded.model, loaded.tokenizer)
    assert near > far + 0.1
    assert also_near > far + 0.1


def test_the_table_shows_every_column() -> None:
    near = compare.Accuracy("last_hidden_state", 22.5, 0.99712)
    columns = [
        demo.Shown("float32", None, compare.Latency(1.0, 0.02), 90_000_000, [0.5, 0.4, 0.1]),
        demo.Shown("compiled", near, compare.Latency(3.0, 0.01), None, [0.51, 0.41, 0.11]),
    ]
    console = Console(file=io.StringIO(), width=140)
    console.print(demo.table(columns))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("0.99712", "22.5 dB", "90.0 MB", "20.0 ms", "10.0 ms", "0.510"):
        assert cell in text


@pytest.mark.slow
def test_the_demo_runs(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(repeats=1, threads=None)
    said, warned = capsys.readouterr()
    assert warned.count("warning: ") == 1 and "lm_head: its input cannot be smoothed" in warned
    assert said.count("linear nodes quantized") == 2
    (cosines,) = re.findall(r"cosine of hidden states.*", said)
    assert all(0.99 < float(value) <= 1 for value in re.findall(r"0\.\d{5}", cosines))
