"""Tuning: what is fastest and right is written, found again, and launched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qfx.backends.triton import device, experts, gemm8_config, launch, lowering, timing, tune, tune_works, tuning
from qfx.backends.triton.gemm8 import pack_gemm8
from qfx.backends.triton.quantize_rows import aligned
from qfx.cli import tune as command
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.live.modules import QuantLinear
from qfx.packing import pack_weight
from tests import tiny
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.linears import linear_w8a8
from tests.qfx.commands import run

HERE = device.find(torch.device(DEVICE))


def work(n: int = 24, k: int = 40) -> tune_works.Work:
    made = tune_works.random_work(n, k, "i8/tok", "i8/ch", torch.device(DEVICE))
    return replace(made, only=("gemm8", "pretended"))  # and not the quantization of the rows


def timer(*times: float) -> Callable[[Sequence[timing.Call]], float]:
    """Runs each call once and says these times one after the other, then the last again."""
    left = list(times)

    def measure(calls: Sequence[timing.Call]) -> float:
        for call in calls:
            call()
        return left.pop(0) if len(left) > 1 else left[0]

    return measure


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFX_TUNED_DIR", str(tmp_path))
    return tmp_path


def launched(layer: QuantLinear, rows: int, on: device.Device = HERE) -> launch.Launch:
    """The product that the op would start now."""
    packed = pack_gemm8(layer.w_codes, layer.w_scale, layer.w_zero, layer.w_format, layer.in_features)
    x = torch.randn(rows, layer.in_features, dtype=torch.float16, device=DEVICE)
    with launch.recorded(on) as found:
        linear_w8a8(x, packed, None, None, None, None, None, layer.x_format, layer.w_format, "")
    return next(one for one in found if "BLOCK_N" in one.arguments and "GROUP" in one.arguments)


def test_the_fastest_is_written_found_and_launched(folder: Path) -> None:
    one, here = work(), launch.device_of(torch.empty(0, device=DEVICE))
    assert isinstance(one.module, QuantLinear)
    options = gemm8_config.candidates(here, gemm8_config.Problem(24, aligned(40)), 4)
    best = next(i for i, option in enumerate(options) if tile(option) != tile(options[0]))
    (found,) = tune.tune(one, 3, timer(10.0, *(9.0,) * best, 3.0, 8.0))
    kernel, problem, rows = found.choice
    assert (kernel, rows) == ("gemm8", "4") and found.tried == len(options) and not found.dropped
    assert found.best == options[best] and (found.before, found.seconds) == (10.0, 3.0)
    path = tuning.write(folder, here, tune.table_of([found]))
    assert json.loads(path.read_text()) == {"gemm8": {problem: {"4": options[best]}}}
    assert tuning.tuned(here, kernel, problem, 3, lambda _: options) == options[best]
    assert tile(launched(one.module, 3, here).arguments) == tile(options[best])
    assert tuning.tuned(here, kernel, problem, 5, lambda _: options) is None, "another bucket"


def tile(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


def test_a_kernel_whose_constants_changed_since_takes_its_heuristic(folder: Path) -> None:
    one, here = work(), launch.device_of(torch.empty(0, device=DEVICE))
    assert isinstance(one.module, QuantLinear)
    usual = launched(one.module, 3, here)
    (found,) = tune.tune(one, 3, timer(10.0))
    tuning.write(folder, here, {found.choice: {"TILE": 7, "num_warps": 2}})
    with pytest.warns(QfxWarning, match="gemm8(?s:.*)found: TILE num_warps"):
        now = launched(one.module, 3, here)
    assert tile(now.arguments) == tile(usual.arguments) and now.options == usual.options


def test_what_is_known_is_not_measured_again() -> None:
    one = work()
    (found,) = tune.tune(one, 3, timer(1.0))
    assert list(tune.tune(one, 3, timer(1.0), known={found.choice})) == []


def test_noise_writes_nothing() -> None:
    (found,) = tune.tune(work(), 3, timer(10.0, 9.9))
    assert found.best is None and found.seconds == 9.9 and tune.table_of([found]) == {}


def _pretend(monkeypatch: pytest.MonkeyPatch, results: Sequence[Any]) -> None:
    """A lowered layer whose one kernel has a configuration for each of these results."""

    def lower(gm: Any, **_: object) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            options = [{"RESULT": i} for i in range(len(results))]
            config = tuning.tuned(HERE, "pretended", "p", len(x), lambda _: options) or {"RESULT": 0}
            result = results[config["RESULT"]]
            if isinstance(result, Exception):
                raise result
            return [result * gm(x)[0]]

        return run

    monkeypatch.setattr(lowering, "lower", lower)


def test_what_fails_or_is_wrong_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = RuntimeError("out of resource: shared memory\nmore")
    _pretend(monkeypatch, [1.0, 1.1, float("nan"), failed, 1.0, float("inf")])
    (found,) = tune.tune(work(), 3, timer(10.0, 5.0, 4.0))
    assert found.best == {"RESULT": 4} and found.tried == 6
    assert [config["RESULT"] for config, _ in found.dropped] == [1, 2, 3, 5]
    assert float(found.dropped[0][1].split()[-1]) == pytest.approx(0.1, rel=0.02) and "nan" in found.dropped[1][1]
    assert found.dropped[2][1] == "RuntimeError: out of resource: shared memory"


def test_a_wrong_result_without_a_file_stops_and_so_does_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, [1.2, 1.0])
    with pytest.raises(ValueError, match=r"give a wrong result for 3 rows(.|\n)*found: (2.0|1.9)"):
        list(tune.tune(work(), 3, timer(1.0)))
    _pretend(monkeypatch, [1.0, RuntimeError("CUDA error: an illegal memory access was encountered")])
    monkeypatch.setattr(timing, "is_lost", lambda where: True)
    with pytest.raises(RuntimeError, match="illegal memory"):
        list(tune.tune(work(), 3, timer(1.0)))


def test_copies_of_the_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    one = work(16, 32)
    monkeypatch.setattr(timing, "cache_bytes", lambda where: one.read)
    seen: list[int] = []

    def measure(calls: Sequence[timing.Call]) -> float:
        seen.append(len(calls))
        assert torch.equal(*(call()[0] for call in calls))  # type: ignore[index]
        return 1.0

    list(tune.tune(one, 2, measure))
    assert set(seen) == {2}


def test_attention_over_a_cache_is_tuned() -> None:
    one = tune_works.cache_work("i4", (4, 2), 64, 40, torch.device(DEVICE))
    (found,) = tune.tune(one, 2, timer(10.0, 5.0, 4.0, 9.0))
    assert found.choice[0] == "cache_attention" and found.choice[2] == "4" and one.most == 32
    assert not found.dropped and found.seconds == 4.0 and found.best is not None


def test_attention_over_a_float_cache_is_tuned() -> None:
    one = tune_works.float_cache_work((4, 2), 16, 140, torch.device(DEVICE))
    (found,) = tune.tune(one, 2, timer(10.0, 5.0, 4.0, 9.0))
    assert found.choice == ("float_attention", "d=16 dv=16 n=2 float16", "4") and one.most == 16
    assert not found.dropped and found.seconds == 4.0 and found.best is not None


@pytest.mark.parametrize(("act", "kernel"), [(False, "norm_quantize"), (True, "act_quantize")])
def test_rows_of_codes_are_tuned(act: bool, kernel: str) -> None:
    one = tune_works.produced_work(96, "i8/tok", "i8/ch", torch.device(DEVICE), act=act)
    (found,) = tune.tune(one, 3, timer(10.0, 5.0, 4.0, 9.0))
    assert found.choice[0] == kernel and found.best is not None and not found.dropped


def test_attention_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_works, "HEADS", 2)
    one = tune_works.attention_work(16, True, ("i8/tok", "i8/tok", "", ""), torch.device(DEVICE))
    (found,) = tune.tune(one, 20, timer(10.0, 5.0, 4.0, 9.0))
    assert found.choice == ("quantized_attention", "d=32 dv=16 int8 float16 causal", "32")
    assert not found.dropped and found.seconds == 4.0
    assert found.best is not None and found.tried > 5


def test_experts_are_tuned() -> None:
    packed = pack_weight(torch.randn(4, 8, 64, device=DEVICE) / 8, Format.parse("u4/g32"))
    one = tune_works.OfExperts("experts", tune_works.Experts(packed), 64, torch.float32)
    (told,) = tune.tune(one, 3, timer(10.0, 9.0, 2.0, 8.0))
    assert told.choice == ("experts", "u4/g32 e=4 n=8 k=64 float32", "4") and not told.dropped
    assert (told.best, told.seconds) == (experts.candidates(Format.parse("u4/g32"), 3, 4, torch.float32)[1], 2.0)


@pytest.mark.parametrize(("x_format", "w_format"), [("i8/tok", "i4/g32"), ("f8e4m3/tok", "f8e4m3/ch")])
def test_products_of_codes_of_experts_are_tuned(x_format: str, w_format: str) -> None:
    packed = pack_weight(torch.randn(12, 16, 64, device=DEVICE) / 8, Format.parse(w_format))
    one = tune_works.OfExperts(
        "experts", tune_works.Experts(packed, x_format), 64, torch.float32, only=("experts_gemm",)
    )
    assert one.read < sum(t.nbytes for t in one.module.buffers())
    (told,) = tune.tune(one, 9, timer(10.0, 9.0))
    assert told.choice[0] == "experts_gemm" and told.choice[1].startswith("e=12 n=16 k=64")
    assert 3 < told.tried <= 20 and not told.dropped and told.best is not None


def test_the_command_writes_and_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = work(16, 32)
    monkeypatch.setattr(tune_works, "works_of_usual_models", lambda place, dtype: [one])
    console = Console(record=True, width=200)
    command.run(
        console, None, recipe=None, rows="2", dtype="f16", device=DEVICE, out=None, shipped=False,
        json_file=folder / "all.json", measure=timer(10.0, 9.0, 3.0, 8.0),
    )  # fmt: skip
    text = console.export_text()
    path = tuning.file_of(folder, HERE)
    assert "1 of 1 choices are faster" in text and path.name in text and "3000000.0" in text
    (told,) = json.loads((folder / "all.json").read_text())
    kernel, problem, rows = told["choice"]
    assert json.loads(path.read_text())[kernel][problem][rows] == told["best"]
    assert tuning.tuned(HERE, kernel, problem, int(rows), lambda _: [told["best"]]) == told["best"]


def test_a_layer_whose_result_is_wrong_does_not_keep_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_works, "works_of_usual_models", lambda place, dtype: [work(), work(16, 32)])
    own, calls = tune.tune, []

    def first_fails(one: tune_works.Work, *args: Any, **more: Any) -> Any:
        calls.append(one)
        if len(calls) == 1:
            raise ValueError("give a wrong result")
        return own(one, *args, **more)

    monkeypatch.setattr(tune, "tune", first_fails)
    console = Console(record=True, width=200)
    with pytest.raises(ValueError, match="1 layers were not measured, for their results are wrong: 24 x 40"):
        command.run(
            console, None, recipe=None, rows="2", dtype="f16", device=DEVICE, out=None, shipped=False, json_file=None,
            kernels="gemm8", measure=timer(1.0),
        )  # fmt: skip
    assert "0 of 1 choices" in console.export_text() and calls[1].only == ("gemm8",)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_damaged_file_is_told_before_anything_is_measured(
    folder: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_works, "works_of_usual_models", lambda *_: pytest.fail("too late"))
    out = folder / "out" if elsewhere else None
    path = tuning.file_of(out or folder, device.find(torch.device(DEVICE)))
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    tuning._of_device.cache_clear()
    with pytest.raises(ValueError, match="truncated or no JSON"):
        command.run(
            Console(record=True), None, recipe=None, rows="2", dtype="f16", device=DEVICE, out=out, shipped=False,
            json_file=None, measure=timer(1.0),
        )  # fmt: skip
    path.unlink()
    tuning._of_device.cache_clear()


def test_when_the_time_is_over_no_layer_is_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_works, "works_of_usual_models", lambda place, dtype: [work(), work()])
    console = Console(record=True, width=200)
    command.run(
        console, None, recipe=None, rows="2,4", dtype="f16", device=DEVICE, out=None, shipped=False, json_file=None,
        minutes=1e-9, measure=timer(1.0),
    )  # fmt: skip
    text = console.export_text()
    assert "minutes are over before 24 x 40" in text and "0 of 0 choices" in text


@pytest.mark.slow
def test_the_command_takes_a_model(folder: Path) -> None:
    model = folder / "model"
    tiny.build("llama").save_pretrained(model)
    command.run(
        Console(), str(model), recipe="w8a8", rows="2", dtype="f16", device=DEVICE, out=folder / "out", shipped=False,
        json_file=None, kernels="gemm8", measure=timer(10.0, 9.0, 3.0, 8.0),
    )  # fmt: skip
    assert "gemm8" in json.loads(tuning.file_of(folder / "out", HERE).read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "many"), "--rows are counts"),
        (("--rows", "0"), "--rows are counts"),
        (("--dtype", "i8"), "--dtype of activations"),
        (("--shipped", "--out", "x"), "found --out too"),
        (("--recipe", "w8a8"), "--recipe is for a MODEL"),
        (("nowhere",), "nowhere"),
    ],
)
def test_mistakes_are_short_messages(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("tune", "--device", DEVICE, *arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_recipe_that_needs_data_is_refused(folder: Path) -> None:
    model = folder / "model"
    tiny.config("llama").save_pretrained(model)
    result = run("tune", str(model), "--device", DEVICE, "--recipe", "w4a16-gptq")
    assert result.exit_code == 2 and "needs calibration data" in result.output, result.output


def test_without_a_folder_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QFX_TUNED_DIR", raising=False)
    monkeypatch.setenv("QFX_CACHE_DIR", "")
    result = run("tune", "--device", DEVICE)
    assert result.exit_code == 2 and "QFX_TUNED_DIR" in result.output, result.output


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("tune")
    assert result.exit_code == 2 and "there is no device 'cuda' here" in result.output, result.output
    monkeypatch.setattr(device, "interpreting", lambda: False)
    result = run("tune", "--device", "cpu")
    assert result.exit_code == 2 and "Triton kernels cannot run on the device 'cpu'" in result.output, result.output


def test_times_are_taken_on_the_device_of_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def seconds(calls: Sequence[timing.Call], on: timing.CudaGraphs, *, budget: float) -> float:
        asked.append(on.device)
        return budget

    monkeypatch.setattr(timing, "seconds", seconds)
    one = work()
    assert list(tune.tune(one, 3)) and set(asked) == {one.where}
