"""Models larger than memory in processes of their own: bounded memory, full disks, and an end at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.qfx.storage.test_streamed import different, digests, llama, load_all, saved

ROOT = Path(__file__).parents[3]

_FULL = """
    import resource, signal, sys, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import qfx
    from qfx.storage import spill, streamed
    spill.LEAST = 1
    model = streamed.load(sys.argv[1], scratch=sys.argv[2]).model
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        qfx.quantize(model, "w8a8")
    except OSError as error:
        print("refused:", error)
    print("left:", sorted(path.name for path in Path(sys.argv[2]).iterdir()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the size of files")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "model")
    (tmp_path / "scratch").mkdir()
    text = output(_FULL, str(folder), str(tmp_path / "scratch"))
    assert "refused: " in text and "a temporary file for packed weights cannot be written" in text
    assert "left: []" in text


_MEMORY = """
    import gc, sys, threading, time, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    import torch
    import qfx
    from qfx.storage import spill, streamed

    def now():
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))

    def sample():
        while not done:
            peaks[0] = max(peaks[0], now())
            time.sleep(0.002)

    torch.set_num_threads(1)
    folder, tiny, recipe, control = sys.argv[1:]
    data = [{"input_ids": torch.arange(64).reshape(2, 32)}] if recipe != "w8a8" else None
    qfx.save(qfx.quantize(tiny, recipe, data), tiny + "-out")
    if control == "control":
        spill._REGIONS.find = lambda tensor: None
    gc.collect()
    spill.give_back()
    done, peaks, before = False, [0], now()
    thread = threading.Thread(target=sample)
    thread.start()
    qfx.save(qfx.quantize(folder, recipe, data), folder + "-out")
    done = True
    thread.join()
    print(peaks[0] - before)
"""


def output(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("recipe", "most"), [("w8a8", 0.5), ("w8a8-smooth", 0.5), ("w4a16-gptq", 0.75)])
def test_memory_is_bounded(tmp_path: Path, recipe: str, most: float) -> None:
    """Of 8 layers no more than some are in memory at once; without rest, which is the control, all of them are. GPTQ
    has a layer in f32, a quarter of the model, and of its widest linear 2 x 2816^2 x 4 bytes, a third."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=320, tie_word_embeddings=False,
    )  # fmt: skip
    big = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in big.parameters())
    folder, tiny = saved(big, tmp_path / "big", shards="20MB"), saved(llama(), tmp_path / "tiny")
    del big
    grown = int(output(_MEMORY, str(folder), str(tiny), recipe, "").split()[-1])
    control = int(output(_MEMORY, str(folder), str(tiny), recipe, "control").split()[-1])
    assert grown < most * size < 0.9 * size < control, (grown / size, control / size)


_KILLED = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    import qfx
    from qfx.storage import resume
    folder, progress, out, blocks = sys.argv[1:]
    data = [{"input_ids": (torch.arange(24).reshape(2, 12) * 7 + i) % 290} for i in range(3)]
    save = resume.Resume.save
    left = int(blocks)

    def counted(self, number, *rest):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        save(self, number, *rest)

    resume.Resume.save = counted
    qfx.save(qfx.quantize(folder, "w4a16", data, rounding="gptq", resume=progress), out)
"""


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path: Path) -> None:
    """SIGKILL while the third block is kept: the same command goes on behind the second, with the same result."""
    folder = saved(llama(), tmp_path / "model")
    progress, out = tmp_path / "progress", tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder), str(progress), str(out)]
    done = subprocess.run([*command, "2"], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    kept = sorted(path.name for path in progress.glob("block-*"))
    assert kept == ["block-00000.safetensors", "block-00001.safetensors"]
    before = digests(progress)
    subprocess.run([*command, "99"], check=True, cwd=ROOT)
    assert before.items() <= digests(progress).items(), "finished blocks are not made again"
    whole = [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder), str(tmp_path / "p2"), str(tmp_path / "whole")]
    subprocess.run([*whole, "99"], check=True, cwd=ROOT)
    assert different(load_all(out), load_all(tmp_path / "whole")) == []
