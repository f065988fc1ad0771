"""The example of a language model in transformers' own way."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.hf_roundtrip import PROMPT, main, roundtrip, size

ASSET = Path(__file__).parents[1] / "assets" / "tiny_lm"


def test_both_write_the_same(tmp_path: Path) -> None:
    first, second = roundtrip(str(ASSET), tmp_path)
    assert first == second and first.startswith(PROMPT) and len(first) > len(PROMPT)
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert size(tmp_path) < 0.5 * size(ASSET)


@pytest.mark.slow
def test_it_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    main(str(ASSET), "w8a8")
    out = capsys.readouterr().out
    assert "by w8a8: 5.3 MiB -> " in out and "quantized while loading: 'def main():" in out
