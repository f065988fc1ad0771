"""`qfx export-gguf`, from the arguments to the file."""

from __future__ import annotations

from pathlib import Path

import pytest

import qfx
from qfx.interop.gguf_file import read_gguf
from tests.qfx.commands import run

pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")
pytest.importorskip("transformers")
TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny_lm"


def test_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    done = run("export-gguf", TINY, "-o", tmp_path / "m.gguf", "--type", "q4_0")
    assert done.exit_code == 0, done.output
    assert "56 tensors (42 Q4_0, 13 F32, 1 Q8_0)" in " ".join(done.output.split())
    fields = read_gguf(tmp_path / "m.gguf").fields
    assert fields["general.name"] == "tiny_lm" and fields["general.file_type"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == 2048


def test_data_changes_the_codes(tmp_path: Path) -> None:
    text = TINY.parent / "eval.txt"
    for name, more in (("a", ()), ("b", ("--data", text, "--samples", 2, "--seq-len", 64))):
        assert run("export-gguf", TINY, "-o", tmp_path / name, "--type", "Q4_1", "--no-tokenizer", *more).exit_code == 0
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    assert len(a) == len(b) and a != b


def test_gptq_rounds_otherwise(tmp_path: Path) -> None:
    text = ("--data", TINY.parent / "eval.txt", "--samples", 2, "--seq-len", 64, "--no-tokenizer", "--type", "Q4_1")
    for rounding in ("mse", "gptq"):
        done = run("export-gguf", TINY, "-o", tmp_path / rounding, "--rounding", rounding, *text)
        assert done.exit_code == 0, done.output
    a, b = ((tmp_path / name).read_bytes() for name in ("mse", "gptq"))
    assert len(a) == len(b) and a != b


def test_what_qfx_saved_keeps_its_values(tmp_path: Path) -> None:
    assert run("export-gguf", TINY, "-o", tmp_path / "a.gguf", "--type", "Q8_0", "--no-tokenizer").exit_code == 0
    qfx.save(qfx.import_gguf(tmp_path / "a.gguf"), tmp_path / "q")
    done = run("export-gguf", tmp_path / "q", "-o", tmp_path / "b.gguf", "--no-tokenizer", "--type", "Q8_0")
    assert done.exit_code == 0, done.output
    a, b = (read_gguf(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert list(a) == list(b)
    assert all(a[name].tensor_type == b[name].tensor_type for name in a)
    assert all((a[name].data == b[name].data).all() for name in a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TINY, "-o", "m.gguf", "--type", "Q4_X"), "unknown GGUF type 'Q4_X'"),
        (("no/such/folder", "-o", "m.gguf"), "no/such/folder"),
        ((TINY, "-o", "."), "expected: the path of a .gguf file"),
        ((TINY, "-o", "m.gguf", "--rounding", "gptq"), "--rounding gptq needs data"),
        ((TINY, "-o", "m.gguf", "--rounding", "awq"), "'awq' is not one of"),
    ],
)
def test_refusals(arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("export-gguf", *arguments)
    assert done.exit_code != 0
    assert message in done.output.replace("\n", " ") or message in done.output
    assert list(tmp_path.iterdir()) == []
