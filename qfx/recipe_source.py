"""A recipe from what users write: names of presets, a file of YAML or JSON, a dictionary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qfx.errors import nearest, reading
from qfx.presets import presets
from qfx.recipe import Recipe, Rule

_SUFFIXES = (".yaml", ".yml", ".json")


def recipe_of(source: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """What `Recipe.parse` gives."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source, "the dictionary")
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source.endswith(_SUFFIXES)):
        path = Path(source)
        with reading(path):
            return _from_mapping(_read(path), str(path))
    if isinstance(source, str):
        return combined([_preset(name.strip()) for name in source.split("+")])
    raise ValueError(
        f"a recipe is a preset's name, a path, a dictionary or a Recipe, found {type(source).__name__}: {source!r}"
    )


def _preset(name: str) -> Recipe:
    known = presets()
    if name in known:
        return known[name]
    near = nearest(name, known)
    if near.startswith("did"):
        near += f" (available presets: {', '.join(known)})"
    raise ValueError(f"unknown preset {name!r}, {near}")


def combined(recipes: list[Recipe]) -> Recipe:
    """One recipe: rules and ignores in order, rewrites united, of the other fields the last that is no default."""
    if len(recipes) == 1:
        return recipes[0]
    fields: dict[str, Any] = {
        "name": "+".join(recipe.name for recipe in recipes),
        "rules": tuple(rule for recipe in recipes for rule in recipe.rules),
    }
    for name in ("ignore", "rewrites"):
        fields[name] = tuple(dict.fromkeys(item for recipe in recipes for item in getattr(recipe, name)))
    for name, field in Recipe.model_fields.items():
        if name not in fields:
            fields[name] = next(
                (v for r in reversed(recipes) if (v := getattr(r, name)) != field.default), field.default
            )
    return Recipe(**fields)


def _from_mapping(fields: Mapping[str, Any], where: str) -> Recipe:
    if bad := [key for key in fields if not isinstance(key, str)]:
        raise ValueError(f"keys of a recipe are texts, found {bad[0]!r} in {where}")
    fields = {"name": "custom", **fields}
    rules = fields.get("rules")
    if isinstance(rules, list | tuple):  # built here, so that a mistake is told as "in rule 2"
        fields["rules"] = tuple(_rule(rule, number, where) for number, rule in enumerate(rules, 1))
    return Recipe(**fields)


def _rule(rule: object, number: int, where: str) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping) or not all(isinstance(key, str) for key in rule):
        raise ValueError(f"rule {number} in {where} is no dictionary of target and formats, found {rule!r}")
    try:
        return Rule(**rule)
    except ValueError as error:
        raise ValueError(f"rule {number} in {where}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The fields of a recipe in a file; its name is that of the file where it gives none.

    Raises FileNotFoundError, and ValueError for another suffix, for what cannot be read and for what is no dictionary.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a recipe file ends in {', '.join(_SUFFIXES)}, found {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            fields = json.loads(text, object_pairs_hook=_unique)
        else:
            fields = yaml.load(text, _UniqueLoader)  # noqa: S506 (a SafeLoader)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(fields, Mapping):
        return {"name": path.stem, **fields}
    raise ValueError(f"{path} holds no recipe (name, rules, ...), found {type(fields).__name__}")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


class _UniqueLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return _unique(
            [(self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value]
        )
