"""Advice: the way of the decision on a small model, and that each claim says what it stands on."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qfx
from qfx.advise import Advice
from qfx.allocation.candidates import Candidate, Wanted, doubtful, proposals
from qfx.allocation.devices import Device
from qfx.format import Format
from qfx.kv.judge import judge
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")  # groups are wider than these small models

CPU = Device(
    "box", 10**9, ((1, 10e9),), {"f32": ((1, 100e9),), "w4": ((1, 90e9),), "w8": ((1, 90e9),), "w8a8": ((1, 400e9),)},
    dtype="f32", widths=(2, 4, 8), source="made up", measured=True,
)  # fmt: skip


def _data(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 128, (2, 16), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def advice() -> Advice:
    model = ZOO["llama"]()[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = qfx.advise(model, _data(), device=CPU, max_loss=2, context=64, recipes=["w8a8", "w8a8-static", "w2a16"])
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return made


@pytest.mark.slow
def test_candidates(advice: Advice) -> None:
    found = {one.recipe: one for one in advice.candidates}
    assert set(found) == {"w8a8", "w8a8-static", "w2a16"}
    assert found["w8a8"].misses == () and abs(found["w8a8"].loss or 9) < 2
    assert found["w2a16"].nbytes < found["w8a8"].nbytes and (found["w2a16"].kld or 0) > (found["w8a8"].kld or 9)
    packed = qfx.quantize(ZOO["llama"]()[0], "w8a8")
    assert found["w8a8"].nbytes == sum(t.nbytes for t in packed.state_dict().values())
    assert found["w8a8"].gain_prefill > 1 and (found["w8a8"].gain_decode or 0) > 1


@pytest.mark.slow
def test_a_quantized_cache_counts_in_memory_and_time() -> None:
    """Without data its loss is not measured, which is said; nor with texts so short that nothing is stored."""
    recipes = ["w8a8", "w8a8+kv8"]
    made = qfx.advise(ZOO["llama"]()[0], device=CPU, batch=64, context=4096, recipes=recipes)
    plain, cached = made.candidates
    assert cached.memory < plain.memory and (cached.decode or 9) < (plain.decode or 0)
    assert cached.nbytes == plain.nbytes
    assert any("w8a8+kv8: its cache is counted" in claim.text for claim in made.claims)
    assert not any("w8a8: its cache" in claim.text for claim in made.claims)
    short = qfx.advise(ZOO["llama"]()[0], _data(2), device=CPU, recipes=["kv8"])
    said = [str(claim) for claim in short.claims if claim.text.startswith("kv8: its cache is counted")]
    assert len(said) == 1 and "[predicted]" in said[0] and "no text is so long" in said[0] and "16 tokens" in said[0]
    assert short.candidates[0].loss == 0


@pytest.mark.slow
def test_the_loss_of_a_cache_is_measured() -> None:
    """Recipes that differ in nothing but their caches: the coarser one loses more, and it is what a judge says."""
    model, ids = ZOO["llama"]()[0], torch.randint(3, 128, (2, 96), generator=torch.Generator().manual_seed(1))
    coarse = {"name": "coarse", "rules": [{"target": "cache", "k": "u2/g8/f16", "v": "u2/g8/f16", "residual": 0}]}
    found = qfx.advise(model, [{"input_ids": ids}] * 2, device=CPU, context=100_000, recipes=["kv8", coarse])  # type: ignore[list-item]
    fine, rough = found.candidates
    assert 0 < (fine.kld or 0) < (rough.kld or 0) / 20
    with torch.no_grad():
        judged = judge(model, ids, qfx.QuantizedCache(model.config, "i8"), step=3)  # a 32nd of 96 tokens
    assert fine.kld == pytest.approx(judged.kld, rel=1e-3)
    said = [str(claim) for claim in found.claims]
    assert "[measured] kv8: its loss is that of its weights and its cache, read back in steps" in said
    assert [text for text in said if text.startswith("[measured] the cache in 8 bits alone costs")]


@pytest.mark.slow
def test_proposals_fulfil_what_is_wanted(advice: Advice) -> None:
    assert advice.proposals
    for proposal in advice.proposals:
        assert proposal.candidate.misses == () and (proposal.candidate.loss or 0) <= 2
        assert set(proposal.why) <= {"the fastest (predicted)", "the smallest", "the nearest to the model (measured)"}
    assert sum(len(proposal.why) for proposal in advice.proposals) == 3


@pytest.mark.slow
def test_each_claim_says_what_it_stands_on(advice: Advice) -> None:
    assert {claim.basis for claim in advice.claims} <= {"given", "counted", "measured", "predicted"}
    texts = [str(claim) for claim in advice.claims]
    half = sum(p.numel() for p in ZOO["llama"]()[0].parameters()) * 2 / 1e6
    assert texts[0] == "[given] box (made up); batch 1, prompt 128, context 64, a loss of at most 2 %"
    assert texts[1] == f"[counted] the weights have {half:,.1f} MB in 16 bits"
    assert "[given] 6 batches calibrate, 2 others judge, with the rise of perplexity" in texts
    speeds = [claim for claim in advice.claims if re.search(r"faster|slower|smaller at|takes|ms", claim.text)]
    assert speeds and {claim.basis for claim in speeds} == {"predicted"}


@pytest.mark.slow
def test_a_cache_that_is_much_of_the_traffic_is_told() -> None:
    model = ZOO["llama"]()[0]
    far = qfx.advise(model, device=CPU, recipes=["w8a8"], context=100_000)
    told = [claim for claim in far.claims if claim.text.startswith("the cache is")]
    assert len(told) == 1 and told[0].basis == "predicted"
    assert "[given] what a cache in 8 bits loses is not measured: no text" in " ".join(map(str, far.claims))
    assert "a token would be" in told[0].text and "x faster" in told[0].text
    near = qfx.advise(model, device=CPU, recipes=["w8a8"], context=1)
    assert not [claim for claim in near.claims if claim.text.startswith("the cache is")]


def test_without_data_nothing_is_said_to_be_measured() -> None:
    found = qfx.advise(ZOO["bert"]()[0], device="h100", max_loss=1, recipes=["w8a8", "w4a16-gptq"])
    assert [one.recipe for one in found.candidates] == ["w8a8"]
    assert found.candidates[0].loss is found.candidates[0].kld is found.candidates[0].decode is None
    texts = [str(claim) for claim in found.claims]
    assert "[given] no data: recipes that need it are left out, and no loss is measured" in texts
    assert "[given] w4a16-gptq needs calibration data and is left out" in texts
    assert "[given] whether the loss is allowed is not known: give data" in texts
    assert not [text for text in texts if text.startswith("[measured]")]
    assert "the nearest to the model (measured)" not in [why for p in found.proposals for why in p.why]
    assert "published peak: NVIDIA H100 datasheet" in texts[0]


@pytest.mark.slow
def test_what_cannot_be_had_is_said() -> None:
    found = qfx.advise(ZOO["llama"]()[0], device=CPU, ratio=20, recipes=["w8a8", "w8a16"])
    assert found.proposals == () and [len(one.misses) for one in found.candidates] == [1, 1]
    assert "x smaller than 16 bits, 20x is wanted" in found.candidates[0].misses[0]
    (said,) = (claim for claim in found.claims if claim.text.startswith("no recipe fulfils"))
    assert "nearest is w8a" in said.text
    cramped = Device("tiny", 1000, ((1, 1e9),), {"f32": ((1, 1e9),)}, dtype="f32")
    small = qfx.advise(ZOO["llama"]()[0], device=cramped, recipes=["w8a8"])
    assert "the device has 0.0 MB (predicted)" in small.candidates[0].misses[0]
    assert any("it does not fit the 0.0 MB" in claim.text for claim in small.claims)


def test_a_recipe_that_fails_is_told() -> None:
    broken = {"name": "rows", "rules": [{"target": "*up_proj", "w": ["i8/ch"] * 7}]}
    found = qfx.advise(ZOO["llama"]()[0], device=CPU, recipes=[broken])  # type: ignore[list-item]
    assert found.candidates == () and found.proposals == ()
    assert any(claim.text.startswith("rows cannot be had: ") for claim in found.claims)


@pytest.mark.slow
def test_json_and_show(advice: Advice) -> None:
    read = json.loads(advice.to_json())
    assert [one["recipe"] for one in read["candidates"]] == ["w8a8", "w8a8-static", "w2a16"]
    assert read["loss_of"] == "perplexity" and read["claims"][0]["basis"] == "given"
    out = io.StringIO()
    advice.show(Console(file=out, width=60))
    text = out.getvalue()
    for word in ("loss", "(measured)", "prompt", "token", "(predicted)", "of 16 bits", "propose w8a8"):
        assert word in text
    cut = [line for line in text.splitlines() if "…" in line]
    assert cut == [], "numbers are not cut in a narrow terminal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss": 0}, "max_loss is a number above 0, found 0"),
        ({"ratio": float("nan")}, "ratio is a number above 0, found nan"),
        ({"batch": 0}, "batch is an integer of 1 or more, found 0"),
        ({"context": -1}, "context is an integer of 0 or more, found -1"),
        ({"device": "h1000"}, "unknown device 'h1000', did you mean 'h100'"),
        ({"recipes": []}, "recipes holds no recipe"),
        ({"recipes": ["w9"]}, "unknown preset 'w9'"),
        ({"data": _data(1)}, "one batch cannot both calibrate and judge"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qfx.advise(ZOO["llama"]()[0], **{"device": CPU, "recipes": ["w8a8"], **options})


def _candidate(name: str, nbytes: int, seconds: float, loss: float | None) -> Candidate:
    return Candidate(name, nbytes, 2.0, 1.0, seconds, 1.0, 1.0, nbytes, loss)


def test_one_recipe_may_be_proposed_for_several_reasons() -> None:
    a, b, c = _candidate("a", 10, 1.0, 3.0), _candidate("b", 5, 2.0, 2.0), _candidate("c", 7, 1.5, 2.5)
    found = {p.candidate.recipe: p.why for p in proposals([a, b, c])}
    assert found == {"a": ("the fastest (predicted)",), "b": ("the smallest", "the least loss (measured)")}
    assert proposals([]) == []


def test_of_language_models_the_nearest_has_the_least_divergence() -> None:
    """Perplexity falls by chance: on few tokens the coarsest recipe may be the "best"."""
    coarse = replace(_candidate("coarse", 5, 1.0, -2.3), kld=0.0156)
    near = replace(_candidate("near", 10, 2.0, 0.1), kld=0.0002)
    found = {p.candidate.recipe: p.why for p in proposals([coarse, near])}
    assert found == {
        "coarse": ("the fastest (predicted)", "the smallest"),
        "near": ("the nearest to the model (measured)",),
    }


@pytest.mark.parametrize(("loss", "error", "told"), [(1.0, 0.4, False), (1.0, 0.6, True), (-0.6, 1.6, True)])
def test_a_loss_that_may_be_too_much_is_told(loss: float, error: float, told: bool) -> None:
    one = _candidate("one", 5, 1.0, None).judged(loss, error, 0.01, 2.0)
    assert one.misses == () and (one.loss, one.loss_error, one.kld) == (loss, error, 0.01)
    text = f"one: its loss of {loss:+.2f} ± {error:.2f} % may be more than 2 %: more data tells"
    assert doubtful(proposals([one]), 2.0) == ([text] if told else [])
    assert doubtful(proposals([one]), None) == []
    assert one.judged(2.1, error, None, 2.0).misses == ("a loss of 2.10 %, 2 % is allowed (measured)",)
    assert one.judged(float("nan"), None, None, 2.0).misses


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.qfx.commands import run, save
    from tests.qfx.test_cli_matrix import WORDS

    save(tmp_path / "m", LlamaForCausalLM, LlamaConfig)
    (tmp_path / "text.txt").write_text(WORDS, encoding="utf-8")
    CPU.save(tmp_path / "cpu.json")
    options = ["--device", tmp_path / "cpu.json", "--data", tmp_path / "text.txt", "--seq-len", 16, "--samples", 8]
    more = ["--recipes", "w8a8", "--max-loss", 5, "--ratio", 1.5, "--batch-size", 2, "--json", tmp_path / "a.json"]
    result = run("advise", tmp_path / "m", *options, *more)
    assert result.exit_code == 0, result.output
    assert (
        "propose w8a8: the fastest (predicted) and the smallest and the nearest to the model (measured)"
        in result.output
    )
    assert json.loads((tmp_path / "a.json").read_text())["proposals"][0]["candidate"]["recipe"] == "w8a8"
    refused = run("advise", tmp_path / "m", "--device", "h10")
    assert refused.exit_code == 2 and "unknown device 'h10'" in refused.output


def test_recipes_that_plan_bits_get_the_budget_that_is_wanted() -> None:
    from qfx.advise import _Walk
    from qfx.allocation.model_costs import costs_of
    from qfx.recipe import Recipe

    model = ZOO["llama"]()[0]
    costs = costs_of(model)

    def budgets(ratio: float | None, recipe: Recipe) -> list[tuple[str, dict[str, float]]]:
        walk = _Walk(model, costs, CPU, Wanted(None, ratio, 1, 8, 8), None, [], lambda what: None)
        found = walk._budgeted(recipe)
        return [(name, {} if one.allocation is None else one.allocation.budgets) for name, one in found]

    heads = Recipe.parse("heads")
    assert heads.allocation is not None
    usual = [("heads avg_bits=4.0", {"avg_bits": 4.0}), ("heads avg_bits=3.0", {"avg_bits": 3.0})]
    assert budgets(None, heads) == usual
    size = int(costs.weights(rest=Format("f16")) / 4)
    assert budgets(4.0, heads) == [(f"heads max_bytes={size}", {"max_bytes": size})]
    own = heads.override(allocation=heads.allocation.model_copy(update={"avg_bits": 5.0}))
    assert budgets(4.0, own) == [("heads", {"avg_bits": 5.0})]
    assert budgets(None, Recipe.parse("w8a8")) == [("w8a8", {})]
