"""Text that every Python ships: help topics, docstrings and source of the standard library, split by document.

The split is a hash of the document's name, so a module is on the same side in every Python version, and nothing is
imported: docstrings are read with `ast`. Run this file to write the held-out sample used as `tests/assets/eval.txt`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

Kind = Literal["topic", "docs", "source"]
Split = Literal["train", "validation", "eval"]

SKIPPED_PACKAGES = frozenset(
    {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "ensurepip"}
)
SKIPPED_FOLDERS = frozenset({"test", "tests", "__pycache__", "site-packages"})
SKIPPED_SOURCE = frozenset({"encodings", "pydoc_data"})  # tables, and the topics once more
SHORTEST_DOCS = 400  # characters; modules that say less about themselves are left out
SHORTEST_CHECKED = 40  # characters; shorter paragraphs ("See also") may stand on both sides


@dataclass(frozen=True)
class Document:
    """One piece of text; `name` alone decides its split, so a module's docs and source stay together."""

    name: str
    kind: Kind
    text: str


def split_of(name: str) -> Split:
    """Side of the document `name`: 8 % eval, 4 % validation, the rest train."""
    bucket = int.from_bytes(hashlib.sha256(f"split {name}".encode()).digest()[:8], "big") % 100
    return "eval" if bucket < 8 else "validation" if bucket < 12 else "train"


def module_files(stdlib: Path | None = None) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of each standard-library module written in Python, sorted by name; tests left out."""
    root = stdlib if stdlib is not None else Path(sysconfig.get_path("stdlib"))
    found = []
    for package in sorted(sys.stdlib_module_names - SKIPPED_PACKAGES):
        for path in [root / f"{package}.py", *(root / package).rglob("*.py")]:
            parts = path.relative_to(root).with_suffix("").parts
            if path.is_file() and not SKIPPED_FOLDERS.intersection(parts):
                found.append((".".join(parts).removesuffix(".__init__"), path))
    yield from sorted(found)


def topics() -> Iterator[Document]:
    """The texts behind `help("TOPIC")`, sorted by name; none where this Python ships without them."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return
    for name in sorted(texts):
        yield Document(f"topic {name}", "topic", texts[name].strip() + "\n")


def docstrings(tree: ast.Module, name: str) -> str:
    """Module, class and function docstrings of one module in source order, each under its signature."""
    pieces: list[str] = []

    def visit(node: ast.AST, indent: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            doc = ast.get_docstring(child)
            inner = indent
            if doc:
                if isinstance(child, ast.ClassDef):
                    head = f"class {child.name}"
                else:
                    head = f"def {child.name}({ast.unparse(child.args)})"
                pieces.append(textwrap.indent(f"{head}:\n{textwrap.indent(doc, '    ')}", indent))
                inner = indent + "    "
            visit(child, inner)

    doc = ast.get_docstring(tree)
    pieces.append(f"module {name}\n\n{doc}" if doc else f"module {name}")
    visit(tree, "")
    return "\n\n".join(pieces) + "\n" if len(pieces) > 1 or doc else ""


def documents(stdlib: Path | None = None) -> list[Document]:
    """Every document, sorted by kind and name; files that do not parse as UTF-8 Python are left out."""
    found = list(topics())
    for name, path in module_files(stdlib):
        try:
            source = path.read_text(encoding="utf-8")
            text = docstrings(ast.parse(source), name)
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) >= SHORTEST_DOCS:
            found.append(Document(name, "docs", text))
        if source.strip() and name.split(".")[0] not in SKIPPED_SOURCE:
            found.append(Document(name, "source", source))
    return sorted(found, key=lambda document: (document.kind, document.name))


def paragraphs(text: str) -> list[str]:
    """The pieces of `text` between blank lines."""
    return re.split(r"\n\s*\n", text)


def normal(paragraph: str) -> str:
    """`paragraph` with each run of white space as one space: equal for equal text at any indent."""
    return " ".join(paragraph.split())


def without_seen(document: Document, seen: set[str]) -> Document:
    """`document` less the paragraphs whose normal text is in `seen`."""
    kept = [p.strip("\n") for p in paragraphs(document.text) if normal(p) not in seen]
    return replace(document, text="\n\n".join(kept).rstrip() + "\n")


def split_documents(found: list[Document]) -> dict[Split, list[Document]]:
    """The three sides. Held-out sides have prose only (topics and docs) and no paragraph that the training side has."""
    train = [d for d in found if split_of(d.name) == "train"]
    seen = {normal(p) for d in train for p in paragraphs(d.text)}
    seen = {p for p in seen if len(p) >= SHORTEST_CHECKED}
    sides: dict[Split, list[Document]] = {"train": train, "validation": [], "eval": []}
    for document in found:
        side = split_of(document.name)
        if side != "train" and document.kind != "source":
            kept = without_seen(document, seen)
            if kept.text.strip():
                sides[side].append(kept)
    return sides


def sample(found: list[Document], size: int, longest: int = 8_000) -> str:
    """About `size` characters of `found` in hash order, at most `longest` of each document, cut at a blank line."""
    order = sorted(found, key=lambda document: hashlib.sha256(f"order {document.name}".encode()).digest())
    pieces: list[str] = []
    for document in order:
        piece = ""
        for paragraph in paragraphs(document.text):
            if len(piece) + len(paragraph) > longest or sum(map(len, pieces)) + len(piece) > size:
                break
            piece += paragraph + "\n\n"
        pieces.append(piece)
    return "\n".join(piece.rstrip() + "\n" for piece in pieces if piece)


def main(
    out: Annotated[Path, typer.Option(help="File to write.")],
    size: Annotated[int, typer.Option(help="Characters, about.")] = 60_000,
) -> None:
    """Write a sample of the held-out eval side."""
    out.write_text(sample(split_documents(documents())["eval"], size), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
