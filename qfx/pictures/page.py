"""One HTML page that holds everything itself: pictures as data, tables, no scripts, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from qfx.pictures import canvas
from qfx.storage.files import write_text

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 2rem auto; max-width: 76rem;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p { max-width: 54rem; } .facts { color: #52606d; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-size: 13px; margin: .8rem 0; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #9aa5b1; }
details { margin: .8rem 0; } summary { cursor: pointer; color: #2a6f97; } .wide { overflow-x: auto; }
.note { border-left: 3px solid #e07a1f; padding-left: .7rem; }
"""

_HTML = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """name: of its PNG file. title, caption: what it shows, in words. figure: a matplotlib Figure."""

    name: str
    title: str
    caption: str
    figure: Any


@dataclass(frozen=True)
class Listing:
    """A table: title, headings, rows of texts. folded: behind a line to be opened."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """title; facts: what is known of model and data, in a line each; what is shown, in order; notes."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Picture | Listing] = ()
    notes: Sequence[str] = ()

    def html(self) -> str:
        """The page as text."""
        facts = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in self.facts.items())
        body = [f"<h1>{escape(self.title)}</h1>", f'<p class="facts">{facts}</p>' if facts else ""]
        body += [f'<p class="note">{escape(note)}</p>' for note in self.notes]
        body += [_picture(part) if isinstance(part, Picture) else _listing(part) for part in self.parts]
        return _HTML.format(title=escape(self.title), style=_STYLE, body="\n".join(line for line in body if line))

    def write(self, file: Path) -> None:
        """Write the page. Raises OSError."""
        write_text(file, self.html())


def _picture(part: Picture) -> str:
    data = base64.b64encode(canvas.png(part.figure)).decode("ascii")
    alt = escape(f"{part.title}. {part.caption}", quote=True)
    return (
        f"<h2>{escape(part.title)}</h2>\n<p>{escape(part.caption)}</p>\n"
        f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    )


def _listing(part: Listing) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in part.headings)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows)
    table = f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'
    if part.folded:
        return f"<details><summary>{escape(part.title)}</summary>\n{table}\n</details>"
    return f"<h2>{escape(part.title)}</h2>\n{table}"
