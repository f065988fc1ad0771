"""`QfxConfig`: what transformers' `from_pretrained(quantization_config=...)` is given, and what config.json holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qfx.errors import check_flags
from qfx.hf.attach import METHOD
from qfx.hf.quantization_config import unwrap, wrap
from qfx.recipe import Recipe
from qfx.storage.describe import Record


class QfxConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantize a transformers model by a recipe while it is loaded.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=qfx.QfxConfig(recipe="w4a16"))

    recipe: what `Recipe.parse` takes, one that needs no data. strict: what cannot be had as asked is an error, no
    warning. overrides: fields of the recipe to change. Raises ValueError for an unknown recipe or field.
    """

    def __init__(self, recipe: Any = "w8a8", *, strict: bool = False, **overrides: Any) -> None:
        check_flags(strict=strict)
        parsed = Recipe.parse(recipe)
        self.quant_method = METHOD
        self.recipe: Recipe | None = parsed.override(**overrides) if overrides else parsed
        self.strict = strict
        self.model: Record | None = None

    @classmethod
    def of(cls, recipe: Recipe | None, record: Record | None = None) -> QfxConfig:
        """The config of a model that is quantized already; recipe None: not known by which."""
        made = cls(recipe or "w8a8")
        made.recipe, made.model = recipe, record
        return made

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` wrote. Raises ValueError for one of another version, and for unknown keys."""
        recipe, record = unwrap(config_dict, "quantization_config in config.json")
        made = cls.of(recipe, record)
        made.strict = config_dict.get("strict", False)
        check_flags(strict=made.strict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary, as config.json holds it."""
        return {**wrap(self.recipe, self.model), **({"strict": True} if self.strict else {})}

    def __deepcopy__(self, memo: dict[int, Any]) -> QfxConfig:
        # Models copy their configuration in forwards (encoder-decoders with a new cache), and Dynamo traces that: it
        # finds no end in pydantic's own copy. Recipe and record are not changed by anyone, so that copies share them.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()
