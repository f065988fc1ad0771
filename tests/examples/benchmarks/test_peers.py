"""The race and the tables of the benchmarks: what is measured is what is shown, and nothing that fails is left out."""

from __future__ import annotations

import io
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from examples.benchmarks import cpu_decoder, cpu_encoder
from examples.benchmarks.peers import decoding, load, qfx_encoder, qfx_profile, race, table
from examples.benchmarks.peers.encoding import EncoderJob
from examples.benchmarks.peers.integer_gemm import shapes
from examples.benchmarks.peers.load import Load
from examples.benchmarks.peers.race import Entry, Race, Result
from qfx.backends.onnx import export

STATES = np.random.default_rng(0).standard_normal((2, 3, 8), dtype=np.float32)


def result(name: str, seconds: float, outputs: Any = None) -> Result:
    return Result(name, {"call": seconds}, size=1000, version="1.0", outputs=outputs)


def text_of(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_ratios_are_to_the_fastest_peer_that_is_neither_qfx_nor_the_floor() -> None:
    results = [
        result(cpu_encoder.REFERENCE, 0.100, [STATES]),
        result("other", 0.040, [STATES * 2]),
        result("qfx w8a8", 0.020, [-STATES]),
        result(cpu_encoder.FLOOR, 0.010),
        Result("broken", failed="ImportError: no such package"),
    ]
    rows = {row["peer"]: row for row in cpu_encoder.rows(results)}
    assert [rows[r.name].get("ratio") for r in results] == pytest.approx([2.5, 1.0, 0.5, 0.25, None])
    assert [rows[r.name].get("call_ms") for r in results] == pytest.approx([100, 40, 20, 10, None])
    assert rows["other"]["cosine"] == pytest.approx(1) and rows["qfx w8a8"]["cosine"] == pytest.approx(-1)
    assert rows[cpu_encoder.FLOOR]["cosine"] is None
    assert rows["broken"] == {"peer": "broken", "failed": "ImportError: no such package"}


def test_without_a_peer_there_is_no_ratio() -> None:
    (row,) = cpu_encoder.rows([result("qfx w8a8", 0.02)])
    assert row["ratio"] is None and row["cosine"] is None


def test_a_reference_that_failed_leaves_no_cosine() -> None:
    rows = cpu_encoder.rows([Result(cpu_encoder.REFERENCE, failed="no"), result("other", 0.04, [STATES])])
    assert rows[1]["cosine"] is None and rows[1]["ratio"] == 1


def test_tokens_per_second_and_divergence() -> None:
    job = decoding.DecoderJob("tiny", 100, 10, 4, 1, "")
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float32))
    results = [
        Result(cpu_decoder.REFERENCE, {"prefill": 2.0, "decode": 1.0}, {}, 8, "1", outputs=[logits]),
        Result("fast reader", {"prefill": 0.5, "decode": 2.0}, {}, 8, "1", outputs=[logits]),
        Result("qfx w4a16", {"prefill": 0.25, "decode": 0.5}, {}, 4, "1", outputs=[other]),
        Result("broken", failed="boom"),
    ]
    rows = cpu_decoder.rows(results, job)
    assert [row.get("prefill_per_s") for row in rows] == pytest.approx([50, 200, 400, None])
    assert [row.get("prefill_ratio") for row in rows] == pytest.approx([0.25, 1, 2, None])
    assert [row.get("decode_ratio") for row in rows] == pytest.approx([1, 0.5, 2, None])
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert [row.get("kld") for row in rows] == pytest.approx([0, 0, expected, None], abs=1e-6)
    assert rows[3] == {"peer": "broken", "failed": "boom"}


def test_a_failure_is_shown_by_its_first_line() -> None:
    rows: list[dict[str, Any]] = [
        {"peer": "good", "call_ms": 12.345},
        {"peer": "bad", "failed": "\nOSError: " + "x" * 300 + "\nmore"},
    ]
    text = text_of(table.shown(rows, {"call_ms": "ms"}, "title"))
    assert "12.35" in text or "12.34" in text
    assert "failed:" in text and "OSError:" in text and "more" not in text
    assert table.reason(rows[1]["failed"]).startswith("failed: OSError: xxx")


