"""qfx.long_sizes: where sizes that vary become too long to trace, the first axis varies alone, and that is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.capture import capture_export
from qfx.decoding import decoder
from qfx.decoding import encoder_decoder as pair
from qfx.errors import UnsupportedError
from qfx.live.modules import QuantLinear
from qfx.long_sizes import LONGEST, LongSize, ShortSizes
from qfx.other_sizes import other_sizes
from tests.graphs import Function, error
from tests.zoo import ZOO


class Windows(nn.Module):
    """Fills images up to windows, `rounds` times, each of another size, as hierarchical transformers do."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.fc = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, 4] -> [B, C, 4]"""
        x = images
        for i in range(self.rounds):
            height = x.shape[2] * x.shape[2] // (x.shape[2] + 2 + i)  # a quotient of the one before it
            x = F.pad(x, (0, 0, 0, 5))[:, :, : height + 1]
        return torch.as_tensor(self.fc(x.mean(2)))


X = torch.randn(2, 3, 40, 4)


def sizes(model: nn.Module, x: Tensor, **how: Any) -> tuple[list[bool], str]:
    """Which axes of the input vary; why the first alone."""
    captured = capture_export(model, (x,), **how)
    (node,) = (n for n in captured.gm.graph.nodes if n.op == "placeholder")
    return [isinstance(s, torch.SymInt) for s in node.meta["val"].shape], captured.fixed


def test_short_sizes_vary() -> None:
    varying, alone = sizes(Windows(1), X)
    assert varying[:3] == [True, True, True] and not alone


def test_where_they_become_long_the_first_axis_varies() -> None:
    why = "only the first axis of each input varies: sizes of the others become too long to trace"
    assert sizes(Windows(9), X) == ([True, False, False, False], why)
    assert sizes(Windows(9), X, dynamic=False) == ([False] * 4, "")


class Square(nn.Module):
    """Reads rows as a square image, whose side it takes from their number, which torch does not trace (InternVL).

    axis: the first of those whose size must be a number; 3: none can be traced."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.fc, self.axis = nn.Linear(4, 4), axis

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B, side * side, 4] -> [B, side, side, 4]"""
        if self.axis == 3 or any(isinstance(size, torch.SymInt) for size in rows.shape[self.axis :]):
            raise TypeError("no number")
        side = int(rows.shape[1] ** 0.5)
        return torch.as_tensor(self.fc(rows).reshape(-1, side, side, 4))


def test_where_torch_does_not_trace_the_others_the_first_axis_varies(tmp_path: Path) -> None:
    model, rows = Square().eval(), torch.randn(2, 9, 4)
    why = "torch.export does not trace the others (no number)"
    assert sizes(model, rows) == ([True, False, False], f"only the first axis of each input varies: {why}")
    assert sizes(Square(axis=0), rows) == ([False] * 3, f"no axis of an input varies: {why}")
    with pytest.warns(qfx.QfxWarning, match=r"in the file only the first axis of each input varies: torch\.export"):
        qfx.export_onnx(model, (rows,), tmp_path / "m.onnx")
    found = qfx.quantize(model, "w8a8-static", [rows, rows[:1]])
    assert found(rows).shape == (2, 3, 3, 4) and isinstance(found.fc, QuantLinear) and found.fc.x_format == "u8"
    with pytest.raises(ValueError, match=r"does not fit the traced graph[\s\S]*cut or pad the batches to one shape"):
        qfx.quantize(Square().eval(), "w8a8-static", [rows, torch.randn(2, 16, 4)])


def test_where_none_is_traced_the_error_is_that_of_all_and_names_the_line() -> None:
    with pytest.raises(UnsupportedError, match=r"TypeError: no number \(at .*test_long_sizes.py:\d+, in forward: rai"):
        capture_export(Square(axis=3), (torch.randn(2, 9, 4),))


def test_a_condition_on_values_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def traces(forward: Any, x: Tensor) -> int:
        seen, export = list[Any](), torch.export.export

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen.append(args)
            return export(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch.export, "export", counted)
            with pytest.raises(UnsupportedError, match=r"data-dependent .*test_long_sizes.py"):
                capture_export(Function(forward), (x,))
        return len(seen)

    assert traces(lambda own, x: x if x.sum() > 0 else -x, torch.randn(3, 4)) == 1
    assert traces(lambda own, x: x if x.sum().item() > 0 else -x, torch.randn(3, 4)) == 1
    assert traces(lambda own, x: x if x.argmax().item() > x.shape[0] else -x, torch.randn(3, 4)) == 1


def test_the_mode_raises_at_the_limit_and_leaves_the_result_alone() -> None:
    mode = ShortSizes()
    with mode:
        assert torch.equal(X + 1, X.add(1))
        assert len(torch.split(X, 1)) == 2
    assert not mode._seen, "sizes that are numbers cost nothing"
    varying = {"images": dict.fromkeys(range(3), torch.export.Dim.AUTO)}
    with pytest.raises(LongSize) as raised, ShortSizes():
        torch.export.export(Windows(9), (X,), dynamic_shapes=varying, strict=False)
    assert len(re.findall(r"//|[-+*]", str(raised.value))) > LONGEST // 2


def test_a_file_says_that_other_sizes_are_fixed(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = Windows(9).eval()
    with pytest.warns(qfx.QfxWarning, match="in the file only the first axis of each input varies") as told:
        written = qfx.export_onnx(model, (X,), tmp_path / "m.onnx", strict=True)
    assert len(told) == 1
    session = ort.InferenceSession(str(written.path))
    x = torch.randn(5, 3, 40, 4)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(model(x).detach(), torch.from_numpy(found)) < 1e-5


def test_decoders_for_one_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that reads prompts of the example's length alone would be of no use."""
    monkeypatch.setattr("qfx.long_sizes.LONGEST", 0)  # the mask is as long as what is cached and what is new
    with pytest.raises(qfx.UnsupportedError, match=r"too long to trace(.|\n)*ends in .onnx"):
        decoder.capture_decoder(ZOO["llama"]()[0], last_only=True)
    model, ids = ZOO["bart"]()[0].eval(), torch.arange(14).reshape(2, 7) + 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(qfx.UnsupportedError, match=r"too long to trace(.|\n)*ends in .onnx"):
        pair.capture_decoder(model, inputs, pair.cache_sizes(model, inputs))


def test_whoever_asks_for_other_sizes_is_told() -> None:
    """An encoder beside its decoder, too."""
    for model, told in ((Windows(9), 1), (Windows(1), 0)):
        notes = other_sizes(capture_export(model, (X,)), model, (X,), {}, "Windows")
        assert sum("only the first axis" in note.reason for note in notes) == told


@pytest.mark.slow
def test_swin_is_traced_in_time(tmp_path: Path) -> None:
    """It took torch longer than anyone waits."""
    tf = pytest.importorskip("transformers")
    sizes: Any = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    model = tf.SwinModel(tf.SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 2])).eval()
    x = torch.randn(2, 3, 64, 64)
    with pytest.warns(qfx.QfxWarning, match="only the first axis"):
        written = qfx.export_onnx(model, {"pixel_values": x}, tmp_path / "m.onnx")
    assert written.inputs == ("pixel_values",)
