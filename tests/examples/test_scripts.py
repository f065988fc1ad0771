"""Every example runs as a file, wherever it is called from."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "examples").rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]


def finds_examples(tree: ast.Module, depth: int) -> bool:
    """Whether what it imports of `examples` is imported after the folder of the package was put on the path."""
    wanted = f"sys.path[0] = str(Path(__file__).resolve().parents[{depth}])"
    known = False
    for node in tree.body:
        known |= isinstance(node, ast.If) and wanted in map(ast.unparse, node.body)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "examples" and not known:
            return False
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_finds_the_modules_beside_it(script: str) -> None:
    assert finds_examples(ast.parse((ROOT / script).read_text(encoding="utf-8")), script.count("/"))


def test_the_check_sees_a_path_that_is_not_set_or_too_late() -> None:
    path = 'if __name__ == "__main__":\n    sys.path[0] = str(Path(__file__).resolve().parents[2])\n'
    use = "from examples.benchmarks.memory import resident\n"
    assert len(SCRIPTS) > 20
    assert finds_examples(ast.parse(path + use), 2)
    assert not finds_examples(ast.parse(use + path), 2)
    assert not finds_examples(ast.parse(path + use), 1)