@pytest.mark.parametrize(
    ("key", "value", "cell"),
    [
        ("call_ms", 1.2345, "1.23"),
        ("ratio", 1.5, "1.50x"),
        ("prefill_ratio", 0.5, "0.50x"),
        ("weights_bytes", 12_345_678, "12.3"),
        ("decode_per_s", 66.66, "66.7"),
        ("cosine", 0.99, "0.99000"),
        ("cosine", None, ""),
        ("nodes", 3, "3"),
    ],
)
def test_cells(key: str, value: Any, cell: str) -> None:
    assert table.cell(key, value) == cell


def test_a_plot_leaves_out_what_failed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"peer": "qfx w8a8", "call_ms": 1.0},
        {"peer": "bad", "failed": "no"},
        {"peer": "floor", "call_ms": None},
    ]
    table.plot(tmp_path / "bars.png", {"one": {"rows": rows}, "two": {"rows": rows}}, "call_ms", "ms")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_place_names_the_versions_that_run() -> None:
    assert "3 threads" in table.place(3)
    assert {"torch", "onnxruntime", "qfx"} <= table.versions().keys()


def test_entries_by_word_keep_the_reference() -> None:
    names = [e.name for e in cpu_encoder.entries(("w8a8",), ("qfx",))]
    assert names == [cpu_encoder.REFERENCE, "qfx w8a8"]
    assert len(cpu_encoder.entries(("w8a8",), ())) == len(cpu_encoder.PEERS) + 2
    names = [e.name for e in cpu_decoder.entries(("w4a16",), (), ("llama.cpp", "eager"))]
    assert names[0] == cpu_decoder.REFERENCE and not any("llama" in name or "bfloat16" in name for name in names)


def test_every_peer_has_its_file() -> None:
    folder = Path(cpu_encoder.__file__).parent / "peers"
    for entry in (*cpu_encoder.entries(("w8a8",), ()), *cpu_decoder.entries(("w4a16",), ())):
        assert "\ndef build(" in (folder / f"{entry.module}.py").read_text(encoding="utf-8")


def test_a_peer_that_is_missing_or_dies_is_a_result(tmp_path: Path) -> None:
    heard: list[str] = []
    entries = [Entry("nowhere", "no_such_peer"), Entry("wrong job", "eager", "float32")]
    no_job = Entry("nothing", "is built from it")
    with Race(entries, no_job, tmp_path, heard.append) as race:
        started = time.perf_counter()
        missing, wrong = race.run(3)
        assert time.perf_counter() - started < 1  # what failed has no turn
    assert missing.failed.startswith("ModuleNotFoundError") and not missing.seconds
    assert wrong.failed
    assert [line.split(":")[0] for line in heard] == ["nowhere", "wrong job"]
    assert "Traceback" in (tmp_path / "nowhere.log").read_text(encoding="utf-8")


def test_rounds_below_one_are_refused(tmp_path: Path) -> None:
    with (
        Race([], None, tmp_path, print) as race,
        pytest.raises(ValueError, match="rounds must be 1 or more, found 0"),
    ):
        race.run(0)


def test_the_jobs_of_encoders_do_not_change(tmp_path: Path) -> None:
    job = EncoderJob("tiny", 2, 16, 1, str(tmp_path))
    one, two = job.module().state_dict(), job.module().state_dict()
    assert all((one[name] == two[name]).all() for name in one)
    held_out, known = job.evaluation(), job.calibration()
    assert all(batch["input_ids"].shape == (2, 16) for batch in (*held_out, *known))
    assert not any((a["input_ids"] == b["input_ids"]).all() for a in held_out for b in known)


@pytest.mark.parametrize(("batch", "length", "count"), [(1, 512, 4), (8, 512, 3), (64, 512, 1)])
def test_all_batches_have_the_shape_that_is_timed(batch: int, length: int, count: int, tmp_path: Path) -> None:
    job = EncoderJob("tiny", batch, length, 1, str(tmp_path))
    assert [b["input_ids"].shape for b in job.evaluation()] == [(batch, length)] * count
    known = sum(len(b["input_ids"]) for b in job.calibration())
    assert known == 64, "as much text to calibrate on for each batch size"


