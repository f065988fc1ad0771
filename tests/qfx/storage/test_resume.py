"""Finished blocks in a folder: interrupted and taken up again, with the same result to the bit."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from torch import Tensor

import qfx
from qfx.errors import Note
from qfx.rounding import sequential
from qfx.rounding.blocks import Block
from qfx.rounding.sequential import TOLD
from qfx.storage import files
from qfx.storage.resume import Resume, digest
from tests.stack import Stack, batches

ROOT = Path(__file__).resolve().parents[3]


def recipe(**fields: Any) -> dict[str, Any]:
    return {"rules": [{"target": "linear", "w": "u3/g8"}], "rounding": "gptq", **fields}


class TestResume:
    """An interrupted run goes on behind the last finished block."""

    def plan(self, folder: Path | None, data: list[Tensor] | None = None, seed: int = 0, **fields: Any) -> qfx.Plan:
        return qfx.plan(Stack(3, seed=seed), recipe(**fields), data or batches(12), resume=folder)

    def same(self, one: qfx.Plan, other: qfx.Plan) -> bool:
        """Equal but for the seconds."""
        for plan in (one, other):
            for told in plan.sensitivities[TOLD].values():
                told.pop("seconds", None)
        return one == other

    def test_finished_blocks_are_not_rounded_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = self.plan(None)
        first = self.plan(tmp_path)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == [*(f"block-{i:05d}.safetensors" for i in range(5)), "progress.json"]
        for name in kept[2:4]:
            (tmp_path / name).unlink()
        rounds: list[str] = []
        original = sequential._method

        def counted(found: qfx.Recipe) -> Any:
            method = original(found)

            class Counted:
                needs_float, reads_all = method.needs_float, method.reads_all

                def round(self, block: Block) -> list[Note]:
                    rounds.append(block.name)
                    return method.round(block)

            return Counted()

        monkeypatch.setattr(sequential, "_method", counted)
        again = self.plan(tmp_path)
        assert rounds == ["layers.1", "layers.2"]
        assert self.same(first, whole) and self.same(again, whole)

    def test_the_bar_counts_what_is_done_now(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bars: list[Progress] = []

        def bar(shown: bool, *columns: ProgressColumn, period: float) -> Progress:
            assert period >= 600, "a block may take minutes"
            console = Console(file=io.StringIO(), force_terminal=True)
            bars.append(Progress(*columns, console=console, disable=not shown, auto_refresh=False))
            return bars[-1]

        monkeypatch.setattr(sequential, "progress_bar", bar)
        self.plan(tmp_path)
        (tmp_path / "block-00002.safetensors").unlink()
        self.plan(tmp_path)
        whole, rest = (one.tasks[0] for one in bars)
        assert whole.finished and rest.finished
        assert whole.description == rest.description == "rounding head"
        assert rest.total is not None and 0 < rest.total < 0.5 * (whole.total or 0)
        assert rest.completed == pytest.approx(rest.total)

    def test_asymmetric_goes_on_too(self, tmp_path: Path) -> None:
        fields: dict[str, Any] = {"gptq": {"asymmetric": True}}
        whole = self.plan(tmp_path, **fields)
        (tmp_path / "block-00003.safetensors").unlink()
        assert self.same(self.plan(tmp_path, **fields), whole)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"data": batches(5)}, "the data"),
            ({"seed": 3}, "the model"),
            ({"gptq": {"dampening": 0.1}}, "the recipe"),
        ],
    )
    def test_other_work_is_refused(self, tmp_path: Path, change: dict[str, Any], words: str) -> None:
        self.plan(tmp_path)
        with pytest.raises(ValueError, match=rf"holds the progress of other work\n.*\n.*: {words}\n.*another folder"):
            self.plan(tmp_path, **change)

    def test_other_formats_under_the_same_recipe_are_refused(self, tmp_path: Path) -> None:
        """An allocation by other scores gives heads other formats, of which segments may have the same shapes."""
        data, plan = [(one,) for one in batches(2)], qfx.Plan(qfx.Recipe.parse(recipe()))
        plan.annotations["head"] = {"w": ["u3/g8", "u4/g8"]}
        Resume.open(tmp_path, plan, data)
        Resume.open(tmp_path, plan, data)
        plan.annotations["head"] = {"w": ["u4/g8", "u3/g8"]}
        with pytest.raises(ValueError, match=r"other work\n.*\n.*another of each of: the formats or the rewrites\n"):
            Resume.open(tmp_path, plan, data)

    def test_what_was_begun_when_the_process_was_killed(self, tmp_path: Path) -> None:
        (tmp_path / ".progress.json.0123456789ab.tmp").write_text("{")
        whole = self.plan(tmp_path)
        old, young = (tmp_path / f".block-{i}.safetensors.0123456789ab.tmp" for i in (1, 2))
        old.touch()
        young.touch()
        os.utime(old, (0, 0))
        assert self.same(self.plan(tmp_path), whole)
        assert young.exists() and not old.exists()

    def test_folders_of_others_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"holds other files and no progress\.json"):
            self.plan(tmp_path)
        (tmp_path / "thesis.txt").rename(tmp_path / "progress.json")
        with pytest.raises(ValueError, match=r"progress\.json is truncated or no JSON"):
            self.plan(tmp_path)
        (tmp_path / "progress.json").write_text("{}")
        with pytest.raises(ValueError, match=r"progress\.json is not of qfx"):
            self.plan(tmp_path)

    def test_a_cut_file_is_named(self, tmp_path: Path) -> None:
        self.plan(tmp_path)
        file = tmp_path / "block-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"block-00002\.safetensors is truncated"):
            self.plan(tmp_path)
        os.replace(tmp_path / "block-00001.safetensors", file)
        with pytest.raises(
            ValueError, match=r"block-00002\.safetensors is not the block 'layers.1'\n  found: 'layers.0'"
        ):
            self.plan(tmp_path)

    @pytest.mark.parametrize("at", ["weights", "metadata"])
    def test_one_flipped_bit_is_found(self, at: str, tmp_path: Path) -> None:
        whole = self.plan(tmp_path)
        file = tmp_path / "block-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1 if at == "weights" else data.index(b"notes")] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"block-00001\.safetensors was altered\n  next step: remove the file"):
            self.plan(tmp_path)
        file.unlink()
        assert self.same(self.plan(tmp_path), whole)

    def test_a_full_disk_keeps_what_is_done(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = files.dump_safetensors

        def full(path: Path, tensors: Any, metadata: Any = None) -> None:
            if len(list(tmp_path.glob("block-*"))) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            original(path, tensors, metadata)

        monkeypatch.setattr(files, "dump_safetensors", full)
        words = r"the disk is full: layers\.2 could not be kept, the blocks before it are\. Free some space and run"
        with pytest.raises(OSError, match=words) as caught:
            self.plan(tmp_path)
        assert caught.value.errno == errno.ENOSPC
        assert len(list(tmp_path.glob("block-*"))) == 3 and not list(tmp_path.glob(".*"))
        monkeypatch.undo()
        assert self.same(self.plan(tmp_path), self.plan(None))

    @pytest.mark.slow
    def test_killed_at_any_moment(self, tmp_path: Path) -> None:
        """SIGKILL after each of the first blocks; the last run of the same command has the same plan to the bit."""
        work = tmp_path / "work"
        code = (
            "import sys, pathlib, qfx, torch; from tests.stack import Stack, batches\n"
            "recipe = {'rules': [{'target': 'linear', 'w': 'u3/g8'}], 'rounding': 'gptq'}\n"
            "plan = qfx.plan(Stack(3), recipe, batches(12), resume=sys.argv[1])\n"
            "plan.save(sys.argv[2])\n"
        )
        command = [sys.executable, "-c", code, str(work), str(tmp_path / "plan")]
        for blocks in (1, 3):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(work.glob("block-*"))) < blocks:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it was too quick to be killed"
            assert not (tmp_path / "plan").exists()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        found = qfx.Plan.load(tmp_path / "plan")
        assert self.same(found, self.plan(None))


def test_digest_of_data() -> None:
    one = [(torch.arange(4), 3), (torch.ones(2),)]
    assert digest(one) == digest([(torch.arange(4), 3), (torch.ones(2),)])
    for other in ([(torch.arange(4), 4), one[1]], [one[0]], [(torch.arange(4).int(), 3), one[1]], [one[1], one[0]]):
        assert digest(other) != digest(one)
    assert re.fullmatch(r"[0-9a-f]{64}", digest([]))
