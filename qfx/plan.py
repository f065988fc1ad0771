"""Plan: what qfx decided for one model. A folder of `plan.json` and `plan.safetensors`; saved, resumed, reused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx.annotation import ALL_ROLES, Formats, from_json
from qfx.errors import QfxWarning, check_flags, explain, listed, nearest
from qfx.kv.plans import read as check_caches
from qfx.recipe import Recipe
from qfx.storage.files import dump_safetensors, path_of, read_json, read_safetensors, sha256_file, staged
from qfx.storage.hollow import is_hollow
from qfx.storage.spill import flat_bytes, rest
from qfx.text import type_text

VERSION = 4  # 1: a byte for each zero point, 2: no caches, 3: rotated tables are never tied
_READ = (1, 2, 3, VERSION)
_JSON, _TENSORS = "plan.json", "plan.safetensors"
_HEAD: dict[str, type] = {"format": str, "version": int, "tensor_sha256": str}
_FIELDS: dict[str, type] = {
    "recipe": dict,
    "fingerprint": str,
    "signature": dict,
    "versions": dict,
    "annotations": dict,
    "layouts": dict,
    "caches": dict,
    "rewrites": list,
    "sensitivities": dict,
    "notes": list,
}
_INNER: dict[str, type] = {"signature": str, "layouts": str, "caches": dict, "rewrites": dict, "notes": str}
_SHOWN = 5  # differences that a message lists
_PART = 1 << 22  # bytes that are hashed at once


@dataclass(eq=False)
class Plan:
    """What qfx decided for one model.

    recipe: what was asked. signature: of the model (see `signature`), fingerprint: its hex sha256. versions: of torch,
    qfx, Python. annotations: FQN -> role -> Format text, a list of texts (one per head, or per equal part of a weight's
    rows) or {"columns": a list} (of its columns), as `annotation.to_json` writes them. layouts: FQN -> how the
    module holds the weight (`qfx.live.places`). caches: FQN of an attention -> what the cache of its keys and values
    stores (`qfx.kv.plans`). rewrites: JSON-able records in the order of application, such as {"name": "smooth", "norm":
    {...}, "linears": [...], "factor": key of `tensors`}. tensors: "<FQN>/x_scale", "<FQN>/x_zero",
    "<FQN>/smooth", ... sensitivities: JSON-able. notes: what was warned of.
    """

    recipe: Recipe
    fingerprint: str = ""
    signature: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())  # noqa: PLW0108 (defined below)
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewrites: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sensitivities: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> Plan:
        """An empty plan for this model, with its signature and fingerprint; without them for one without content."""
        if is_hollow(model):
            return cls(recipe=recipe)
        found = signature(model)
        return cls(recipe=recipe, fingerprint=_digest(found), signature=found)

    def formats(self, fqn: str) -> dict[str, Formats]:
        """Role -> Format (or several) of a name; empty where the plan says nothing about it."""
        return {role: from_json(text) for role, text in self.annotations.get(fqn, {}).items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `plan.json` and `plan.safetensors`, both or neither.

        Raises ValueError for what is not JSON-able or no valid format, OSError where the disk does not take it.
        """
        _check_annotations(self.annotations, "the plan")
        check_caches(self.caches, "the plan")
        fields = {"format": "qfx-plan", "version": VERSION, "tensor_sha256": ""} | self._fields()
        _to_json(fields)  # refuses before the tensors, which may be large, are written
        with staged(folder) as stage:
            dump_safetensors(stage(_TENSORS), self.tensors)
            fields["tensor_sha256"] = sha256_file(stage(_TENSORS))
            stage(_JSON).write_text(_to_json(fields), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan of a folder, or of the `plan.json` in it.

        Raises FileNotFoundError where a file is missing, ValueError where one is truncated, was altered, has unknown
        keys or comes from another version.
        """
        file = path_of(path)
        file = file / _JSON if file.is_dir() or file.suffix != ".json" else file
        fields = _read_json(file)
        tensors = read_safetensors(file.parent / _TENSORS, sha256=str(fields["tensor_sha256"]))
        _check_annotations(fields["annotations"], str(file))
        check_caches(fields["caches"], str(file))
        try:
            recipe = Recipe.parse(fields["recipe"])
        except ValueError as error:
            raise ValueError(f"the recipe in {file} cannot be read: {error}") from error
        rest = {name: fields[name] for name in _FIELDS if name != "recipe"}
        return cls(recipe=recipe, tensors=tensors, **rest)

    def check(self, model: nn.Module, *, strict: bool = False) -> list[str]:
        """Whether the plan was made for this model: the differences of their weights, empty where there are none.

        Differences are warned about (QfxWarning), or raise ValueError where `strict`. A plan without a fingerprint was
        made for no model in particular and fits every one.
        """
        check_flags(strict=strict)
        if not self.fingerprint:
            return []
        found = signature(model)
        if _digest(found) == self.fingerprint:
            return []
        differences = _signature_diff(self.signature, found) or [
            "the fingerprint in the plan is not that of its signature"
        ]
        message = explain(
            f"the plan was made for another model: {listed(differences, _SHOWN)}",
            expected=f"fingerprint {self.fingerprint[:16]}",
            found=f"fingerprint {_digest(found)[:16]}",
            next_step="plan again for this model, or load the weights for which the plan was made",
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, QfxWarning, stacklevel=2)
        return differences

    def diff(self, other: Plan) -> list[str]:
        """What differs between two plans, one line each; empty where they are equal."""
        found = []
        for name in _FIELDS:
            mine, its = self._fields()[name], other._fields()[name]
            if json.dumps(mine, sort_keys=True) == json.dumps(its, sort_keys=True):
                continue
            if isinstance(mine, dict) and isinstance(its, dict):
                keys = [k for k in {**mine, **its} if json.dumps(mine.get(k)) != json.dumps(its.get(k))]
                found += [f"{name}[{k!r}]: {mine.get(k, 'nothing')} against {its.get(k, 'nothing')}" for k in keys]
            else:
                found.append(f"{name}: {mine!r} against {its!r}")
        for key in {**self.tensors, **other.tensors}:
            if not _same(self.tensors.get(key), other.tensors.get(key)):
                found.append(
                    f"tensors[{key!r}]: {_show(self.tensors.get(key))} against {_show(other.tensors.get(key))}"
                )
        return found

    def __eq__(self, other: object) -> bool:
        return not self.diff(other) if isinstance(other, Plan) else NotImplemented

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        rewrites = ", ".join(dict.fromkeys(str(record.get("name")) for record in self.rewrites)) or "none"
        return (
            f"Plan(recipe={self.recipe.name!r}, model={self.fingerprint[:12] or 'any'!r}, "
            f"annotations={len(self.annotations)}, caches={len(self.caches)}, rewrites={rewrites}, "
            f"tensors={len(self.tensors)} ({size / 2**20:.2f} MiB), notes={len(self.notes)})"
        )

    def _fields(self) -> dict[str, Any]:
        return {name: self.recipe.to_dict() if name == "recipe" else getattr(self, name) for name in _FIELDS}


def signature(model: nn.Module) -> dict[str, str]:
    """FQN -> `f32[768,768] <sha256 of every byte>` of parameters and persistent buffers, sorted.

    Tied tensors are listed under each of their names. Raises ValueError for weights on the meta device.
    """
    named = dict(sorted(_weights(model)))
    unique = {id(tensor): tensor for tensor in named.values()}
    if meta := [name for name, tensor in named.items() if tensor.is_meta]:
        raise ValueError(f"{meta[0]!r} is on the meta device and has no content; load the weights first")
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing and copying release the interpreter lock
        digests = dict(zip(unique, pool.map(_tensor_digest, unique.values()), strict=True))
    return {name: f"{_show(tensor)} {digests[id(tensor)]}" for name, tensor in named.items()}


def versions() -> dict[str, str]:
    """Versions of what makes a plan: qfx, torch, Python."""
    try:
        own = version("qfx")
    except PackageNotFoundError:
        own = "unknown"
    return {"qfx": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield dot + name, tensor
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, buffer


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(usedforsecurity=False)
    for part in flat_bytes(tensor.cpu()).split(_PART):
        digest.update(part.numpy().data)
        rest(part)
    return digest.hexdigest()[:32]


def _digest(found: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(found.items()))).encode(), usedforsecurity=False).hexdigest()


def _signature_diff(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    lines = []
    for name in expected:
        if name in found and expected[name] != found[name]:
            was, now = (side[name].rpartition(" ")[0] for side in (expected, found))
            lines.append(f"{name} has other content" if was == now else f"{name} was {was}, is {now}")
    lines += [f"{name} is missing" for name in expected if name not in found]
    return lines + [f"{name} is new" for name in found if name not in expected]


def _show(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else type_text(tensor)


def _same(mine: Tensor | None, its: Tensor | None) -> bool:
    """Equal dtype, shape and bytes (so NaN equals itself)."""
    if mine is None or its is None:
        return mine is its
    return _show(mine) == _show(its) and _tensor_digest(mine) == _tensor_digest(its)


def _check_annotations(annotations: Mapping[str, Any], where: str) -> None:
    for fqn, roles in annotations.items():
        if not isinstance(roles, Mapping):
            raise ValueError(f"the annotation of {fqn!r} in {where} is no dictionary of role and format: {roles!r}")
        for role, text in roles.items():
            if role not in ALL_ROLES:
                raise ValueError(f"unknown role {role!r} of {fqn!r} in {where}, {nearest(str(role), ALL_ROLES)}")
            try:
                from_json(text)
            except ValueError as error:
                raise ValueError(f"role {role!r} of {fqn!r} in {where}: {error}") from error


def _to_json(fields: Mapping[str, Any]) -> str:
    for name, value in fields.items():
        _check_json(value, name)
    return json.dumps(fields, indent=1) + "\n"


def _check_json(value: object, where: str) -> None:
    """Only what JSON gives back unchanged (tuples aside): texts, numbers, None, lists, dictionaries with text keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"keys in {where} of a plan are texts, found {key!r}")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_json(item, f"{where}[{number}]")
    elif not isinstance(value, str | int | float | None):
        hint = "; tensors belong into plan.tensors" if isinstance(value, Tensor) else ""
        raise ValueError(f"{where} of a plan cannot be written as JSON, found {type(value).__name__}{hint}")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            errno.ENOENT, f"no plan here (a plan is a folder with {_JSON} and {_TENSORS})", str(file)
        )
    fields = read_json(file, "copy the folder again, or plan again")
    if fields.get("format") != "qfx-plan":
        raise ValueError(f'{file} is not a plan of qfx (it lacks "format": "qfx-plan")')
    if fields.get("version") not in _READ:
        raise ValueError(
            f"{file} has version {fields.get('version')!r}, this qfx reads versions up to {VERSION}\n"
            "  next step: install the version of qfx that wrote it, or plan again"
        )
    known = {**_HEAD, **_FIELDS}
    if fields["version"] < 3:
        fields.setdefault("caches", {})
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {file}, {nearest(key, known)}")
    for key, kind in known.items():
        if not isinstance(fields.get(key), kind):
            raise ValueError(f"{key!r} in {file}: expected a {kind.__name__}, found {type(fields.get(key)).__name__}")
    _check_inner(fields, file)
    return fields


def _check_inner(fields: Mapping[str, Any], file: Path) -> None:
    for key, kind in _INNER.items():
        values = fields[key].values() if isinstance(fields[key], dict) else fields[key]
        if bad := [value for value in values if not isinstance(value, kind)]:
            raise ValueError(f"{key!r} in {file}: expected a {kind.__name__} in each place, found {bad[0]!r}")
