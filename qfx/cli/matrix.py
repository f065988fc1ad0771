"""`qfx compare MODEL --recipes ...`: recipes beside each other on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qfx.cli.compare import Settings
from qfx.cli.models import TextOptions, batches, check_device
from qfx.cli.terminal import megabytes, step
from qfx.data import python_help, read_texts
from qfx.errors import explain
from qfx.hf import hub
from qfx.measuring.matrix import Matrix, Row, compare_recipes, error_of, pareto
from qfx.reporting.render import wide

_WIDTH = 130  # columns that the table takes at least: a cut number is worse than a long line
CALIBRATION = 64  # samples, where the user names no number


def run(
    console: Console, model: str, recipes: str, text: TextOptions, settings: Settings, budget: dict[str, Any], *,
    calibration: int | None, json_file: Path | None, plot_file: Path | None,
) -> None:  # fmt: skip
    """Load the model, cut the text into calibration and evaluation, measure, show."""
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    place = check_device(settings.device)
    if plot_file is not None:
        check_plot(plot_file)
    texts = python_help() if text.file is None else read_texts(text.file, text.field)
    with step(console, f"load {model}"):
        loaded = hub.load(model, device=place)
    evaluation, data = split(loaded, texts, text, calibration or CALIBRATION)
    with step(console, f"compare {len(names)} recipes") as told:
        found = compare_recipes(
            loaded.model, names, evaluation, data=data, budget=budget, repeats=settings.repeats,
            baseline=settings.baseline, folder=loaded.folder if settings.memory else None, told=told,
        )  # fmt: skip
    wide(console, table(found), _WIDTH)
    for row in found.rows:
        if row.failed:
            console.print(Text.assemble((f"{row.recipe}: ", "red"), f"no numbers: {row.failed}"), soft_wrap=True)
    if front := pareto(found):
        console.print(f"no other recipe is both smaller and nearer: {', '.join(front)}", soft_wrap=True)
    if json_file is not None:
        found.save(json_file)
    if plot_file is not None:
        plot(found, plot_file)


def split(
    loaded: hub.Loaded, texts: list[str], text: TextOptions, calibration: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(evaluation, calibration): different pieces of the text. Raises ValueError where it is too short for both."""
    wanted = text.samples or 32
    made = batches(loaded, texts, text, wanted + calibration)
    count = -(-wanted // text.batch_size)
    if len(made) <= count:
        count = len(made) // 2
    if not count:
        raise ValueError(
            f"the text gives {len(made)} batch, which cannot be cut into calibration and evaluation\n"
            "  next step: a longer text, or a smaller --seq-len or --batch-size"
        )
    return made[:count], made[count:]


def table(found: Matrix) -> Table:
    """The numbers for people."""
    shape = " x ".join(map(str, found.shape))
    title = f"measured on {found.batches} batches of {shape}; float runs {found.baseline}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("recipe", no_wrap=True)
    heads = ["size", "of 16 bits", "bits", "first call", "call", "speed", "peak", *_error_heads(found)]
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for row in found.rows:
        if not row.failed:
            shown.add_row(row.recipe, *_cells(row, found))
    return shown


def _error_heads(found: Matrix) -> list[str]:
    heads = ["KLD", "perplexity"] if _has_kld(found) else ["SQNR", "cosine"]
    return [*heads, *([found.metric] if found.metric else []), "made in"]


def _has_kld(found: Matrix) -> bool:
    return any(row.accuracy is not None and row.accuracy.kld is not None for row in found.rows)


def _cells(row: Row, found: Matrix) -> list[str]:
    near = row.accuracy
    assert row.latency is not None and row.speed is not None and near is not None, row
    cells = [megabytes(row.nbytes), f"{row.compression:.2f}x", f"{row.bits:.2f}"]
    cells += [f"{row.latency.cold:.2f} s", f"{row.latency.warm * 1e3:.2f} ms", f"{row.speed:.2f}x"]
    cells.append(megabytes(row.memory))
    if near.kld is not None:
        perplexity = near.perplexity
        cells += [f"{near.kld:.5f}", "" if perplexity is None else f"{perplexity:.3f}"]
    else:
        cells += [f"{near.sqnr_db:.1f} dB", f"{near.cosine:.5f}"]
    if found.metric:
        cells.append("" if row.metric is None else f"{row.metric:.4f}")
    return [*cells, "" if row.seconds is None else f"{row.seconds:.1f} s"]


def check_plot(path: Path) -> None:
    """Raises ValueError where matplotlib is not installed, or writes no files of this name's ending."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("a plot needs matplotlib\n  next step: pip install matplotlib") from error
    known = FigureCanvasBase.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending and ending not in known:
        step = f"a name that ends in .png or .svg; known are {', '.join(sorted(known))}"
        raise ValueError(explain("no picture is written in this format", found=str(path), next_step=step))


def plot(found: Matrix, path: Path) -> None:
    """Two pictures side by side: error over size with the Pareto front, and the time of a call."""
    from matplotlib.figure import Figure

    good = [row for row in found.rows if not row.failed]
    rows = good[1:]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = {row.recipe: (row.nbytes or 0) / 1e6 for row in rows}
    errors = {row.recipe: max(error_of(row), 1e-9) for row in rows}
    left.scatter(list(sizes.values()), list(errors.values()))
    for name, size in sizes.items():
        left.annotate(name, (size, errors[name]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    front = pareto(found)
    left.plot([sizes[name] for name in front], [errors[name] for name in front], linestyle="--", linewidth=1)
    what = "KL divergence to float, nats a token" if _has_kld(found) else "noise over signal of the main output"
    left.margins(0.15)
    left.set(xlabel="MB of weights", ylabel=what, yscale="log")
    times = [row.latency.warm * 1e3 for row in good if row.latency is not None]
    right.barh([row.recipe for row in good], times)
    right.invert_yaxis()
    right.set(xlabel="ms a call (median)")
    figure.suptitle(f"measured on {found.batches} batches of {' x '.join(map(str, found.shape))}")
    figure.savefig(path, dpi=150)
