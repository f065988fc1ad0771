"""Recipe: what the user asks for, as ordered rules from targets to formats. Presets are in `qfx/presets.py`.

    Recipe(name="mine", rules=(
        Rule(target="linear", x="i8/tok", w="i8/ch"),         # an op kind
        Rule(target="tied", w="u4/g128"),                     # tables that an embedding and a linear share: stored once
        Rule(target="*.lm_head", w="f32", x="none"),          # a glob over fully qualified names; the later rule wins
        Rule(target="re:.*layers\\.0\\.", w="none"),           # a regular expression, matched from the start
    ))

A format "none" leaves a role in its own precision; a role that a rule does not name keeps what earlier rules gave it.
Without x a backend may round the input of a linear with a quantized weight where its fastest kernel does so, which a
note says; x="f32" asks for an input that nothing rounds.
A linear's w may be a list: its output rows, cut into that many equal parts, have a format each (q, k, v by heads); with
along="columns" its input columns (an output projection by heads):

    Rule(target="*.q_proj", w=["i8/ch", "i4/g128", "i4/g128", "i4/g128"])
    Rule(target="*.o_proj", w=["i8/ch", "i4/g128", "i4/g128", "i4/g128"], along="columns")
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from qfx import combine
from qfx.annotation import ALL_ROLES, ROLES, Columns, Formats
from qfx.errors import nearest
from qfx.format import Format
from qfx.method_options import AllocationOptions, GptqOptions, LearnedOptions, LiftOptions
from qfx.strict import Strict

KINDS: tuple[str, ...] = tuple(ROLES)
REWRITES: tuple[str, ...] = combine.ORDER
DATA_ROUNDINGS: tuple[str, ...] = ("gptq", "learned")  # round by what each layer reads
DATA_REWRITES: tuple[str, ...] = ("awq", "smooth", "smooth-k", "v-o", "up-down")  # choose their factors by data
OBSERVERS: tuple[str, ...] = ("absmax", "minmax", "ema", "percentile", "mse", "entropy")
NONE = "none"


def _format_text(value: object) -> object:
    if value is None or value == NONE:
        return value
    return str(value) if isinstance(value, Format) else str(Format.parse(value))  # type: ignore[arg-type]


def _weight_text(value: object) -> object:
    """One format, or several, which are always held as a tuple."""
    if not isinstance(value, list | tuple):
        return _format_text(value)
    if not value:
        raise ValueError("a list of formats is empty")
    return tuple(str(fmt) if isinstance(fmt, Format) else str(Format.parse(fmt)) for fmt in value)


def _check_target(target: str) -> str:
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise ValueError(f"bad regular expression in target {target!r}: {error}") from error
    elif target not in KINDS and target.lower() in KINDS:
        raise ValueError(f"op kinds are written in lower case, did you mean {target.lower()!r}? (found {target!r})")
    elif not target.strip():
        raise ValueError(
            f"a target is an op kind ({', '.join(KINDS)}), a name, a glob or 're:<regex>', found {target!r}"
        )
    return target


FormatText = Annotated[str | None, BeforeValidator(_format_text)]
WeightText = Annotated[str | tuple[str, ...] | list[Any] | None, BeforeValidator(_weight_text)]
Target = Annotated[str, Field(strict=True)]


class Rule(Strict):
    """Formats for the nodes that a target matches: an op kind, a name or glob of names, or `re:<regex>`.

    Roles: x input activation, w weight, y output, q k v p of attention (p: the softmax's result). Each is a format
    text, "none" (leave it in its own precision) or None (say nothing about it). A linear's w may be a list of formats,
    for equal parts of its rows, or along="columns" of its columns. Raises ValueError for bad formats and targets, and
    for roles and lists that the op kind does not have.
    """

    target: Target
    x: FormatText = None
    w: WeightText = None
    y: FormatText = None
    q: FormatText = None
    k: FormatText = None
    v: FormatText = None
    p: FormatText = None
    along: Literal["rows", "columns"] = "rows"

    @field_validator("target")
    @classmethod
    def _valid_target(cls, target: str) -> str:
        return _check_target(target)

    @model_validator(mode="after")
    def _valid_roles(self) -> Self:
        texts = self.texts
        if not texts:
            raise ValueError(f"the rule for {self.target!r} names no format; give one of {', '.join(ALL_ROLES)}")
        for role in texts:
            if self.target in ROLES and role not in ROLES[self.target]:
                raise ValueError(f"{self.target!r} has no role {role!r}, only {', '.join(ROLES[self.target])}")
        if isinstance(self.w, tuple):
            if self.target in ROLES and self.target != "linear":
                raise ValueError(f"only the weight of a linear takes a list of formats, not that of {self.target!r}")
        elif self.along != "rows":
            raise ValueError(f"along={self.along!r} says how a list of formats cuts w, found w={self.w!r}")
        return self

    @property
    def texts(self) -> dict[str, str | tuple[str, ...]]:
        """Role -> format text (w: or several), for the roles that the rule names."""
        return {role: text for role in ALL_ROLES if (text := getattr(self, role)) is not None}

    def formats(self, role: str) -> Formats:
        """The format of a role that the rule names and does not leave alone; w may have several."""
        text = self.texts[role]
        if isinstance(text, str):
            return Format.parse(text)
        each = tuple(Format.parse(one) for one in text)
        return Columns(each) if self.along == "columns" else each

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of what the rule says; `Rule(**...)` reads it back."""
        texts = {role: text if isinstance(text, str) else list(text) for role, text in self.texts.items()}
        return {"target": self.target, **texts, **({"along": self.along} if self.along != "rows" else {})}

    def matches(self, kind: str, fqn: str, *, tied: bool = False) -> bool:
        """Whether the rule is for the node of this kind and fully qualified name, whose weight may be a tied table."""
        return _matches(self.target, kind, fqn, tied=tied)


class Recipe(Strict):
    """What the user asks for. Fields (all checked; unknown keys are refused):

    rules: the later one wins, role by role. ignore: targets that stay untouched whatever the rules say.
    rewrites: exact rewrites to apply first (REWRITES); `qfx.combine` says what goes together. smooth_alpha:
    SmoothQuant's exponent, or "search". rotation_seed: of the signs of rotations. rotation_block: channels that a
    rotation mixes; "auto" is the group of FP4 formats, else all.
    rounding: of weights, "rtn" (scale from the extremes), "mse" (scale of the least squared error), "hqq"
    (half-quadratic), "gptq" (layer by layer, by what each reads) or "learned" (gradient descent, block by block); the
    last two need data, and have options in gptq and learned.
    outliers: input channels of linears that exceed this magnitude in the calibration data stay in 16 bits (LLM.int8).
    clip_inputs: search on data how much of the extremes scales found at run time span (as u4/tok/c90 says itself).
    weighting: what an error costs for "mse": "uniform", or as the inputs make it, by the "energy" of each channel or
    the "covariance" of those nearby (AWQ's clip search); both need data.
    bias_correction: shift the mean of each linear's error into its bias. low_rank: rank of float linears that carry the
    largest part of each linear's error (0: none). Both need data, and are not exact.
    observer, percentile, num_calibration_samples: how scales of static activations are found.
    allocation: give each part of each weight a format of its own under a budget, instead of what rules for op kinds
    say; a rule for a name holds, and is counted. lift: more bits for the heads or layers that cost most. Need data.
    """

    name: Annotated[str, Field(strict=True, min_length=1)]
    rules: tuple[Rule, ...]
    ignore: tuple[Target, ...] = ()
    rewrites: tuple[Annotated[str, Field(strict=True)], ...] = ()
    smooth_alpha: float | Literal["search"] = 0.5
    rotation_seed: Annotated[int, Field(strict=True, ge=0)] = 0
    rotation_block: Annotated[int, Field(strict=True, ge=2)] | Literal["auto"] = "auto"
    rounding: Literal["rtn", "mse", "hqq", "gptq", "learned"] = "rtn"
    gptq: GptqOptions = GptqOptions()
    outliers: Annotated[float, Field(gt=0)] | None = None
    clip_inputs: Annotated[bool, Field(strict=True)] = False
    weighting: Literal["uniform", "energy", "covariance"] = "uniform"
    learned: LearnedOptions = LearnedOptions()
    bias_correction: Annotated[bool, Field(strict=True)] = False
    low_rank: Annotated[int, Field(strict=True, ge=0)] = 0
    observer: Literal["absmax", "minmax", "ema", "percentile", "mse", "entropy"] = "minmax"
    percentile: Annotated[float, Field(strict=True, gt=50, le=100)] = 99.99
    num_calibration_samples: Annotated[int, Field(strict=True, ge=1)] = 128
    allocation: AllocationOptions | None = None
    lift: LiftOptions | None = None

    @field_validator("ignore")
    @classmethod
    def _valid_ignore(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_check_target(target) for target in ignore)

    @field_validator("rewrites")
    @classmethod
    def _valid_rewrites(cls, rewrites: tuple[str, ...]) -> tuple[str, ...]:
        for name in rewrites:
            if name not in REWRITES:
                raise ValueError(f"unknown rewrite {name!r}, {nearest(name, REWRITES)}")
        return tuple(dict.fromkeys(rewrites))

    @field_validator("smooth_alpha", mode="before")
    @classmethod
    def _valid_alpha(cls, alpha: object) -> object:
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha == "search" or (number and 0 <= float(alpha) <= 1):  # type: ignore[arg-type]
            return alpha
        raise ValueError(f'a number from 0 to 1 or "search" is expected, found {alpha!r}')

    @model_validator(mode="after")
    def _valid_combination(self) -> Self:
        if self.weighting != "uniform" and self.rounding != "mse":
            raise ValueError(f"weighting={self.weighting!r} is for rounding='mse', found rounding={self.rounding!r}")
        given = [name for name in ("lift", "allocation", "outliers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both change formats: choose one")
        combine.check(self.rewrites)
        return self

    def formats_for(self, kind: str, fqn: str, *, tied: bool = False) -> dict[str, Formats]:
        """Role -> Format (w: or several) for the node of this kind and name; roles left alone are absent.

        tied: an embedding and a linear read its weight. Roles that the kind does not have are left out. Raises
        ValueError for an unknown kind.
        """
        if kind not in ROLES:
            raise ValueError(f"unknown op kind {kind!r}, {nearest(kind, KINDS)}")
        if any(_matches(target, kind, fqn, tied=tied) for target in self.ignore):
            return {}
        found: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.matches(kind, fqn, tied=tied):
                found.update(dict.fromkeys(rule.texts, rule))
        return {r: found[r].formats(r) for r in ROLES[kind] if r in found and found[r].texts[r] != NONE}

    def unmatched(self, nodes: Iterable[tuple[str, str]]) -> list[str]:
        """Targets of rules and of `ignore`, op kinds aside, that match none of the (kind, name) pairs: likely typos."""
        pairs = list(nodes)
        targets = dict.fromkeys([*(rule.target for rule in self.rules), *self.ignore])
        return [t for t in targets if t not in KINDS and not any(_matches(t, kind, fqn) for kind, fqn in pairs)]

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed: a static activation format that some rule gives, a rewrite of DATA_REWRITES, a
        rounding of DATA_ROUNDINGS or weighted by inputs, outliers, clipped inputs, formats to choose, or a correction.

        A format that a later rule of the same target replaces does not count.
        """
        own = ("w", "p")  # the weights of attention lie between 0 and 1
        last = {(rule.target, role): rule for rule in self.rules for role in rule.texts if role not in own}
        chosen = not set(self.rewrites).isdisjoint(DATA_REWRITES) or self.rounding in DATA_ROUNDINGS
        chosen = chosen or self.bias_correction or bool(self.low_rank or self.allocation or self.lift)
        chosen = chosen or self.weighting != "uniform" or self.outliers is not None or self.clip_inputs
        given = [rule.formats(role) for (_, role), rule in last.items() if rule.texts[role] != NONE]
        return chosen or any(is_static(fmt) for fmt in given if isinstance(fmt, Format))

    def override(self, **fields: Any) -> Recipe:
        """The recipe with other values in some fields, checked as in the constructor. Raises ValueError."""
        return Recipe(**{**{name: getattr(self, name) for name in Recipe.model_fields}, **fields})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary, every field included; `Recipe.parse` reads it back."""
        fields: dict[str, Any] = json.loads(self.model_dump_json())
        fields["rules"] = [rule.to_dict() for rule in self.rules]
        return fields

    def to_json(self) -> str:
        """JSON text; `Recipe.parse` reads a file of it back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_yaml(self) -> str:
        """YAML text; `Recipe.parse` reads a file of it back."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120))

    @classmethod
    def parse(cls, source: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
        """A recipe from a preset's name, names joined by "+", a .yaml, .yml or .json file, a dictionary, or a Recipe.

        Raises ValueError (FileNotFoundError for a file that is not there) with the nearest valid name.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return _from_mapping(source, "the dictionary")
        if isinstance(source, os.PathLike) or (isinstance(source, str) and source.endswith(_SUFFIXES)):
            return _from_file(Path(source))
        if isinstance(source, str):
            return _combine([_preset(name.strip()) for name in source.split("+")])
        raise ValueError(
            f"a recipe is a preset's name, a path, a dictionary or a Recipe, found {type(source).__name__}: {source!r}"
        )


_SUFFIXES = (".yaml", ".yml", ".json")


def is_static(fmt: Format) -> bool:
    """An activation in this format needs a scale found from data: it has one, and it is not found at run time."""
    return not fmt.is_plain and not fmt.dynamic


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _matches(target: str, kind: str, fqn: str, *, tied: bool = False) -> bool:
    if target == "tied":
        return tied
    if target in KINDS:
        return target == kind
    if target.startswith("re:"):
        return _regex(target[3:]).match(fqn) is not None
    return fnmatchcase(fqn, target)


def _preset(name: str) -> Recipe:
    from qfx.presets import UNAVAILABLE, presets  # presets are recipes, so they import this file

    known = presets()
    if name in known:
        return known[name]
    available = f"available presets: {', '.join(known)}"
    if name in UNAVAILABLE:
        raise ValueError(f"preset {name!r} is not in this version: {UNAVAILABLE[name]}; {available}")
    raise ValueError(f"unknown preset {name!r}, {nearest(name, known)} ({available})")


def _combine(recipes: list[Recipe]) -> Recipe:
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


def _from_file(path: Path) -> Recipe:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a recipe file ends in {', '.join(_SUFFIXES)}, found {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            fields = json.loads(text, object_pairs_hook=_unique)
        else:
            fields = yaml.load(text, _UniqueLoader)  # noqa: S506 (a SafeLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(fields, Mapping):
        return _from_mapping({"name": path.stem, **fields}, str(path))
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
