"""Run by .ci/run with the installed wheel, away from the sources: `python smoke.py CHECKOUT WHEEL`."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def main() -> None:
    """Exits with an AssertionError where the wheel is not what the sources are."""
    checkout, wheel = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    shipped = {name for name in names if name.endswith(".py")}
    assert len(names) == len(set(names)), "the wheel holds a file twice"
    sources = {str(path.relative_to(checkout)) for path in (checkout / "qfx").glob("**/*.py")}
    for folder in ("passes", "backends"):
        sources |= {f"qfx/{path.relative_to(checkout)}" for path in (checkout / folder).glob("**/*.py")}
    assert shipped == sources, f"only in the sources or only in the wheel: {sorted(shipped ^ sources)}"

    sys.path.pop(0)  # the folder of this script, which lies in the checkout
    import torch

    import qfx

    assert checkout not in Path(qfx.__file__).resolve().parents, f"imported from the sources: {qfx.__file__}"
    assert {"passes", "backends"}.isdisjoint(sys.modules)
    assert "qfx" in torch.compiler.list_backends()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    with torch.inference_mode():
        expected, found = model(x), torch.compile(model, backend="qfx")(x)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05, f"relative error {error}"
    sys.stdout.write(f"wheel: {len(names)} files, torch.compile(backend='qfx') relative error {error:.4f}\n")


if __name__ == "__main__":
    main()
