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

What the cache of keys and values stores (`qfx.kv.formats`) is asked of "cache", or of that of some attentions by their
names; k and v may be lists, a format for each KV head:

    Rule(target="cache", k="u4/g32/f16", v="u2/g32/f16", residual=32, sinks=4)
    Rule(target="cache:*.layers.0.*", k="i8/tok/f16", v="i8/tok/f16")
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from qfx.annotation import ALL_ROLES, ROLES, Columns, Formats, each
from qfx.errors import nearest
from qfx.format import Format
from qfx.kv.asked import cache_texts, is_cache, names_of
from qfx.rewrites import combine
from qfx.rounding.method_options import AllocationOptions, GptqOptions, LearnedOptions, LiftOptions, changed
from qfx.strict import Strict

KINDS: tuple[str, ...] = tuple(ROLES)
REWRITES: tuple[str, ...] = combine.ORDER
DATA_ROUNDINGS: tuple[str, ...] = ("gptq", "learned")  # round by what each layer reads
DATA_REWRITES: tuple[str, ...] = ("awq", "smooth", "smooth-k", "v-o", "up-down")  # choose their factors by data
NONE = "none"
CACHE = "cache"  # the op kind; `cache:<name>` are those of some attentions


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
    if is_cache(target):
        if target != CACHE:
            _check_target(names_of(target))
    elif target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise ValueError(f"bad regular expression in target {target!r}: {error}") from error
    elif target not in KINDS and target.lower() in KINDS:
        raise ValueError(f"op kinds are written in lower case, did you mean {target.lower()!r}? (found {target!r})")
    elif not target.strip():
        raise ValueError(
            f"a target is an op kind ({', '.join(KINDS)}), a name, a glob, 're:<regex>' or 'cache:<name>', "
            f"found {target!r}"
        )
    return target


Tokens = Annotated[int, Field(strict=True, ge=0)]
FormatText = Annotated[str | None, BeforeValidator(_format_text)]
WeightText = Annotated[str | tuple[str, ...] | list[Any] | None, BeforeValidator(_weight_text)]
Target = Annotated[str, Field(strict=True)]


