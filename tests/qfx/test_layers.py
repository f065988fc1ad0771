"""Imports go one way: a file may import its own layer and those below it."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest first; "package: parts". A module of qfx that stands nowhere here is in the layer of PIPELINE.
PIPELINE = "compile"
LAYERS = (
    """
    errors format finite long_sizes processor strict
    rounding: nested method_options
    storage: spill files folders hollow checkpoint skeleton
    ops: library
    rewrites: combine centred rotation head_order
    live: subclass stored
    """,
    """
    annotation text numerics packing conditions
    calibration: histogram importance padding
    rounding: scales hqq nearest
    ops: packed floats
    measuring: measure
    """,
    "live: segments",
    """
    kv: formats codes attend store states layers static cache native tail packed_ops static_packed plans
    kv: asked as_stored
    ops: cached heads attention
    rounding: parts rounded
    recipe_source graph layouts names vmaps encoder_layer trace sources traced_call common_sizes
    capture run verify plan recipe presets
    reporting: rows fold
    live: modules mixed parameters
    calibration: positions
    """,
    """
    calibration: observers sample moments
    inputs data
    hf: hub
    storage: streamed
    rounding: lanes blocks offsets
    """,
    "passes",
    """
    pipeline
    rewrites: transform rotations permute
    storage: resume
    rounding: sequential correct
    analysis: attentions movable
    """,
    "backends",
    "compile quantize report save",
    """
    measuring: compare matrix
    training: merging
    advise cli
    reporting: render_advice
    """,
)


def _sources() -> dict[str, Path]:
    """Module name -> file, of everything that ships."""
    found = {}
    for folder, package in (("qfx", "qfx"), ("passes", "qfx.passes"), ("backends", "qfx.backends")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def _imported(tree: ast.AST) -> set[str]:
    """Names of the modules that the code imports; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module!r}: write the full name"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _names(layer: str) -> list[str]:
    """Full names of what a layer's lines list."""
    names = []
    for line in layer.strip().splitlines():
        package, _, parts = line.rpartition(":")
        names += [".".join(filter(None, ("qfx", package.strip(), part))) for part in parts.split()]
    return names


def _layer(module: str) -> int:
    """Height of a module, or of a name in it; -1 for what is not of qfx."""
    if not module.startswith("qfx."):
        return -1
    for height, names in enumerate(map(_names, LAYERS)):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    return _layer(f"qfx.{PIPELINE}")


def _upward(module: str, source: str) -> list[str]:
    """What a module imports from layers above its own; of a package and a part of it the part."""
    names = _imported(ast.parse(source))
    parts = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return sorted(name for name in parts if _layer(name) > _layer(module))


def test_layers_name_what_is_there() -> None:
    listed = [name for layer in LAYERS for name in _names(layer)]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(_sources())


@pytest.mark.parametrize("module", [name for name in _sources() if name != "qfx"])
def test_imports_only_go_down(module: str) -> None:
    assert _upward(module, _sources()[module].read_text(encoding="utf-8")) == []


def test_an_upward_import_is_found() -> None:
    assert _upward("qfx.format", "from qfx.cli import main") == ["qfx.cli.main"]
    assert _upward("qfx.passes.fold", "def f():\n    import qfx.backends.onnx") == ["qfx.backends.onnx"]
    assert _upward("qfx.recipe", "from qfx import unlisted") == ["qfx.unlisted"]
    assert _upward("qfx.cli", "import qfx.format, torch") == []


@pytest.mark.parametrize("folder", ["qfx", "passes", "backends", "tests", "examples"])
def test_no_file_imports_the_top_level_copies(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        roots = {name.split(".")[0] for name in _imported(ast.parse(path.read_text(encoding="utf-8")))}
        assert roots.isdisjoint({"passes", "backends"}), path


def test_each_package_is_loaded_once() -> None:
    import qfx.backends
    import qfx.passes

    assert {"passes", "backends"}.isdisjoint(sys.modules)
    for package, folder in ((qfx.passes, "passes"), (qfx.backends, "backends")):
        assert Path(str(package.__file__)).resolve().parent == ROOT / folder


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {name for name, path in _sources().items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == packages
    for package in {name for name in packages if name.startswith(("qfx.passes", "qfx.backends"))}:
        assert settings["package-dir"][package] == package.removeprefix("qfx.").replace(".", "/")


def test_links_lead_to_the_folders() -> None:
    for folder in ("passes", "backends"):
        assert (ROOT / "qfx" / folder).resolve() == ROOT / folder
