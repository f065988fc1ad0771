"""qfx.reporting.told: the report of a live model says what was warned of when it was quantized."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import qfx
from qfx import QfxWarning
from qfx.errors import Note
from qfx.reporting.told import read, remember, remembered
from tests.zoo import ZOO


class Residual(nn.Module):
    """Has no residual stream that could be rotated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(x)
        return found


def quantized() -> nn.Module:
    with pytest.warns(QfxWarning, match="no residual stream was found"):
        return qfx.quantize(Residual().eval(), "w8a8", [torch.randn(4, 32)], rewrites=("rotate",))


def test_a_rewrite_that_was_skipped_stands_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = qfx.report(quantized())
    (note,) = found.notes
    assert note.node == "residual stream" and note.reason == "no residual stream was found to rotate"
    assert json.loads(found.to_json())["notes"][0]["next_step"] == note.next_step == "leave 'rotate' out of the recipe"
    found.show()
    assert "note residual stream: no residual stream was found" in capsys.readouterr().out


def test_a_plan_brings_its_notes_along(tmp_path: Path) -> None:
    with pytest.warns(QfxWarning, match="no residual stream"):
        plan = qfx.plan(Residual().eval(), "w8a8", [torch.randn(4, 32)], rewrites=("rotate",))
    plan.save(tmp_path)
    live = qfx.quantize(Residual().eval(), qfx.Plan.load(tmp_path))
    assert [str(note) for note in qfx.report(live).notes] == plan.notes


def test_copies_and_loaded_models_have_them(tmp_path: Path) -> None:
    live = quantized()
    assert remembered(copy.deepcopy(live)) == remembered(live) != ()
    qfx.save(live, tmp_path / "m")
    assert remembered(qfx.load(tmp_path / "m", Residual().eval())) == remembered(live)
    assert not [name for name in live.state_dict() if "notes" in name]


def test_a_folder_says_no_source_lines(tmp_path: Path) -> None:
    """They name files of whoever quantized the model."""
    live = qfx.quantize(Residual().eval(), "w8a8", [torch.randn(4, 32)])
    remember(live, [Note("fc", "why", "what", where="/home/somebody/model.py:3", minor=True)])
    qfx.save(live, tmp_path / "m")
    assert remembered(qfx.load(tmp_path / "m", Residual().eval())) == (Note("fc", "why", "what", minor=True),)
    assert "somebody" not in (tmp_path / "m" / "qfx.json").read_text()


def quantized_lm() -> Any:
    with pytest.warns(QfxWarning, match="matches no node"):
        return qfx.quantize(ZOO["llama"]()[0], "w8a16", ignore=["*nothing"])


@pytest.mark.parametrize("write", [qfx.save, lambda model, folder: model.save_pretrained(folder)])
@pytest.mark.parametrize("read", [qfx.load, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained])
def test_models_of_transformers_have_them_however_they_are_written_and_read(
    read: Any, write: Any, tmp_path: Path
) -> None:
    live = quantized_lm()
    write(live, tmp_path / "m")
    loaded = read(tmp_path / "m")
    assert qfx.report(loaded).notes == qfx.report(live).notes != ()
    write(loaded, tmp_path / "again")
    assert remembered(read(tmp_path / "again")) == remembered(live)


def test_a_model_that_is_quantized_while_it_is_loaded_has_them(tmp_path: Path) -> None:
    model: Any = ZOO["llama"]()[0]
    model.save_pretrained(tmp_path)
    config = qfx.QfxConfig(recipe="w8a16", ignore=["*nothing"])
    with pytest.warns(QfxWarning, match="matches no node"):
        live = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    (note,) = remembered(live)
    assert "matches no node" in note.reason and note in qfx.report(live).notes


def test_notes_with_unknown_fields_are_refused() -> None:
    assert read([{"node": "a", "reason": "b", "next_step": "c", "minor": False}]) == (Note("a", "b", "c"),)
    with pytest.raises(TypeError, match="more"):
        read([{"node": "a", "reason": "b", "next_step": "c", "more": 1}])


def test_a_model_that_was_trained_has_those_of_its_plan() -> None:
    with pytest.warns(QfxWarning, match="matches no node"):
        live = qfx.convert(qfx.prepare_qat(Residual().eval(), "w8a8", [torch.randn(4, 32)], ignore=["*nothing"]))
    assert any("matches no node" in note.reason for note in qfx.report(live).notes)


def test_without_notes_there_is_none() -> None:
    live = qfx.quantize(Residual().eval(), "w8a8", [torch.randn(4, 32)])
    assert qfx.report(live).notes == () and remembered(nn.Linear(2, 2)) == ()


def test_notes_that_differ_in_their_nodes_alone_are_one() -> None:
    model = nn.Linear(2, 2)
    remember(model, [Note("layers.0", "why", "what"), Note("layers.1", "why", "what"), Note("layers.1", "why", "what")])
    (note,) = remembered(model)
    assert note.node == "layers.0-1 (2 nodes)"


@pytest.mark.parametrize(
    "note",
    [
        Note("a.b", "it is so: for a reason; and more", "do this"),
        Note("", "nobody's", "nothing; next step of others"),
        Note("a", "why", ""),
    ],
)
def test_a_note_is_read_from_its_text(note: Note) -> None:
    assert Note.parse(str(note)) == note
    assert str(Note.parse(str(note))) == str(note)


def test_where_it_was_is_read_and_that_it_is_minor_is_not() -> None:
    note = Note("a", "why (or so)", "what", where="folder (2)/file.py:3", minor=True)
    assert Note.parse(str(note)) == replace(note, minor=False)


def test_a_text_without_a_next_step() -> None:
    assert Note.parse("a: why") == Note("a", "why", "")