class Rule(Strict):
    """Formats for the nodes that a target matches: an op kind, a name or glob of names, or `re:<regex>`.

    Roles: x input activation, w weight, y output, q k v p of attention (p: the softmax's result), k v of a cache. Each
    is a format text, "none" (leave it in its own precision) or None (say nothing about it). A linear's w may be a list
    of formats, for equal parts of its rows, or along="columns" of its columns; q, k, v and p may be lists, for heads
    (of keys and values; q and p: of queries, too). fit_groups: a weight whose columns are not whole groups of w gets
    shorter ones where these are fewer bytes (`Format.fitted`). residual, sinks: of a cache, the newest and the first
    tokens that stay as they are. Raises ValueError for bad formats and targets, and for roles, lists and fields that
    the op kind does not have.
    """

    target: Target
    x: FormatText = None
    w: WeightText = None
    y: FormatText = None
    q: WeightText = None
    k: WeightText = None
    v: WeightText = None
    p: WeightText = None
    along: Literal["rows", "columns"] = "rows"
    fit_groups: Annotated[bool, Field(strict=True)] = False
    residual: Tokens | None = None
    sinks: Tokens | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, fields: Any) -> Any:
        """Caches have names of their own for formats ("i4"), and formats that no other role can have."""
        if isinstance(fields, Mapping) and isinstance(target := fields.get("target"), str) and is_cache(target):
            return {**fields, **{role: cache_texts(role, fields[role]) for role in ROLES[CACHE] if role in fields}}
        return fields

    @field_validator("target")
    @classmethod
    def _valid_target(cls, target: str) -> str:
        return _check_target(target)

    @model_validator(mode="after")
    def _valid_roles(self) -> Self:
        texts, kind = self.texts, CACHE if is_cache(self.target) else self.target
        if not texts and not self.tokens:
            roles = ", ".join(ROLES.get(kind, ALL_ROLES))
            raise ValueError(f"the rule for {self.target!r} names no format; give one of {roles}")
        for role in texts:
            if kind in ROLES and role not in ROLES[kind]:
                raise ValueError(f"{self.target!r} has no role {role!r}, only {', '.join(ROLES[kind])}")
        for name in self.tokens if kind != CACHE else ():
            raise ValueError(f"{name} is a number of tokens of 'cache', which {self.target!r} does not have")
        if isinstance(self.w, tuple):
            if self.target in ROLES and self.target != "linear":
                raise ValueError(f"only the weight of a linear takes a list of formats, not that of {self.target!r}")
        elif self.along != "rows":
            raise ValueError(f"along={self.along!r} says how a list of formats cuts w, found w={self.w!r}")
        if self.fit_groups and (not isinstance(self.w, str) or self.w == NONE or not Format.parse(self.w).group):
            raise ValueError(f"fit_groups=True is for one w with groups, such as 'u4/g128/f16', found w={self.w!r}")
        return self

    @property
    def texts(self) -> dict[str, str | tuple[str, ...]]:
        """Role -> format text (w: or several), for the roles that the rule names."""
        return {role: text for role in ALL_ROLES if (text := getattr(self, role)) is not None}

    @property
    def tokens(self) -> dict[str, int]:
        """residual and sinks, where the rule names them."""
        return {name: count for name in ("residual", "sinks") if (count := getattr(self, name)) is not None}

    def formats(self, role: str, columns: int | None = None) -> Formats:
        """The format of a role that the rule names and does not leave alone; all but x and y may have several.

        columns: of the weight, where they are known, for `fit_groups`.
        """
        text = self.texts[role]
        if isinstance(text, str):
            fmt = Format.parse(text)
            return fmt.fitted(columns) if role == "w" and self.fit_groups and columns else fmt
        found = tuple(Format.parse(one) for one in text)
        return Columns(found) if self.along == "columns" and role == "w" else found

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of what the rule says; `Rule(**...)` reads it back."""
        texts = {role: text if isinstance(text, str) else list(text) for role, text in self.texts.items()}
        along = {"along": self.along} if self.along != "rows" else {}
        fit = {"fit_groups": True} if self.fit_groups else {}
        return {"target": self.target, **texts, **along, **fit, **self.tokens}

    def matches(self, kind: str, fqn: str, *, tied: bool = False) -> bool:
        """Whether the rule is for the node of this kind and fully qualified name, whose weight may be a tied table."""
        return matches(self.target, kind, fqn, tied=tied)


class Recipe(Strict):
    """What the user asks for. Fields (all checked; unknown keys are refused):

    rules: the later one wins, role by role. ignore: targets that stay untouched whatever the rules say.
    rewrites: exact rewrites to apply first (REWRITES); `qfx.rewrites.combine` says what goes together. smooth_alpha:
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
    cache_bits: give keys and values of each head of the caches that rules for "cache" name bits of their own, as many
    on average: the cache then takes no more bytes than one of so many bits everywhere. Needs data.
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
    cache_bits: Annotated[float, Field(ge=2, le=6)] | None = None

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
        if self.cache_bits is not None and not any(rule.target == CACHE for rule in self.rules):
            raise ValueError(f"cache_bits={self.cache_bits:g} is for a rule with the target 'cache', found none")
        return self

    def formats_for(self, kind: str, fqn: str, *, tied: bool = False, columns: int | None = None) -> dict[str, Formats]:
        """Role -> Format (w: or several) for the node of this kind and name; roles left alone are absent.

        tied: an embedding and a linear read its weight. columns: of the weight, over which groups lie (`fit_groups`;
        None: groups as the rules say). Roles that the kind does not have are left out. Raises
        ValueError for an unknown kind.
        """
        if kind not in ROLES:
            raise ValueError(f"unknown op kind {kind!r}, {nearest(kind, KINDS)}")
        if any(matches(target, kind, fqn, tied=tied) for target in self.ignore):
            return {}
        found: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.matches(kind, fqn, tied=tied):
                found.update(dict.fromkeys(rule.texts, rule))
        return {r: found[r].formats(r, columns) for r in ROLES[kind] if r in found and found[r].texts[r] != NONE}

    @property
    def cache_rules(self) -> tuple[Rule, ...]:
        """Those for caches."""
        return tuple(rule for rule in self.rules if is_cache(rule.target))

    @property
    def only_caches(self) -> bool:
        """Nothing but formats of caches is asked for, which no data can change."""
        same = all(getattr(self, name) == Recipe.model_fields[name].default for name in ("rewrites", "rounding"))
        return same and not self.needs_data and len(self.cache_rules) == len(self.rules) > 0

    def names_cache(self, fqn: str) -> bool:
        """Whether a rule names the cache of this attention, not just all caches."""
        return any(rule.target != CACHE and rule.matches(CACHE, fqn) for rule in self.cache_rules)

    def cache_for(self, fqn: str) -> dict[str, Any]:
        """What rules ask of the cache of the attention of this name: k, v (texts or tuples of them), residual, sinks;
        only what is named, and {} for one that stays as it is."""
        if any(matches(target, CACHE, fqn) for target in self.ignore):
            return {}
        found: dict[str, Any] = {}
        for rule in self.cache_rules:
            if rule.matches(CACHE, fqn):
                found |= {**rule.texts, **rule.tokens}
        formats = {role: found.pop(role) for role in "kv" if role in found}
        kept = {role: text for role, text in formats.items() if text != NONE}
        return {**kept, **found} if kept else {}

    def unmatched(self, nodes: Iterable[tuple[str, str]]) -> list[str]:
        """Targets of rules and of `ignore`, op kinds and caches aside, that match none of the (kind, name) pairs:
        likely typos."""
        pairs = list(nodes)
        targets = dict.fromkeys([*(rule.target for rule in self.rules), *self.ignore])
        return [
            t
            for t in targets
            if t not in KINDS and not is_cache(t) and not any(matches(t, kind, fqn) for kind, fqn in pairs)
        ]

    @property
    def needs_data(self) -> bool:
        """Calibration data is needed: a static activation format that some rule gives, a rewrite of DATA_REWRITES, a
        rounding of DATA_ROUNDINGS or weighted by inputs, outliers, clipped inputs, formats to choose, or a correction.

        A format that a later rule of the same target replaces does not count.
        """
        own = [rule for rule in self.rules if not is_cache(rule.target)]  # a cache finds its scales as tokens come
        free = ("w", "p")  # the weights of attention lie between 0 and 1
        last = {(rule.target, role): rule for rule in own for role in rule.texts if role not in free}
        chosen = not set(self.rewrites).isdisjoint(DATA_REWRITES) or self.rounding in DATA_ROUNDINGS
        chosen = chosen or self.bias_correction or bool(self.low_rank or self.allocation or self.lift)
        chosen = chosen or self.weighting != "uniform" or self.outliers is not None or self.clip_inputs
        chosen = chosen or self.cache_bits is not None
        given = [rule.formats(role) for (_, role), rule in last.items() if rule.texts[role] != NONE]
        return chosen or any(is_static(fmt) for formats in given for fmt in each(formats))

    def override(self, **fields: Any) -> Recipe:
        """The recipe with other values in some fields, checked as in the constructor. A mapping for the options of a
        method changes those that it names, `gptq={"sweeps": 0}`; the others stay. Raises ValueError."""
        held = {name: getattr(self, name) for name in Recipe.model_fields}
        return Recipe(**{**held, **{name: changed(held.get(name), value) for name, value in fields.items()}})

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
        from qfx.recipe_source import recipe_of  # which makes recipes, so it imports this file

        return recipe_of(source)


def is_static(fmt: Format) -> bool:
    """An activation in this format needs a scale found from data: it has one, and it is not found at run time."""
    return not fmt.is_plain and not fmt.dynamic


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def matches(target: str, kind: str, fqn: str, *, tied: bool = False) -> bool:
    """Whether a target is for the node of this kind and name, whose weight may be a tied table."""
    if is_cache(target) or kind == CACHE:
        return is_cache(target) and kind == CACHE and (target == CACHE or matches(names_of(target), "", fqn))
    if target == "tied":
        return tied
    if target in KINDS:
        return target == kind
    if target.startswith("re:"):
        return _regex(target[3:]).match(fqn) is not None
    return fnmatchcase(fqn, target)
