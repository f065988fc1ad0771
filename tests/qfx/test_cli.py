"""The command line, from the arguments to the files it writes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import Result

import qfx.onnx
from qfx.cli.terminal import guarded, megabytes
from qfx.errors import QfxWarning, UnsupportedError
from tests.processes import python
from tests.qfx.commands import run, save
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("encoder"), BertModel, BertConfig)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("language_model"), LlamaForCausalLM, LlamaConfig)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        "\n".join(f"w{i * 7 % 59 + 1} w{i * i % 59 + 1} w{i % 5 + 1}" for i in range(300)), encoding="utf-8"
    )
    return file


def test_presets_lists_every_preset() -> None:
    from qfx.presets import descriptions

    result = run("presets")
    assert result.exit_code == 0
    assert [name for name in descriptions() if name not in result.stdout] == []


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"qfx {version('qfx')}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quantize", "", "-o", "out"), "'' behind quantize"),
        (("quantize", "model", "-o", ""), "'' behind -o"),
        (("quantize", "model", "--out="), "--out= behind model"),
        (("inspect", "model", "--json", ""), "'' behind --json"),
        (("",), "'' behind qfx"),
    ],
)
def test_an_empty_argument_is_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Path
) -> None:
    """As of a variable of the shell that is not set. In the folder of a model it would be that model."""
    shutil.copytree(encoder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"an argument is empty: {words}" in " ".join(result.stderr.replace("\u2502", " ").split())
    assert not (tmp_path / "here" / "out").exists() and not (tmp_path / "here" / "qfx.json").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['qfx', '--help']\nfrom qfx.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "sys.exit('heavy' if {'transformers', 'onnxruntime', 'onnx'} & set(sys.modules) else 0)"
    )
    said = python(code)
    for command in ("quantize", "inspect", "compare", "analyze", "presets"):
        assert command in said


@pytest.mark.slow
def test_weights_stay_on_disk_where_asked_or_where_memory_is_short(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantized(out: str, *options: str) -> tuple[Result, bytes]:
        result = run("quantize", language_model, "-o", tmp_path / out, *options)
        assert result.exit_code == 0, result.output
        return result, (tmp_path / out / "model.safetensors").read_bytes()

    plain, wanted = quantized("plain")
    asked, found = quantized("asked", "--stream")
    assert found == wanted and "stay on disk" not in plain.stdout and "done open" in asked.stdout
    monkeypatch.setattr("qfx.storage.streamed.free_memory", lambda: 10_000)
    short, found = quantized("short")
    assert found == wanted and "the weights stay on disk: in float32 they would take 0." in short.stdout
    assert "done load" in quantized("loaded", "--no-stream")[0].stdout
    monkeypatch.setattr("qfx.storage.streamed.free_memory", lambda: None)
    assert "done load" in quantized("unknown")[0].stdout
    refused = run("quantize", language_model, "-o", tmp_path / "meta", "--stream", "--device", "meta")
    assert refused.exit_code == 2 and "--stream runs on the CPU, found --device meta" in refused.stderr


@pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")  # the groups are wider than this small model
def test_gptq_goes_on_where_it_stopped(language_model: Path, text: Path, tmp_path: Path) -> None:
    made = []
    how = ("--recipe", "w4a16-gptq", "--data", text, "--samples", 8, "--resume", tmp_path / "work")
    for out in ("one", "two"):
        result = run("quantize", language_model, "-o", tmp_path / out, *how, "--seq-len", 32)
        assert result.exit_code == 0, result.output
        made.append({path.name: path.read_bytes() for path in (tmp_path / out).glob("*.safetensors")})
        files = sorted((tmp_path / "work").glob("block-*"))
        assert len(files) == 3, "the table, the layer, the head"
        files[1].unlink()
    assert made[0] == made[1]
    result = run("quantize", language_model, "-o", tmp_path / "three", *how, "--seq-len", 16)
    assert result.exit_code == 2 and "holds the progress of other work" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "-o", "OUT", "--recipe", "w8a9"], "unknown preset 'w8a9', did you mean 'w8a8'?"),
        (
            ["quantize", "MODEL", "-o", "OUT", "--recipe", "w8a8-smooth"],
            "needs calibration data\n  next step: --data FILE (of a language model, qfx generate writes one)",
        ),
        (
            ["quantize", "MODEL", "-o", "OUT", "--avg-bits", "4"],
            "recipe 'w8a8' under a budget needs calibration data\n  next step: --data FILE (of a language model, qfx ",
        ),
        (
            ["quantize", "MODEL", "-o", "OUT", "--html", "page.html"],
            "recipe 'w8a8' has none\n  next step: --recipe heads",
        ),
        (["quantize", "MODEL", "-o", "OUT", "--recipe", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["quantize", "MODEL", "-o", "OUT", "--data", "gone.txt"], "No such file or directory: 'gone.txt'"),
        (["quantize", "MODEL", "-o", "MODEL"], "cannot be written to: it is the model itself"),
        (["quantize", "MODEL", "-o", "OUT", "--device", "abacus"], "there is no device 'abacus' here"),
        (["quantize", "./gone", "-o", "OUT"], "there is no folder ./gone"),
        (["export", "gone", "-o", "m.onx"], "unknown ending '.onx'"),
        (["quantize", "MODEL", "-o", "MODEL/config.json/out"], "Not a directory: "),
        (["export", "gone", "-o", "MODEL/config.json/out"], "Not a directory: "),
        (["inspect", "gone"], "there is no folder gone"),
        (["compare", "gone", "MODEL"], "there is no folder gone"),
        (["compare", "MODEL", "MODEL"], "MODEL"),
    ],
)
def test_mistakes_are_short_messages(arguments: list[str], message: str, encoder: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(encoder), "OUT": str(tmp_path / "out")}
    result = run(*(places.get(argument, argument).replace("MODEL/", f"{encoder}/") for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message.replace("MODEL", str(encoder)) in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(encoder: Path, tmp_path: Path) -> None:
    result = run("quantize", encoder, "-o", tmp_path / "out", "--recipe", "w8a9", "--debug")
    assert isinstance(result.exception, ValueError)
    assert "w8a9" in str(result.exception)


def test_a_sequence_longer_than_the_model_takes_is_refused(encoder: Path, text: Path, tmp_path: Path) -> None:
    result = run(
        "quantize", encoder, "-o", tmp_path / "out", "--recipe", "w8a8-static", "--data", text, "--seq-len", 65
    )
    assert (result.exit_code, "the model takes 64 tokens, found --seq-len 65" in result.stderr) == (2, True)


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((ValueError("bad [input]"), 2), (UnsupportedError("odd graph"), 2), (KeyError("lost"), 1)):
        error.add_note("in pass 'x'")
        with pytest.raises(typer.Exit) as exit_, guarded(debug=False):
            raise error
        assert exit_.value.exit_code == code
    said = capsys.readouterr().err
    assert "error: bad [input]\n  in pass 'x'\n" in said
    assert "error: KeyError: 'lost'\n  in pass 'x'\n  this is a fault of qfx; --debug" in said
    with pytest.raises(KeyError), guarded(debug=True):
        raise KeyError("lost")


def test_warnings_of_qfx_are_shown_once_and_nothing_stays_changed(capsys: pytest.CaptureFixture[str]) -> None:
    before = (warnings.showwarning, list(warnings.filters))
    with guarded(debug=False):
        for _ in range(2):
            warnings.warn("%linear stays float [x]", QfxWarning, stacklevel=1)
    assert (warnings.showwarning, list(warnings.filters)) == before
    assert capsys.readouterr().err == "warning: %linear stays float [x]\n"


def test_megabytes() -> None:
    assert megabytes(1_234_567_890) == "1,234.6 MB"
    assert megabytes(None) == ""


def test_quantize_inspect_compare_an_encoder(encoder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--recipe", "w8a8-static", "--data", text, "--samples", 8, "--seq-len", 32)
    done = run("quantize", encoder, "-o", out, *options)
    assert done.exit_code == 0, done.output
    assert re.search(r"\d+ of \d+ linear nodes quantized", done.stdout)
    assert (out / "tokenizer.json").exists()

    seen = run("inspect", out, "--json", tmp_path / "report.json")
    assert seen.exit_code == 0, seen.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["totals"]["linear_quantized"] == report["totals"]["linear"] > 0
    assert {row["kernel"] for row in report["rows"]} - {""}, "the kernels that run are told"
    each = run("inspect", out, "--no-run", "--each")
    assert each.exit_code == 0 and "encoder.layer.0" in each.stdout

    numbers = tmp_path / "numbers.json"
    compared = run(
        "compare", out, encoder, "--data", text, "--samples", 4, "--seq-len", 16, "--repeats", 2, "--json", numbers
    )
    assert compared.exit_code == 0, compared.output
    found = json.loads(numbers.read_text())
    assert found["accuracy"]["output"] == "last_hidden_state"
    assert found["accuracy"]["cosine"] > 0.99
    assert 15 < found["accuracy"]["sqnr_db"] < 60
    assert found["accuracy"]["perplexity"] is None
    assert found["disk"][1] < found["disk"][0]
    assert all(peak > 50e6 for peak in found["memory"])
    assert found["shape"] == [4, 16]
    for name in ("SQNR of last_hidden_state", "first call", "median call", "weights on disk", "peak memory"):
        assert name in compared.stdout


def test_quantize_and_compare_a_language_model_without_data(language_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", language_model, "-o", out).exit_code == 0
    compared = run(
        "compare", out, language_model, "--data", text, "--samples", 4, "--seq-len", 16, "--repeats", 1, "--no-memory",
        "--json", tmp_path / "numbers.json",
    )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    found = json.loads((tmp_path / "numbers.json").read_text())["accuracy"]
    assert found["output"] == "logits"
    assert 0 < found["kld"] < 0.01
    assert found["perplexity"] == pytest.approx(found["perplexity_reference"], rel=0.05)
    assert 0.8 < found["top1"] <= 1
    assert f"{found['change']:+.2%} ± {found['change_error']:.2%}" in compared.stdout
    assert f"{found['kld']:.5f} ± {found['kld_error']:.5f} nats" in compared.stdout
    assert "peak memory" not in compared.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")  # groups that are wider than this small model
def test_quantize_by_heads_under_a_budget(language_model: Path, text: Path, tmp_path: Path) -> None:
    how = ("quantize", language_model, "--recipe", "heads", "--data", text, "--samples", 4, "--seq-len", 16)
    refused = run(*how, "-o", tmp_path / "none")
    assert refused.exit_code == 2
    assert "recipe 'heads' needs a budget" in refused.output
    sizes = []
    for bits in (4, 7):
        out, page = tmp_path / f"out{bits}", tmp_path / f"{bits}.html"
        done = run(*how, "-o", out, "--avg-bits", bits, "--html", page)
        assert done.exit_code == 0, done.output
        sizes.append(sum(file.stat().st_size for file in out.glob("*.safetensors")))
        assert page.read_text(encoding="utf-8").count("data:image/png") >= 3
    assert sizes[0] < sizes[1], "the budget decides"
    refused = run(*how, "-o", tmp_path / "few", "--avg-bits", 1)
    assert refused.exit_code == 2 and "at least avg_bits=2" in refused.stderr


def test_data_that_a_recipe_does_not_need_is_told(encoder: Path, text: Path, tmp_path: Path) -> None:
    done = run("quantize", encoder, "-o", tmp_path / "out", "--data", text)
    assert done.exit_code == 0, done.output
    assert "recipe 'w8a8' needs no data" in done.stdout


def test_a_text_that_is_shorter_than_was_asked_for_is_told(encoder: Path, text: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("a few words", encoding="utf-8")
    how = ("--recipe", "w8a8-static", "--samples", 2, "--data")
    for command, out in (("quantize", "out"), ("export", "m.onnx")):
        done = run(command, encoder, "-o", tmp_path / out, *how, few)
        assert done.exit_code == 0, done.output
        assert re.search(r"few.txt gives 1 of 2 samples of \d+ tokens", done.stdout)
    assert " of 2 samples" not in run("quantize", encoder, "-o", tmp_path / "out", *how, text, "--seq-len", 8).stdout


def test_export_an_encoder(encoder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    result = run("export", encoder, "-o", file, "--recipe", "w8a8-smooth", "--data", text, "--runtime", "standard")
    assert result.exit_code == 0, result.output
    assert "inputs:  input_ids, attention_mask, token_type_ids" in result.output
    assert re.search(r"opset \d+, \d+ quantized nodes", result.output)
    assert set(qfx.onnx.load(file).outputs) == {"last_hidden_state", "pooler_output"}


def test_export_what_quantize_wrote(encoder: Path, tmp_path: Path) -> None:
    assert run("quantize", encoder, "-o", tmp_path / "q").exit_code == 0
    assert run("export", tmp_path / "q", "-o", tmp_path / "m.onnx").exit_code == 0
    assert json.loads(qfx.onnx.check(tmp_path / "m.onnx")["qfx.formats"])
    again = run("export", tmp_path / "q", "-o", tmp_path / "n.onnx", "--recipe", "w4a16")
    assert again.exit_code != 0
    assert "is quantized already" in again.output


def test_export_a_language_model_as_a_folder(language_model: Path, tmp_path: Path) -> None:
    result = run("export", language_model, "-o", tmp_path / "lm")
    assert result.exit_code == 0, result.output
    assert "onnxruntime_genai" in result.output
    assert {"model.onnx", "genai_config.json", "config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "lm").iterdir()
    }
    loaded: Any = qfx.onnx.load(tmp_path / "lm")
    assert loaded.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_export_with_prompts_by_integers(language_model: Path, tmp_path: Path) -> None:
    sizes = []
    for options in ([], ["--prefill", "i8/tok"]):
        out = tmp_path / f"lm{len(options)}"
        result = run("export", language_model, "-o", out, "--recipe", "w4a16", *options)
        assert result.exit_code == 0, result.output
        sizes.append(sum(file.stat().st_size for file in out.glob("model.onnx*")))
    assert sizes[1] > 1.2 * sizes[0]
    refused = run("export", language_model, "-o", tmp_path / "no", "--prefill", "i3")
    assert refused.exit_code != 0
    assert "expected: 'i8/tok'" in refused.output


def test_export_a_language_model_with_a_quantized_cache(language_model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("export", language_model, "-o", tmp_path / "lm", "--kv")
    refused = run(*asked, "i8")
    assert refused.exit_code != 0
    assert "--kv i8 needs calibration data" in refused.output
    assert "no cache of keys in a file can have the format 'i8/tok'" in run(*asked, "i8/tok", "--data", text).output
    assert not (tmp_path / "lm").exists()
    result = run(*asked, "i8", "--data", text, "--samples", 4, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    loaded: Any = qfx.onnx.load(tmp_path / "lm")
    assert loaded(torch.tensor([[3, 4, 5]])).past_key_values.keys[0].dtype == torch.int8


def test_quantize_with_a_quantized_cache(language_model: Path, tmp_path: Path) -> None:
    refused = run("quantize", language_model, "-o", tmp_path / "no", "--kv", "i8/ch")
    assert refused.exit_code != 0 and "a cache cannot store keys as 'i8/ch'" in refused.output
    refused = run("quantize", language_model, "-o", tmp_path / "no", "--kv", "i8,i4,i2")
    assert refused.exit_code != 0 and "takes one format, or those of keys" in refused.output
    result = run("quantize", language_model, "-o", tmp_path / "q", "--recipe", "kv8", "--kv", "i4,i2")
    assert result.exit_code == 0, result.output
    assert "of f16" in result.output and "bytes a token" in result.output
    assert "kv8+kv=i4,i2" in (tmp_path / "q" / "config.json").read_text()
    assert "kv-k4v2" in run("presets").output


def test_export_needs_data_for_a_static_recipe(encoder: Path, tmp_path: Path) -> None:
    result = run("export", encoder, "-o", tmp_path / "m.onnx", "--recipe", "w8a8-static")
    assert result.exit_code != 0
    assert "needs calibration data" in result.output
    assert not (tmp_path / "m.onnx").exists()


def test_export_an_encoder_decoder_as_a_folder(tmp_path: Path) -> None:
    model: Any = ZOO["bart"]()[0]
    model.save_pretrained(tmp_path / "bart")
    result = run("export", tmp_path / "bart", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "qfx.onnx.load(folder)" in result.output
    assert "onnxruntime_genai" not in result.output
    written = {"encoder.onnx", "model.onnx", "encoder_decoder.json", "config.json", "generation_config.json"}
    assert written == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "MODEL", "--recipes", "w8a8", "--json"],
        ["compare", "MODEL", "--recipes", "w8a8", "--plot"],
        ["advise", "MODEL", "--json"],
        ["analyze", "MODEL", "--html"],
        ["inspect", "MODEL", "--json"],
        ["kv", "MODEL", "--json"],
        ["quantize", "MODEL", "-o", "OUT", "--recipe", "heads", "--html"],
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "out.json", "found a file")):
        result = run(*arguments, path)
        text = " ".join(result.stderr.replace("│", " ").split())
        assert result.exit_code == 2 and f"Invalid value for '{arguments[-1]}'" in text and message in text, text
