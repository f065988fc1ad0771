"""The corpus: what is read, what is left out, and that no held-out text is trained on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from examples.python_text import (
    SHORTEST_CHECKED,
    Document,
    docstrings,
    documents,
    module_files,
    normal,
    paragraphs,
    sample,
    split_documents,
    split_of,
    without_seen,
)
from examples.train_tiny_lm import training_texts

EVAL_TEXT = Path(__file__).parents[1] / "assets" / "eval.txt"
SOURCE = '''"""Doc of m.

Second paragraph."""
import os
class A:
    """Doc of A."""
    def f(self, x: int = 3) -> int:
        """Doc of f."""
        def silent(): pass
        return x
'''


@pytest.fixture(scope="module")
def found() -> list[Document]:
    return documents()


def test_docstrings_stand_under_their_signatures() -> None:
    assert docstrings(ast.parse(SOURCE), "m") == (
        "module m\n\nDoc of m.\n\nSecond paragraph.\n\nclass A:\n    Doc of A.\n\n"
        "    def f(self, x: int=3):\n        Doc of f.\n"
    )
    assert docstrings(ast.parse("x = 1"), "m") == ""


def test_only_the_standard_library_is_read_and_nothing_imported(tmp_path: Path) -> None:
    for name in ("json.py", "antigravity.py", "numpy.py", "asyncio/queues.py", "asyncio/test/x.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("raise SystemExit('imported')")
    assert [name for name, _ in module_files(tmp_path)] == ["asyncio.queues", "json"]
    before = set(sys.modules)
    names = {d.name for d in documents(tmp_path) if d.kind == "source"}
    assert names == {"asyncio.queues", "json"}
    assert {name for name in set(sys.modules) - before if not name.startswith("pydoc_data")} == set()


def test_files_that_do_not_parse_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def broken(:")
    (tmp_path / "csv.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    assert [d for d in documents(tmp_path) if d.kind != "topic"] == []


def test_order_is_fixed(found: list[Document]) -> None:
    keys = [(d.kind, d.name) for d in found]
    assert keys == sorted(set(keys)) and found == documents()


def test_split_depends_on_the_name_alone() -> None:
    assert [split_of(n) for n in ("json", "os", "pathlib", "wave")] == ["train", "eval", "validation", "eval"]


def test_sides_are_disjoint(found: list[Document]) -> None:
    sides = split_documents(found)
    names = {side: {d.name for d in part} for side, part in sides.items()}
    assert not names["train"] & names["eval"] and not names["train"] & names["validation"]
    assert not names["validation"] & names["eval"]
    trained = {normal(p) for d in sides["train"] for p in paragraphs(d.text)}
    for side in ("validation", "eval"):
        held = [normal(p) for d in sides[side] for p in paragraphs(d.text)]
        assert len(held) > 100
        assert not [p for p in held if len(p) >= SHORTEST_CHECKED and p in trained]
        assert all(d.kind != "source" for d in sides[side])


def test_seen_paragraphs_go_at_any_indent() -> None:
    text = "Kept.\n\n    A paragraph that stands\n    elsewhere too.\n\nKept as well.\n"
    left = without_seen(Document("m", "docs", text), {"A paragraph that stands elsewhere too."})
    assert left.text == "Kept.\n\nKept as well.\n"


def test_committed_eval_text_is_never_trained_on(found: list[Document]) -> None:
    text = EVAL_TEXT.read_text(encoding="utf-8")
    assert 50_000 <= len(text.encode()) <= 70_000
    held = {p for p in map(normal, paragraphs(text)) if len(p) >= SHORTEST_CHECKED}
    trained = {normal(p) for t in training_texts(split_documents(found)["train"], text) for p in paragraphs(t)}
    assert len(held) > 300 and not held & trained
    broken = training_texts([Document("m", "docs", text)], "")
    assert held & {normal(p) for t in broken for p in paragraphs(t)}  # the check does see a leak


def test_sample_is_short_of_its_size_and_of_each_document() -> None:
    many = [Document(f"m{i}", "docs", "\n\n".join(["word " * 10] * 50)) for i in range(10)]
    text = sample(many, 5_000, longest=1_000)
    assert 4_500 <= len(text) <= 5_600 and text == sample(many[::-1], 5_000, longest=1_000)
