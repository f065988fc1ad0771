"""Pages of a real analysis and a real plan: names and fields are those that analysis and allocation write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qfx
from qfx.pictures import canvas, plans
from qfx.pictures.page import Picture
from tests.qfx.commands import run

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install qfx[pictures]")
transformers = pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
def test_the_page_of_a_planned_model(tmp_path: Path) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe = {"name": "r", "rules": [{"target": t, "w": "u4/g32/f16"} for t in ("linear", "embedding")],
              "allocation": {"refine": 0, "avg_bits": 4.2}}  # fmt: skip
    plan = qfx.plan(model, recipe, [{"input_ids": ids, "use_cache": False}])
    parts = plans.parts_of(plan)
    size = plan.sensitivities["allocation"]["bytes"]
    assert sum(part.bytes for part in parts) == pytest.approx(size, abs=len(parts)), "as stored, to a byte each"
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.dim() == 2}
    assert {part.fqn for part in parts} == set(weights)
    assert sum(part.elements for part in parts) == sum(p.numel() for p in weights.values())
    page = plans.allocation(plan)
    page.write(tmp_path / "plan.html")
    assert all(part.name in page.html() for part in parts)
    assert sum(isinstance(part, Picture) for part in page.parts) == 3


@pytest.mark.slow
def test_analyze_writes_a_page(tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    done = run("analyze", ASSETS / "tiny_lm", "--samples", 2, "--batch-size", 2, "--seq-len", 32,
               "--measure", 1, "--format", "u3/g32/f16", "--html", file)  # fmt: skip
    assert done.exit_code == 0, done.output
    text = file.read_text(encoding="utf-8")
    assert "<h1>Sensitivity of tiny_lm</h1>" in text and text.count("<img ") == 4
    assert "model.layers.5.self_attn.q_proj.q5" in text


def test_a_page_without_matplotlib_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*_: object) -> None:
        raise ValueError("pictures need matplotlib")

    monkeypatch.setattr(canvas, "figure", missing)
    monkeypatch.setattr(qfx.hf.hub, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = run("analyze", ASSETS / "tiny_lm", "--html", tmp_path / "out.html")
    assert done.exit_code == 2 and "pictures need matplotlib" in done.output
    assert not (tmp_path / "out.html").exists()
