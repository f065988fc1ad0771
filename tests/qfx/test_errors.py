"""Messages hold every part that was given, the user's source line, and a helpful name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from qfx import errors
from qfx.errors import (
    QfxWarning,
    UnsupportedError,
    explain,
    first_line,
    listed,
    nearest,
    raised_at,
    reading,
    source_line,
)

TRACE = """  File "/home/me/model.py", line 12, in forward
    y = self.block(x)
  File "/home/me/model.py", line 30, in inner
    return torch.relu(y)
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/functional.py", line 99, in relu
    return result
"""


def make_node(trace: str | None = None) -> torch.fx.Node:
    graph = Graph()
    node = graph.call_function(torch.relu, (graph.placeholder("x"),))
    if trace is not None:
        node.meta["stack_trace"] = trace
    return node


def test_exception_types() -> None:
    assert issubclass(UnsupportedError, RuntimeError)
    assert issubclass(QfxWarning, UserWarning)


def test_explain_in_full() -> None:
    text = explain(
        "no kernel for 3 bits",
        expected="2, 4 or 8",
        found=3,
        node="%linear",
        source="m.py:3",
        next_step="use 'i4/g128'",
    )
    assert text.splitlines() == [
        "no kernel for 3 bits",
        "  expected: 2, 4 or 8",
        "  found: 3",
        "  node: %linear",
        "  source: m.py:3",
        "  next step: use 'i4/g128'",
    ]


def test_explain_leaves_out_what_is_none() -> None:
    assert explain("wrong") == "wrong"
    assert explain("wrong", found=0) == "wrong\n  found: 0"


def test_explain_takes_the_source_from_the_node() -> None:
    text = explain("wrong", node=make_node(TRACE))
    assert "node: %relu = call_function[" in text
    assert "source: /home/me/model.py:30, in inner: return torch.relu(y)" in text


def test_explain_prefers_the_source_given() -> None:
    text = explain("wrong", node=make_node(TRACE), source="other.py:1")
    assert "source: other.py:1" in text
    assert "model.py" not in text


def test_source_line_skips_library_frames() -> None:
    assert source_line(make_node(TRACE)) == "/home/me/model.py:30, in inner: return torch.relu(y)"


def test_source_line_falls_back_to_a_library_frame() -> None:
    only = 'File "/x/site-packages/torch/a.py", line 1, in f\n    g()\n'
    assert source_line(make_node(only)) == "/x/site-packages/torch/a.py:1, in f: g()"


def test_source_line_skips_frames_of_qfx() -> None:
    """What a quantized module of a live model calls was written by its user one frame before."""
    file = Path(errors.__file__).parent / "live" / "modules.py"
    own = f'  File "{file}", line 203, in forward\n    y = torch.ops.qfx.linear()\n'
    library = '  File "/x/site-packages/transformers/modeling_llama.py", line 7, in forward\n    q = self.q_proj(x)\n'
    assert source_line(make_node(TRACE + own)) == source_line(make_node(TRACE))
    found = source_line(make_node(library + own))
    assert found == "/x/site-packages/transformers/modeling_llama.py:7, in forward: q = self.q_proj(x)"
    assert "live/modules.py:203" in str(source_line(make_node(own)))


@pytest.mark.parametrize("trace", [None, "", "no frames here"])
def test_source_line_unknown(trace: str | None) -> None:
    assert source_line(make_node(trace)) is None


def test_nearest() -> None:
    assert nearest("w8a8_smooth", ["w8a8-smooth", "nf4"]) == "did you mean 'w8a8-smooth'?"
    assert nearest("GROUP", ["Group", "other"]) == "did you mean 'Group'?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"
    assert nearest("zzz", []) == "there are no valid names"
    assert nearest("aple", iter(["apple"])) == "did you mean 'apple'?"


def test_where_a_model_raised() -> None:
    with pytest.raises(TypeError) as raised:
        torch.nn.Linear(2, 2)("no")
    found = raised_at(raised.value)
    assert re.fullmatch(r'.*test_errors.py:\d+, in test_where_a_model_raised: torch.nn.Linear\(2, 2\)\("no"\)', found)
    assert raised_at(ValueError("never raised")) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \n"), "one"),
        (AssertionError(), "AssertionError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (ValueError("two fields:\n  are wrong\nsomehow"), "two fields: are wrong"),
        (ValueError("nothing:"), "nothing:"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize("kind", [ValueError, UnsupportedError, KeyError])
def test_errors_of_files_name_them(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, reading("a.json"):
        raise kind("bad")
    assert getattr(caught.value, "__notes__", None) == (None if kind is KeyError else ["in a.json"])
    with pytest.raises(kind) as caught, reading("a.json"):
        raise kind("a.json is bad")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [([], 3, ""), (["a"], 1, "a"), (["a", "b"], 1, "a and 1 more"), (["a", "b", "c"], 3, "a, b, c"),
     (["a", "b", "c", "d", "e"], 3, "a, b, c and 2 more")],
)  # fmt: skip
def test_names_are_listed(names: list[str], most: int, text: str) -> None:
    assert listed(names, most) == text
