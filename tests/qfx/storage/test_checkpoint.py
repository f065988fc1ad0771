"""Files with weights, one or several: what they hold, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qfx.storage.checkpoint import INDEX, ONE, check, digests, files_of, headers, read

TENSORS = {
    "a.w_codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "a.w_scale": torch.tensor([[0.5], [2.0], [float("inf")]]),
    "b": torch.ones(2, dtype=torch.bfloat16),
    "c": torch.tensor(1.5, dtype=torch.float16),
    "d": torch.zeros(0, 3),
    "e": torch.ones(2).to(torch.float8_e4m3fn),
    "f": torch.tensor([0.25, 4.0]).to(torch.float8_e8m0fnu),
}


def written(folder: Path, tensors: dict[str, Tensor] = TENSORS, files: int = 2) -> list[Path]:
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    paths = [folder / (ONE if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors") for i in range(files)]
    for path, part in zip(paths, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path)
    if files > 1:
        weight_map = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("files", [1, 2, 3])
def test_everything_comes_back(files: int, tmp_path: Path) -> None:
    paths = written(tmp_path, files=files)
    assert files_of(tmp_path) == paths
    found = read(paths, digests(TENSORS))
    assert set(found) == set(TENSORS)
    assert all(found[n].dtype == t.dtype and torch.equal(found[n].float(), t.float()) for n, t in TENSORS.items())
    told = headers(paths, digests(TENSORS))
    assert all(t.is_meta and (t.dtype, t.shape) == (TENSORS[n].dtype, TENSORS[n].shape) for n, t in told.items())
    check(paths, digests(TENSORS))


@settings(deadline=None)
@given(st.sampled_from(sorted(n for n, t in TENSORS.items() if t.numel())), st.integers(0, 7))
def test_one_bit_changes_one_digest(name: str, bit: int) -> None:
    other = {n: t.clone() for n, t in TENSORS.items()}
    raw = other[name].reshape(-1).view(torch.uint8)
    raw[0] = raw[0] ^ (1 << bit)
    before, after = digests(TENSORS), digests(other)
    assert {n for n in before if before[n] != after[n]} == {name}


def test_dtype_and_shape_count() -> None:
    x = torch.zeros(4, dtype=torch.int16)
    same = digests({"x": x, "y": x.reshape(2, 2), "z": x.view(torch.float16), "again": x.clone()})
    assert len(set(same.values())) == 3 and same["x"] == same["again"]


def test_altered_content_is_named(tmp_path: Path) -> None:
    expected = digests(TENSORS)
    paths = written(tmp_path, {**TENSORS, "b": torch.zeros(2, dtype=torch.bfloat16)})
    for function in (check, read):
        with pytest.raises(
            ValueError, match=r"1 tensors in the 2 files .* were altered: b\n(.|\n)*copy the files again"
        ):
            function(paths, expected)


def test_a_tensor_in_no_file_is_named(tmp_path: Path) -> None:
    paths = written(tmp_path, {n: t for n, t in TENSORS.items() if n != "b"}, files=1)
    with pytest.raises(ValueError, match=rf"1 tensors are not in {paths[0]}: b\n(.|\n)*is missing"):
        headers(paths, digests(TENSORS))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    paths = written(tmp_path, files=1)
    content = paths[0].read_bytes()
    for size in (len(content) - 3, 20, 4, 0):
        paths[0].write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"{ONE} is truncated or no safetensors file \({size} bytes\)"):
            headers(paths, {})


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"1 of 1 files with weights are missing: model\.safetensors"):
        files_of(tmp_path)
    paths = written(tmp_path, files=3)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 files with weights are missing: {paths[1].name}"):
        files_of(tmp_path)


def test_several_files_beside_one_are_later_where_all_are_there(tmp_path: Path) -> None:
    (one,) = written(tmp_path, files=1)
    several = written(tmp_path, files=3)
    assert files_of(tmp_path) == several
    several[1].unlink()
    assert files_of(tmp_path) == [one]
    (tmp_path / INDEX).write_text("{")
    assert files_of(tmp_path) == [one]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json is truncated or altered"):
        files_of(tmp_path)