@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
def test_the_file_by_openvino_gives_what_the_compiled_model_gives(tmp_path: Path) -> None:
    job = EncoderJob("tiny", 2, 16, 1, str(tmp_path))
    pairs = [qfx_encoder.build(job, f"w8a8-static {way}") for way in ("file", "openvino")]
    made = [built.outputs() for built in pairs if built.outputs is not None]
    float_ = [job.module()(**batch).last_hidden_state.detach().numpy() for batch in job.evaluation()]
    for found, compiled, exact in zip(*made, float_, strict=True):
        assert found.shape == exact.shape
        assert np.abs(found - compiled).mean() < 0.2 * np.abs(found - exact).mean()
    assert all(built.time()["call"] > 0 for built in pairs) and (job.path / "qfx_w8a8-static.onnx").exists()


@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
def test_the_size_of_a_file_has_the_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of bert-base do not lie in the model's own file."""
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 0)
    job = EncoderJob("tiny", 2, 16, 1, str(tmp_path))
    size = qfx_encoder.build(job, "w8a8 file").size
    found = [file.stat().st_size for file in job.path.iterdir()]
    assert len(found) == 2 and size == sum(found)


def test_the_floor_counts_every_linear_layer(tmp_path: Path) -> None:
    found = shapes(EncoderJob("tiny", 1, 16, 1, str(tmp_path)).module())
    assert found == {(32, 32): 8, (32, 64): 2, (64, 32): 2}


def test_a_profile_is_summed_by_operator() -> None:
    def event(name: str, op: str, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op}}

    events = [{"cat": "Session", "name": "model_run", "dur": 9}]
    for slow in (900, 0, 0):  # the first call does not count
        events += [event("a", "Add", 1000 + slow), event("b", "Add", 2000 + slow), event("m", "MatMul", 5000 + slow)]
    assert qfx_profile.by_operator(events, calls=2) == {"Add": (2, 3.0), "MatMul": (1, 5.0)}
    assert qfx_profile.by_part(events, calls=2) == {"rest": (2, 3.0), "products": (1, 5.0)}


@pytest.mark.parametrize(
    ("operator", "node", "part"),
    [
        ("MatMulIntegerToFloat", "linear_3/4", "products"),
        ("MatMulNBits", "linear/0", "products"),
        ("Mul", "linear_3/5", "quantize, scales, bias"),
        ("ReduceMax", "linear_3/1", "quantize, scales, bias"),
        ("QuantizeLinear", "anything", "quantize, scales, bias"),
        ("MatMul", "scaled_dot_product_attention_2/7", "attention"),
        ("FusedMatMul", "MatMul_scaled_dot_product_attention/3_FusedMatMulAndScale", "attention"),
        ("Transpose", "scaled_dot_product_attention/2", "attention"),
        ("QAttention", "scaled_dot_product_attention/2", "attention with its q, k, v products"),
        ("LayerNormalization", "layer_norm_1/0", "norms"),
        ("Gelu", "gelu/0", "GELU"),
        ("Add", "add_2/0", "rest"),
        ("Gather", "embedding/2", "rest"),
    ],
)
def test_kernels_belong_to_parts(operator: str, node: str, part: str) -> None:
    assert qfx_profile.part(operator, node) == part


def test_a_profile_is_shown_beside_the_floor() -> None:
    facts = {"parts": {"norms": (2, 1.0), "products": (4, 3.0)}, "operators": {"MatMul": (4, 3.0)}}
    result = Result("profile w8a8", facts=facts)
    text = text_of(cpu_encoder.profiled(result, "w8a8", "part", floor=2.0))
    lines = [line for line in text.splitlines() if "%" in line]
    assert ["75.0%" in lines[0], "25.0%" in lines[1], "50.0%" in lines[2]] == [True] * 3
    assert "products" in lines[0] and "floor" in lines[2] and "4.000" in text
    assert "MatMul" in text_of(cpu_encoder.profiled(result, "w8a8"))
    assert "failed: no" in text_of(cpu_encoder.profiled(Result("x", failed="no"), "w8a8", "part", floor=2.0))


