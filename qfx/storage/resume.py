"""Finished blocks of weights in a folder, so that rounding goes on where it was interrupted.

    progress.json               whose work it is: recipe, fingerprint of the model, digests of data and formats
    block-00003.safetensors     rounded weights of the fourth block; what was told about them is in its metadata, with
                                digests of the weights

Each file appears whole or not at all. What stands between is computed again: the inputs of the first block that is not
finished come from the finished ones, by the same operations.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from qfx.errors import Note, explain
from qfx.packing import Packed
from qfx.plan import Plan
from qfx.rounding import rounded
from qfx.rounding.blocks import Block
from qfx.storage.checkpoint import digests
from qfx.storage.files import (
    path_of,
    read_json,
    read_safetensors,
    remove_left,
    sha256_text,
    temporary,
    write_safetensors,
    write_text,
)
from qfx.storage.spill import flat_bytes

VERSION = 3  # 1: no digests, 2: no formats
_HEAD = "progress.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Resume:
    """The folder of one piece of work."""

    def __init__(self, folder: Path) -> None:
        """See `open`."""
        self.folder = folder

    @classmethod
    def open(cls, folder: str | os.PathLike[str], plan: Plan, batches: Sequence[Sequence[Any]]) -> Self:
        """The folder, made where it is not there. Raises ValueError where it holds other work, or no work of qfx."""
        root = path_of(folder)
        mine = {
            "format": "qfx-progress", "version": VERSION, "recipe": plan.recipe.to_dict(),
            "fingerprint": plan.fingerprint, "data": digest(batches), "versions": plan.versions,
            "decided": sha256_text(json.dumps([plan.annotations, plan.rewrites], sort_keys=True)),
        }  # fmt: skip
        head = root / _HEAD
        remove_left(root, "block-*")
        if head.exists():
            _check(_read(head), mine, root)
        elif root.is_dir() and set(root.iterdir()).difference(temporary(root, _HEAD)):
            what = f"{root} holds other files and no {_HEAD}"
            raise ValueError(explain(what, expected="a new or empty folder, or that of the interrupted work"))
        else:
            write_text(head, json.dumps(mine, indent=1) + "\n")
        return cls(root)

    def save(self, number: int, block: Block, notes: Sequence[Note]) -> None:
        """Keep a finished block. Raises OSError where the disk does not take it; earlier blocks stay."""
        parts = [part for linear in block.linears for part in linear.parts]
        names = [name for part in parts for name in (f"{part.name}/codes", f"{part.name}/scale", f"{part.name}/zero")]
        found = {name: block.tensors[name] for name in names if name in block.tensors}
        told = {part.name: block.told[part.name] for part in parts if part.name in block.told}
        about = {
            "block": block.name, "told": told, "notes": [dataclasses.asdict(note) for note in notes],
            "tensors": digests(found),
        }  # fmt: skip
        text = json.dumps(about)
        try:
            write_safetensors(self._file(number), found, {"qfx": text, "sha256": sha256_text(text)})
        except OSError as error:
            if error.errno not in _FULL:
                raise
            what = f"the disk is full: {block.name} could not be kept, the blocks before it are"
            raise OSError(error.errno, f"{what}. Free some space and run the same again", str(self.folder)) from error

    def has(self, number: int) -> bool:
        """Whether a block is kept."""
        return self._file(number).exists()

    def load(self, number: int, block: Block) -> list[Note] | None:
        """Put what is kept of a block into it; its notes, or None where it is not finished."""
        file = self._file(number)
        if not self.has(number):
            return None
        tensors = read_safetensors(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        text = metadata.get("qfx", "{}")
        if metadata.get("sha256") != sha256_text(text) or (about := json.loads(text))["tensors"] != digests(tensors):
            raise ValueError(explain(f"{file} was altered", next_step="remove the file and run again"))
        if about.get("block") != block.name:
            what = f"{file} is not the block {block.name!r}"
            raise ValueError(
                explain(what, found=repr(about.get("block")), next_step="remove the folder and start anew")
            )
        for part in (part for linear in block.linears for part in linear.parts):
            packed = rounded.get(tensors, part.name, part.format, tuple(block.weight(part).shape))
            if packed is None:
                raise ValueError(explain(f"{file} lacks {part.name!r}", next_step="remove the file and run again"))
            assert isinstance(packed, Packed)
            block.put(part, packed, about["told"].get(part.name))
        return [Note(**note) for note in about["notes"]]

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"


def digest(batches: Sequence[Sequence[Any]]) -> str:
    """Hex sha256 over the content of every batch."""
    found = hashlib.sha256(usedforsecurity=False)
    for batch in batches:
        for leaf in pytree.tree_leaves(list(batch)):
            if isinstance(leaf, Tensor):
                found.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
                found.update(flat_bytes(leaf.cpu()).numpy().data)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()


def _read(head: Path) -> dict[str, Any]:
    fields = read_json(head, "remove the folder")
    if fields.get("format") != "qfx-progress":
        raise ValueError(f'{head} is not of qfx (it lacks "format": "qfx-progress"); next step: give another folder')
    return fields


def _check(found: dict[str, Any], mine: dict[str, Any], root: Path) -> None:
    names = {"recipe": "the recipe", "fingerprint": "the model", "data": "the data", "versions": "the versions"}
    names |= {"decided": "the formats or the rewrites", "version": "the version of the folder"}
    if different := [words for key, words in names.items() if found.get(key) != json.loads(json.dumps(mine[key]))]:
        raise ValueError(
            explain(
                f"{root} holds the progress of other work",
                expected="the same recipe, model, data and versions",
                found=f"another of each of: {', '.join(different)}",
                next_step="give another folder, or remove this one to start anew",
            )
        )
