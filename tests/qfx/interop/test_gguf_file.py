"""Models in several GGUF files, cut as llama-gguf-split cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qfx
from qfx.interop.gguf_file import read_gguf
from tests.gguf_models import random_model, run

gguf = pytest.importorskip("gguf", reason="the container: pip install qfx[interop]")
NAMES = [f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with the whole model, and with its three parts: the first has the metadata and no tensor."""
    qfx.export_gguf(random_model("llama"), tmp_path / "m.gguf", "Q8_0", tokenizer=False)
    held = read_gguf(tmp_path / "m.gguf")
    names = list(held.tensors)
    for number, own in enumerate(([], names[:9], names[9:])):
        writer = gguf.GGUFWriter(str(tmp_path / NAMES[number]), "llama")
        for key, value in held.fields.items() if number == 0 else ():
            if key.startswith(("llama.", "tokenizer.")):
                kinds: dict[type, Any] = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
                kinds[type(value)](key, value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(names))
        for name in own:
            writer.add_tensor(name, held.tensors[name].data, raw_dtype=held.tensors[name].tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_any_part_gives_the_model(name: str, parts: Path) -> None:
    whole = qfx.import_gguf(parts / "m.gguf")
    assert torch.equal(run(qfx.import_gguf(parts / name, strict=True)), run(whole))


def test_missing_parts_are_named(parts: Path) -> None:
    (parts / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 3 parts[\s\S]*m-00002-of-00003.gguf\n  next step: copy all"):
        qfx.import_gguf(parts / NAMES[0])


def test_a_part_by_another_name(parts: Path) -> None:
    (parts / NAMES[0]).rename(parts / "first.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts\n  expected: a name such as first-00001-of-00003.gguf"):
        qfx.import_gguf(parts / "first.gguf")


def test_parts_of_two_models(parts: Path) -> None:
    (parts / NAMES[1]).write_bytes((parts / NAMES[2]).read_bytes())
    with pytest.raises(ValueError, match=r"not of one model\n  expected: \d+ tensors\n  found: \d+ in 3 parts"):
        qfx.import_gguf(parts / NAMES[0])
