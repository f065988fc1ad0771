"""The commands and their options. Each hands over to a file of its own, so that `qfx --help` imports nothing heavy."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from qfx.cli import machine, writing
from qfx.cli.arguments import (
    Baseline,
    BatchSize,
    BudgetHtml,
    Debug,
    Device,
    Field,
    GgufRounding,
    Html,
    Json,
    Layout,
    Model,
    Plot,
    Quantized,
    Resume,
    Runtime,
    Samples,
    Seed,
    SeqLen,
    Stream,
    Strict,
    Text,
    TextSamples,
    Units,
)
from qfx.cli.terminal import guarded


class _Commands(typer.core.TyperGroup):
    """The commands; they refuse an empty argument, as a shell makes of a variable that is not set: as a path it would
    be the folder that one is in."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, argument in zip([self.name, *args], args, strict=False):
            if re.fullmatch(r"(--[\w-]+=)?", argument):
                raise typer.BadParameter(f"an argument is empty: {argument or repr(argument)} behind {before}")
        return super().parse_args(ctx, args)


app = typer.Typer(name="qfx", cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qfx {version('qfx')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize PyTorch models, and see node by node what really runs."""


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the quantized model.")],
    recipe: Annotated[str, typer.Option(help="Preset, presets joined by +, or a .yaml or .json file.")] = "w8a8",
    kv: Annotated[
        str | None, typer.Option(help="The cache of keys and values too: i8, i4, i2, fp8, or two: i4,i2.")
    ] = None,
    data: Text = None,
    field: Field = "text",
    samples: Samples = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = None,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = None,
    stream: Stream = None,
    html: BudgetHtml = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="Budget: average bits of the weights, each head and layer as it needs.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Budget: bytes of all weights.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Budget: share of the bytes in 16 bits.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Budget: rise of perplexity in percent.")] = None,
    max_memory: Annotated[int | None, typer.Option(help="Budget: bytes of a device, for weights and caches.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --max-memory: sequences at once; left out: 1.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="With --max-memory: tokens; left out: 2048.")] = None,
    debug: Debug = False,
) -> None:
    """Quantize MODEL by a recipe and save it."""
    with guarded(debug) as console:
        from qfx.cli import quantize as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        budget = {
            "avg_bits": avg_bits, "max_bytes": max_bytes, "ratio": ratio, "max_loss": max_loss,
            "max_memory": max_memory, "batch": batch, "context": context,
        }  # fmt: skip
        command.run(
            console, model, out, recipe, text, strict=strict, device=device, resume=resume, stream=stream,
            budget=budget, html_file=html, kv=kv,
        )  # fmt: skip


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub name, or what qfx quantize wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .onnx file, or a language model's folder.")],
    recipe: Annotated[str | None, typer.Option(help="As for quantize; left out: w8a8, or what MODEL has.")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Its own operators where they are faster, or those of ai.onnx only.")
    ] = Runtime.onnxruntime,
    prefill: Annotated[
        str | None, typer.Option(help="i8/tok: weight-only linears read prompts by 8-bit integers; larger, faster.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="i8 or i4: the cache of a language model in 8 or 4 bits; needs --data.")
    ] = None,
    data: Text = None,
    field: Field = "text",
    samples: Samples = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = None,
    strict: Strict = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write MODEL as quantized ONNX."""
    with guarded(debug) as console:
        from qfx.cli import export as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        how = {"runtime": runtime.value, "prefill": prefill, "kv": kv}
        command.run(console, model, out, recipe, text, how, strict=strict)


@app.command()
def convert(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What qfx quantize wrote, or a checkpoint of one of the layouts.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.")],
    to: Annotated[Layout, typer.Option(help="Whose checkpoint is written; qfx: what `qfx quantize` writes.")],
    strict: Annotated[bool, typer.Option("--strict", help="Fail where the layout cannot hold something.")] = False,
    debug: Debug = False,
) -> None:
    """Write a quantized model as a checkpoint of another library, codes as they are."""
    with guarded(debug) as console:
        from qfx.cli import convert as command

        command.run(console, folder, out, to.value, strict=strict)


@app.command("export-gguf")
def export_gguf(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub name, or what qfx quantize wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .gguf file.")],
    mix: Annotated[
        str, typer.Option("--type", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, Q3_K_M, Q2_K, F16, ...")
    ] = "Q4_K_M",
    rounding: Annotated[
        GgufRounding,
        typer.Option(help="mse: least error of each weight; with --data gptq, learned: of what layers give."),
    ] = GgufRounding.mse,
    tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer; without it tokens are numbers.")] = True,
    data: Text = None,
    field: Field = "text",
    samples: TextSamples = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a tensor cannot have what was asked.")] = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write MODEL as GGUF for llama.cpp; with --data errors are weighted by what the layers see."""
    with guarded(debug) as console:
        from qfx.cli import gguf as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        command.run(console, model, out, mix, text, rounding=rounding.value, tokenizer=tokenizer, strict=strict)


@app.command()
def inspect(
    quantized: Quantized,
    run: Annotated[bool, typer.Option(help="Compile and call it once, to see the kernels that run.")] = True,
    only_float: Annotated[
        bool, typer.Option("--only-float", help="List only the nodes that are not quantized.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="A row for each node, layers alike too.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Show node by node what was asked, what runs, and why they differ."""
    with guarded(debug) as console:
        from qfx.cli import inspect as command

        command.run(console, quantized, call=run, only_float=only_float, each=each, json_file=json)


@app.command()
def compare(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED|MODEL", help="Folder that `qfx quantize` wrote, or MODEL.")
    ],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Its float original; left out with --recipes.")
    ] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Instead: recipes, comma between them; MODEL is quantized by each and measured.")
    ] = None,
    data: Text = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare on.")] = 32,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Other samples of the text, for recipes that need data; left out: 64.")
    ] = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each model.")] = 20,
    baseline: Annotated[Baseline, typer.Option(help="How the float model runs.")] = Baseline.eager,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a process of its own for each model.")] = True,
    avg_bits: Annotated[float | None, typer.Option(help="Budget of the recipes that plan bits; left out: 4.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Compare QUANTIZED with its float original, or recipes on one MODEL: accuracy, size, latency, memory.

    Without --data the text is the help that comes with Python.
    """
    with guarded(debug) as console:
        from qfx.cli import compare as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        settings = command.Settings(repeats=repeats, baseline=baseline.value, memory=memory, device=device)
        if recipes is None:
            if model is None:
                raise ValueError(
                    "expected QUANTIZED and MODEL, found one of them\n  next step: or MODEL --recipes w8a8,w4a16"
                )
            command.run(console, Path(quantized), model, text, settings, json_file=json)
            return
        if model is not None:
            raise ValueError("--recipes takes one MODEL, found two\n  next step: leave QUANTIZED out")
        from qfx.cli import matrix

        budget = {"avg_bits": 4.0 if avg_bits is None else avg_bits}
        matrix.run(
            console, quantized, recipes, text, settings, budget, calibration=calibration, json_file=json, plot_file=plot
        )


@app.command()
def advise(
    model: Model,
    device: Annotated[
        str | None, typer.Option(help="a100, h100, h200, rtx4090, or the .json of `qfx profile`; left out: this CPU.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Percent by which perplexity may rise (else noise over signal of the output).")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="At least so many times smaller than in 16 bits.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    context: Annotated[
        int | None, typer.Option(min=0, help="Cached tokens while one more is decoded; left out: the prompt.")
    ] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Recipes to try, comma between them; left out: the usual.")
    ] = None,
    data: Text = None,
    field: Field = "text",
    samples: TextSamples = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 128,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Propose recipes for MODEL: size, predicted speed, and the loss that is measured on --data."""
    with guarded(debug) as console:
        from qfx.cli import advise as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        command.run(
            console, model, device, text, recipes, max_loss=max_loss, ratio=ratio, batch=batch, prompt=prompt,
            context=context, json_file=json,
        )  # fmt: skip


@app.command()
def analyze(
    model: Model,
    data: Text = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, classification, qa or embedding; left out: the model's own output.")
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the label in each line of a .jsonl file.")] = "label",
    method: Annotated[str, typer.Option(help="How to score, or all.")] = "quant-fisher",
    units: Annotated[Units, typer.Option(help="Heads, or whole weights.")] = Units.heads,
    formats: Annotated[list[str] | None, typer.Option("--format", help="A candidate; may stand several times.")] = None,
    recipe: Annotated[str | None, typer.Option(help="What is left in float, and formats of activations.")] = None,
    measure: Annotated[int, typer.Option(min=0, help="Units of each kind that are measured.")] = 4,
    task_weight: Annotated[float, typer.Option(min=0, max=1, help="Share of the task beside the general scores.")] = 1,
    field: Field = "text",
    samples: TextSamples = None,
    batch_size: BatchSize = 4,
    seq_len: SeqLen = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where heads cannot be told apart.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rows: Annotated[int, typer.Option(min=1, help="Units that are shown.")] = 20,
    json: Json = None,
    html: Html = None,
    debug: Debug = False,
) -> None:
    """Say how much MODEL loses in few bits: each head, layer and cache, by scores and by measurements.

    Without --data the text is the help that comes with Python.
    """
    with guarded(debug) as console:
        from qfx.cli import analyze as command
        from qfx.cli.models import TextOptions

        text = TextOptions(data, field, samples, batch_size, seq_len, seed)
        asked = command.Asked(task, label, method, units.value, formats, recipe, measure, task_weight)
        command.run(
            console, model, text, asked, device=device, rows=rows, json_file=json, html_file=html, strict=strict
        )


@app.command()
def kv(
    model: Model,
    formats: Annotated[
        str, typer.Option(help="i8, i4, i3, i2, fp8, a preset, a format or KEYS:VALUES, comma between them.")
    ] = "i8,i4,kv-k4v2,i2",
    memory: Annotated[str, typer.Option(help="Of the device: 8GiB, 16GB or bytes.")] = "8GiB",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens at which caches are compared; left out: what MODEL takes, at most 8192."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="f32, f16 or bf16: what the model runs in; left out: what its config says.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Formats of the weights; left out: float.")] = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Say what caches of MODEL take: bytes per token, and the longest context that a memory has room for.

    Weights and activations are counted. Of MODEL only the configuration is read.
    """
    with guarded(debug) as console:
        from qfx.cli import kv as command

        command.run(
            console, model, formats, memory, batch=batch, context=context, dtype=dtype, recipe=recipe, json_file=json
        )


app.command()(writing.generate)
app.command()(machine.profile)
app.command()(machine.tune)


@app.command()
def presets(debug: Debug = False) -> None:
    """List the recipes that have a name."""
    with guarded(debug) as console:
        from qfx.cli import presets as command

        command.run(console)
