"""The stages that the README shows."""

from __future__ import annotations

import re

from examples.how_it_works import stages
from qfx.recipe import Recipe


def test_the_graph_gets_smaller_then_annotated_then_packed() -> None:
    (_, captured), (_, normal), (_, annotated), (_, packed), (_, kernels) = stages(Recipe.parse("w8a8"))
    assert "rsqrt" in captured and "rms_norm" in normal and "rsqrt" not in normal
    assert len(re.findall(r"# x=i8/tok w=i8/ch$", annotated, flags=re.MULTILINE)) == 2
    assert annotated.replace("  # x=i8/tok w=i8/ch", "") == normal
    assert packed.count("qfx.linear") == 2 and "aten.linear" not in packed
    assert len(kernels.splitlines()) >= 4


def test_the_recipe_decides() -> None:
    names = dict(stages(Recipe.parse("w4a16")))
    assert "w=u4/g32/f16" in names["annotate: the recipe's formats on the nodes"]
