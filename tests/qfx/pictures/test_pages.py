"""The page: it holds everything itself, every picture says in words what it shows, and names are text."""

from __future__ import annotations

import base64
import builtins
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install qfx[pictures]")

from qfx.pictures import canvas, plans, report
from qfx.pictures.charts import Point
from qfx.pictures.page import Listing, Page, Picture
from qfx.plan import Plan
from qfx.recipe import Recipe
from tests.qfx.pictures import some


class Reader(HTMLParser):
    """Pictures, headings and cells of a page; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag == "img":
            self.images.append(own)
        elif tag != "meta":
            self.open.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: Page) -> Reader:
    return Reader(page.html())


def test_the_page_of_an_analysis() -> None:
    page = report.analysis(some.sensitivity(), title="Sensitivity of <Tiny>")
    found = read(page)
    names = [part.name for part in page.parts if isinstance(part, Picture)]
    assert names == ["sensitivity-weights", "sensitivity-caches", "head-types", "predicted"]
    assert len(found.images) == 4 and all(image["alt"] for image in found.images)
    text = " ".join(found.text)
    assert "Sensitivity of <Tiny>" in text and "a note about <heads>" in text and "quant-fisher" in text
    assert "layers.1.q_proj.q2" in text and "semantic" in text


def test_nothing_comes_from_elsewhere() -> None:
    found = read(report.analysis(some.sensitivity()))
    assert found.links and all(link.startswith("data:image/png;base64,") for link in found.links)
    for link in found.links:
        assert base64.b64decode(link.partition(",")[2]).startswith(b"\x89PNG")


def test_without_measurements_heads_or_caches() -> None:
    bare = some.sensitivity(caches=False, measured=False)
    object.__setattr__(bare, "heads", ())
    page = report.analysis(bare)
    assert [part.name for part in page.parts if isinstance(part, Picture)] == ["sensitivity-weights"]
    assert "; predicted." in page.html()


def test_the_heat_map_is_of_three_bits_or_the_nearest() -> None:
    found = some.sensitivity()
    assert set(report.shown_format(found, found.units).values()) == {"u3/g32"}
    only = {"quant-fisher": {"table": {"u4/g32": 1.0, "u6/g32": 0.1}}}
    object.__setattr__(found, "scores", only)
    assert report.shown_format(found, found.units) == {"table": "u4/g32"}


def test_pairs_are_of_what_was_measured() -> None:
    pairs = report.pairs_of(some.sensitivity())
    assert len(pairs) == 4 * len(some.FORMATS)
    assert all(pair.measured == pytest.approx(1.5 * pair.predicted) for pair in pairs)


def test_the_page_of_a_plan() -> None:
    page = plans.allocation(some.plan(), points=[Point("uniform", 25000, 0.05, "uniform")])
    found = read(page)
    assert [p.name for p in page.parts if isinstance(p, Picture)] == ["formats", "losses", "bytes", "pareto"]
    assert "avg_bits 4, bytes 20,000" in page.facts["budget"] and "3.998 bits" in page.facts["bytes"]
    (formats,) = (part for part in page.parts if isinstance(part, Listing) and part.title == "Formats")
    assert [row[0] for row in formats.rows] == list(some.FORMATS)
    assert sum(int(row[1]) for row in formats.rows) == len(some.units())
    assert len(found.images) == 4


@pytest.mark.parametrize(
    ("heads", "better", "told"),
    [
        (0.0195, "heads", "heads: cut by heads 1.95e-02, whole weights 2.00e-02, measured on data kept apart"),
        (0.021, "layers", "whole weights: cut by heads 2.10e-02, whole weights 2.00e-02"),
        (None, "layers", "whole weights: no cut by heads, whole weights 2.00e-02"),
    ],
)
def test_the_page_says_whether_heads_are_better(heads: float | None, better: str, told: str) -> None:
    plan = some.plan()
    assert "whole weights or heads" not in plans.allocation(plan).facts
    plan.sensitivities["allocation"]["judged"] = {
        "on": "data kept apart", "layers": 0.02, "heads": heads, "better": better, "whole": {},
    }  # fmt: skip
    assert plans.allocation(plan).facts["whole weights or heads"].startswith(told)


def test_units_of_heads_are_of_their_weight() -> None:
    parts = {part.name: part for part in plans.parts_of(some.plan())}
    assert parts["layers.0.q_proj.q1"].fqn == "layers.0.q_proj" and parts["layers.0.up"].fqn == "layers.0.up"


def test_a_plan_without_allocation_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("next step: qfx.plan(model, recipe, data, avg_bits=4)")):
        plans.allocation(Plan(Recipe.parse("w4a16")))


def test_files_are_written(tmp_path: Path) -> None:
    page = plans.allocation(some.plan())
    page.write(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=re.escape("pip install 'qfx[pictures]'")):
        canvas.figure(1, 1)


def test_no_state_of_matplotlib_is_changed() -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    before, backend = dict(mpl.rcParams), mpl.get_backend()
    report.analysis(some.sensitivity()).html()
    assert dict(mpl.rcParams) == before and mpl.get_backend() == backend
    assert plt.get_fignums() == []
