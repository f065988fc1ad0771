"""A quantized model beside its original."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.data import Call
from qfx.measuring import compare, measure


def _ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 9, (batch, length), generator=torch.Generator().manual_seed(seed))


TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
CALLS: list[Call] = [((), {"input_ids": _ids(2, 5, 1)}), ((), {"input_ids": _ids(1, 3, 2)})]


def _exact(input_ids: Tensor) -> Any:
    return SimpleNamespace(logits=TABLE[input_ids])


def _coarse(input_ids: Tensor) -> Any:
    return SimpleNamespace(logits=TABLE[input_ids].round())


def test_equal_models_are_equal() -> None:
    found = compare.accuracy(_exact, _exact, CALLS, next_token=True)
    assert found.output == "logits"
    assert found.sqnr_db == math.inf
    assert found.cosine == pytest.approx(1)
    assert found.kld == pytest.approx(0, abs=1e-12)
    assert found.perplexity == found.perplexity_reference
    assert (found.change, found.change_error, found.kld_error) == (0, 0, 0)
    assert found.top1 == 1


def test_batches_of_different_sizes_weigh_as_their_tokens() -> None:
    found = compare.accuracy(_exact, _coarse, CALLS, next_token=True)
    ids = torch.cat([kwargs["input_ids"].flatten() for _, kwargs in CALLS])
    wanted, other = TABLE[ids], TABLE[ids].round()
    assert found.sqnr_db == pytest.approx(measure.sqnr_db(wanted, other))
    assert found.cosine == pytest.approx(measure.cosine(wanted, other))
    assert found.kld == pytest.approx(measure.kld(wanted, other))
    assert found.top1 == pytest.approx(measure.top1_agreement(wanted, other))
    losses = torch.cat([measure.nll(_coarse(**kwargs).logits, kwargs["input_ids"]).flatten() for _, kwargs in CALLS])
    assert found.perplexity == pytest.approx(float(losses.mean().exp()))
    assert found.perplexity_reference != found.perplexity


def test_standard_errors_are_those_of_tokens_and_of_pairs() -> None:
    found = compare.accuracy(_exact, _coarse, CALLS, next_token=True)
    ids = torch.cat([kwargs["input_ids"].flatten() for _, kwargs in CALLS])
    logs = [table.double().log_softmax(-1)[ids] for table in (TABLE, TABLE.round())]
    klds = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert found.kld_error == pytest.approx(float(klds.std()) / math.sqrt(13))
    each = [[measure.nll(run(**k).logits, k["input_ids"]).flatten() for _, k in CALLS] for run in (_exact, _coarse)]
    change = torch.cat(each[1]) - torch.cat(each[0])
    ratio = float(change.mean().exp())
    assert found.tokens == len(change) == 10
    assert found.change == pytest.approx(ratio - 1)
    assert found.perplexity is not None and found.perplexity_reference is not None
    assert found.perplexity / found.perplexity_reference == pytest.approx(ratio)
    assert found.change_error == pytest.approx(ratio * float(change.std()) / math.sqrt(10))


def test_a_single_token_has_no_standard_error() -> None:
    found = compare.accuracy(_exact, _coarse, [((), {"input_ids": _ids(1, 2, 1)})], next_token=True)
    assert found.tokens == 1 and found.change is not None and found.change_error is None


def test_the_standard_error_holds_for_other_samples() -> None:
    """Of many samples the means lie about as far from the true one as each sample's error says."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 50, generator=generator, dtype=torch.float64).square()
    told = [measure.standard_error(sample) for sample in samples]
    assert float(samples.mean(1).std()) == pytest.approx(sum(t or 0 for t in told) / len(told), rel=0.1)


@pytest.mark.parametrize("by_name", [True, False])
def test_padding_does_not_count(by_name: bool) -> None:
    """On either side; nor does a token that would be predicted from padding."""

    def exact(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return _exact(input_ids)

    def coarse(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return _coarse(input_ids)

    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    ids = _ids(2, 5, 1)
    calls: list[Call] = [((), {"input_ids": ids, "attention_mask": mask}) if by_name else ((ids, mask), {})]
    texts: list[Call] = [((), {"input_ids": ids[:1, :3]}), ((), {"input_ids": ids[1:, 2:]})]
    found = compare.accuracy(exact, coarse, calls, next_token=True)
    wanted = compare.accuracy(_exact, _coarse, texts, next_token=True)
    for field in (
        "sqnr_db",
        "cosine",
        "kld",
        "perplexity_reference",
        "perplexity",
        "top1",
        "kld_error",
        "change_error",
    ):
        assert getattr(found, field) == pytest.approx(getattr(wanted, field)), field


def test_hidden_states_have_no_perplexity() -> None:
    def encoder(input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=TABLE[input_ids], pooler_output=TABLE[0])

    found = compare.accuracy(encoder, encoder, CALLS)
    assert found.output == "last_hidden_state"
    assert (found.kld, found.perplexity, found.top1) == (None, None, None)


def test_the_main_output_is_found() -> None:
    x = torch.ones(2)
    assert compare.main_output((torch.tensor(1), {"a": x}))[1] is x
    with pytest.raises(ValueError, match="no float tensor, found str"):
        compare.main_output("text")


def test_nothing_to_compare_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch was given"):
        compare.accuracy(_exact, _exact, [])
    with pytest.raises(ValueError, match=r"one shape .* \[2, 5, 9\] and \[2, 4, 9\]"):
        compare.accuracy(_exact, lambda input_ids: _exact(input_ids[:, 1:]), CALLS)


def test_latency_takes_turns_and_keeps_the_first_call_apart() -> None:
    order: list[str] = []

    def model(name: str, first: float, later: float) -> compare.Model:
        def run() -> Tensor:
            time.sleep(later if name in order else first)
            order.append(name)
            return torch.ones(1)

        return run

    models = {"a": model("a", 0.05, 0.001), "b": model("b", 0.001, 0.01)}
    found = compare.latency(models, ((), {}), repeats=3)
    assert order == ["a", "b", *["a", "a", "b", "b"] * 3], "each turn begins with a call that is not timed"
    assert found["a"].cold >= 0.05 > found["a"].warm
    assert found["b"].warm >= 0.01 > found["a"].warm
    with pytest.raises(ValueError, match="repeats must be 1 or more, found 0"):
        compare.latency(models, ((), {}), repeats=0)


PROBE = """
import torch
from qfx.measuring.compare import peak_memory
before = peak_memory()
if before is not None:
    held = torch.ones(before + 64_000_000, dtype=torch.uint8)
    print(before, peak_memory())
"""


def test_peak_memory_is_that_of_this_process_alone() -> None:
    held = torch.ones(1_200_000_000, dtype=torch.uint8)  # what the parent holds is no part of the child's peak
    said = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    del held
    if not said:
        pytest.skip("needs a system that tells the peak memory of a process (Linux, macOS)")
    before, after = map(int, said)
    assert after >= before + 60_000_000
    assert before < 1_000_000_000  # torch for CUDA alone takes 0.6 GB