def row(peer: str, ms: float, cosine: float | None) -> dict[str, Any]:
    return {"peer": peer, "call_ms": ms, "cosine": cosine}


def test_encoders_are_judged_by_the_fastest_peer_and_the_best_cosine_of_8_bits() -> None:
    peers = [row("fast int8", 10, 0.98), row("ORT quantize_dynamic", 20, 0.99), row("bfloat16", 30, 0.9999)]
    floor = row(cpu_encoder.FLOOR, 1, None)
    assert cpu_encoder.verdicts([*peers, row("qfx w8a8", 8, 0.995), floor, {"peer": "bad", "failed": "no"}]) == [
        (
            "qfx w8a8: 1.25 times as fast as the fastest peer (fast int8), "
            "cosine 0.99500 (best of 8 bits: 0.99000, ORT quantize_dynamic)"
        )
    ]
    assert cpu_encoder.verdicts([row("qfx w8a8", 8, None), floor]) == ["qfx w8a8: no peer to compare with"]
    assert cpu_encoder.verdicts([*peers, {"peer": "qfx w8a8", "failed": "no"}]) == []


def tokens(peer: str, decode: float, prefill: float, size: int, kld: float | None) -> dict[str, Any]:
    return {"peer": peer, "decode_per_s": decode, "prefill_per_s": prefill, "weights_bytes": size, "kld": kld}


def test_decoders_are_judged_by_the_fastest_and_by_those_as_small_and_as_near() -> None:
    peers = [tokens("big", 50, 900, 99, 0.0), tokens("llama.cpp Q4", 40, 200, 9, 0.1)]
    assert cpu_decoder.verdicts([*peers, tokens("qfx w4", 20, 400, 9, 0.2)]) == [
        (
            "qfx w4: decode 0.40x big (the fastest), decode 0.50x llama.cpp Q4 (the fastest of llama.cpp), "
            "prefill 0.44x big (the fastest), prefill 2.00x llama.cpp Q4 (the fastest of llama.cpp); "
            "decode 0.50x the fastest that is as small and as near (llama.cpp Q4)"
        )
    ]
    (line,) = cpu_decoder.verdicts([peers[1], tokens("qfx w4", 20, 400, 8, 0.2)])
    assert line.count("llama.cpp Q4") == 2, "the fastest of all is not told twice"
    assert line.endswith("; no peer is as small and as near")
    assert cpu_decoder.verdicts([tokens("qfx w4", 1, 1, 1, None)]) == ["qfx w4: no peer to compare with"]


def stat(folder: Path, busy: int, own: int, *, idle: int = 100) -> None:
    """busy: ticks of all processors that were used; own: those of the process."""
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2\n", encoding="ascii")
    (folder / "7").mkdir(exist_ok=True)
    fields = " ".join(["S", *"0" * 10, str(own), "0", *"0" * 30])
    (folder / "7" / "stat").write_text(f"7 (a ) name) {fields}\n", encoding="ascii")


def test_what_others_use_is_counted_between_begin_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PROC", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    measured = Load()
    assert measured.cores is None and "not known" in str(measured)
    stat(tmp_path, 0, 0)
    measured.begin(7)
    stat(tmp_path, 300, 100, idle=200)  # 400 ticks of 4 processors: 1 of them the process's, 2 others'
    measured.end(7)
    stat(tmp_path, 900, 100, idle=200)  # between two stretches
    measured.begin(7)
    stat(tmp_path, 1000, 200, idle=500)  # as long, without others
    measured.end(7)
    assert measured.cores == pytest.approx(1)
    assert str(measured) == "meanwhile other processes kept 1.0 of 4 processors busy"
    measured.begin(8)
    measured.end(8)
    assert measured.cores == pytest.approx(1), "a process that is gone does not count"


PEER = """
import os, pathlib
from dataclasses import dataclass
import numpy as np
from examples.benchmarks.peers.worker import Built

@dataclass
class Job:
    folder: str

def build(job, option):
    log = pathlib.Path(job.folder) / "log"

    def note(word, result=None):
        with log.open("a") as file:
            file.write(f"{word} {os.getpid()}\\n")
        return result

    note("build")
    timed, judged = lambda: note("time", {"call": 0.5}), lambda: note("judge", [np.zeros(3)])
    return Built(timed, judged, 5, "1", {}, lambda: note("warm"))
"""


@dataclass
class Job:
    """That of the stub: of one beside it the worker would import torch first."""

    folder: str


Job.__module__ = "examples.benchmarks.peers.stub"


@pytest.mark.parametrize("alone", [False, True])
def test_turns_are_warmed_and_alone_means_a_process_for_each(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(race.ROOT / "examples", root / "examples")
    (root / "qfx").symlink_to(race.ROOT / "qfx")
    (root / "examples" / "benchmarks" / "peers" / "stub.py").write_text(PEER, encoding="utf-8")
    monkeypatch.setattr(race, "ROOT", root)
    heard: list[str] = []
    entries = [Entry("one", "stub"), Entry("two", "stub"), Entry("missing", "nothing")]
    with Race(entries, Job(str(tmp_path)), tmp_path, heard.append, alone=alone) as running:
        found = running.run(2)
    assert [r.seconds.get("call") for r in found] == [0.5, 0.5, None], [r.failed for r in found]
    assert [r.best.get("call") for r in found] == [0.5, 0.5, None] and found[2].failed
    assert [r.size for r in found] == [5, 5, None] and all(r.outputs is not None for r in found[:2])
    lines = [line.split() for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    turn = ["build", "warm", "time"] if alone else ["warm", "time"]
    assert [word for word, _ in lines] == [*["build", "judge"] * 2, *turn * 4]
    assert len({process for _, process in lines}) == (6 if alone else 2)


def test_outputs_stay_in_files_that_go_when_they_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first entry, the reference, stay to the end."""
    root = tmp_path / "root"
    shutil.copytree(race.ROOT / "examples", root / "examples")
    (root / "qfx").symlink_to(race.ROOT / "qfx")
    (root / "examples" / "benchmarks" / "peers" / "stub.py").write_text(PEER, encoding="utf-8")
    monkeypatch.setattr(race, "ROOT", root)
    entries = [Entry("one", "stub"), Entry("two", "stub"), Entry("missing", "nothing")]
    seen: list[tuple[str, bool, list[str]]] = []

    def judge(result: race.Result) -> None:
        assert result.failed or (
            isinstance(result.outputs, race.Saved) and len(result.outputs) == len([*result.outputs])
        )
        seen.append((result.name, bool(result.failed), sorted(f.name for f in tmp_path.glob("*.npz"))))

    with Race(entries, Job(str(tmp_path)), tmp_path, lambda said: None, alone=True, judge=judge):
        assert [f.name for f in tmp_path.glob("*.npz")] == ["one.npz"]
    assert seen == [
        ("one", False, ["one.npz"]), ("two", False, ["one.npz", "two.npz"]), ("missing", True, ["one.npz"]),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.npz"))


class Counting:
    """A decoder whose memory is used again for each answer, as some libraries do."""

    def __init__(self) -> None:
        self.logits, self.seen = np.zeros(4, np.float32), list[int]()

    def reset(self) -> None:
        self.seen.clear()

    def step(self, ids: list[int]) -> np.ndarray:
        self.seen += ids
        self.logits[:] = len(self.seen)
        return self.logits


def test_decoders_are_judged_on_copies_and_timed_from_the_start(tmp_path: Path) -> None:
    decoder = Counting()
    built = decoding.built(decoding.DecoderJob("tiny", 5, 3, 8, 1, str(tmp_path)), decoder, 1, "1")
    assert built.outputs is not None
    (logits,) = built.outputs()
    assert logits[:, 0].tolist() == [4, 5, 6, 7, 8]
    for _ in range(2):
        assert set(built.time()) == {"prefill", "decode"} and len(decoder.seen) == 5 + 3


def test_a_folder_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), decoding.made(tmp_path / "folder") as part:
        (part / "none" / "half").touch()
    assert not (tmp_path / "folder").exists()
    with decoding.made(tmp_path / "folder") as part:
        (part / "whole").touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["whole"]
