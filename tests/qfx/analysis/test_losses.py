from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from qfx.analysis import losses
from qfx.analysis.losses import PRESETS, General, Outputs, Task, causal_lm, classification, embedding, find
from qfx.analysis.losses import question_answering as qa
from tests.seeded import randn

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])


def test_causal_lm_is_the_mean_over_the_tokens_of_each_sample() -> None:
    logits = randn(2, 4, 6)
    wanted = torch.stack([cross_entropy(logits[i, :-1], IDS[i, 1:]) for i in range(2)])
    torch.testing.assert_close(causal_lm(Outputs(logits=logits), {"input_ids": IDS}), wanted)
    torch.testing.assert_close(causal_lm(Outputs(logits=logits), IDS), wanted)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    found = causal_lm(Outputs(logits=logits), {"input_ids": IDS, "attention_mask": mask})
    torch.testing.assert_close(found[0], cross_entropy(logits[0, :2], IDS[0, 1:3]))
    torch.testing.assert_close(found[1], cross_entropy(logits[1, 1:3], IDS[1, 2:]))
    labels = IDS.clone()
    labels[1] = -100
    assert causal_lm(Outputs(logits=logits), {"input_ids": IDS, "labels": labels})[1] == 0


def test_classification_of_texts_and_of_tokens() -> None:
    labels = torch.tensor([2, 0])
    wanted = cross_entropy(randn(2, 3), labels, reduction="none")
    torch.testing.assert_close(classification(Outputs(logits=randn(2, 3)), {"labels": labels}), wanted)
    torch.testing.assert_close(classification(randn(2, 3), {"labels": labels}), wanted)
    tokens = torch.tensor([[1, -100], [0, 2]])
    each = cross_entropy(randn(2, 2, 3).flatten(0, 1), tokens.flatten(), reduction="none").view(2, 2)
    found = classification(randn(2, 2, 3), {"labels": tokens})
    torch.testing.assert_close(found, torch.stack([each[0, 0], each[1].mean()]))


def test_question_answering_leaves_out_positions_beyond_the_text() -> None:
    start, end = randn(2, 5), randn(2, 5, seed=1)
    batch = {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([2, 3])}
    found = qa(Outputs(start_logits=start, end_logits=end), batch)
    torch.testing.assert_close(
        found[0], (cross_entropy(start[0], torch.tensor(1)) + cross_entropy(end[0], torch.tensor(2))) / 2
    )
    torch.testing.assert_close(found[1], cross_entropy(end[1], torch.tensor(3)) / 2)


def test_embeddings_of_one_label_shall_be_near() -> None:
    near = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    labels, wrong = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert embedding(near, {"labels": labels}).mean() < 0.1
    assert embedding(near, {"labels": wrong}).mean() > 5
    states = near[:, None].expand(4, 3, 2).clone()
    states[:, 2] = 100  # padding
    mask = torch.tensor([[1, 1, 0]]).expand(4, 3)
    found = embedding(Outputs(last_hidden_state=states), {"labels": labels, "attention_mask": mask})
    torch.testing.assert_close(found, embedding(near, {"labels": labels}))
    with pytest.raises(ValueError, match="needs two texts of one label"):
        embedding(near, {"labels": torch.arange(4)})


@pytest.mark.parametrize("name", ["classification", "qa", "embedding"])
def test_a_task_without_labels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the task '{name}' needs labels(?s:.*)input_ids(?s:.*)next step"):
        PRESETS[name](Outputs(logits=randn(2, 3)), {"input_ids": IDS})
    with pytest.raises(ValueError, match="needs labels"):
        PRESETS[name](randn(2, 3), IDS)


def test_find() -> None:
    assert find("causal-lm") == ("causal-lm", causal_lm)
    assert find(classification) == ("classification", classification)
    with pytest.raises(ValueError, match="no loss 'causal_lm', did you mean 'causal-lm'"):
        find("causal_lm")
    with pytest.raises(ValueError, match="found int"):
        find(3)  # type: ignore[arg-type]


def test_outputs_by_name() -> None:
    outputs = Outputs(logits=IDS)
    assert outputs.logits is outputs["logits"] is IDS
    with pytest.raises(AttributeError, match="no output 'logit', did you mean 'logits'"):
        _ = outputs.logit


def test_a_scalar_is_a_mean_over_the_samples() -> None:
    values = randn(4).requires_grad_()
    total, weight = Task(lambda o, b: o.mean(), [None], ())([values], 0, 4)
    each, _ = Task(lambda o, b: o, [None], ())([values], 0, 4)
    torch.testing.assert_close(total, each)
    assert weight == 4
    named = Task(lambda o, b: o.logits.sum() + b, [torch.ones(())], ("logits", "rest"))
    assert named([values, IDS], 0, 4)[0].item() == pytest.approx(4 * (float(values.detach().sum()) + 1))


def test_the_general_gradient_has_the_distributions_covariance() -> None:
    """E[g g^T] of drawn labels is diag(p) - p p^T for one position, the Fisher information of its logits."""
    logits, total = randn(5), torch.zeros(5, 5)
    p, draws = logits.softmax(-1), 4000
    wanted = p.diag() - p[:, None] * p
    value = logits.expand(draws, 1, 5).clone().requires_grad_()
    loss, weight = General(0, is_logits=True, masks=[None])([value], 0, draws)
    (g,) = torch.autograd.grad(loss, value)
    total = g[:, 0].T @ g[:, 0] / draws
    assert weight == draws
    torch.testing.assert_close(total, wanted, atol=0.02, rtol=0.1)
    mask = torch.zeros(draws, 1, dtype=torch.bool)
    mask[:10] = True
    loss, weight = General(0, is_logits=True, masks=[mask])([value], 0, draws)
    (g,) = torch.autograd.grad(loss, value)
    assert weight == 10 and not g[10:].any() and g[:10].any()


def test_without_logits_noise_gives_the_squared_error() -> None:
    """(d . g)^2 over the squares of the output is in the mean the relative squared error of a change d."""
    value = randn(3000, 4).requires_grad_()
    loss, weight = General(0, is_logits=False, masks=[None])([value], 0, 1)
    (g,) = torch.autograd.grad(loss, value)
    change: Any = randn(3000, 4, seed=1) * 0.01
    assert weight == pytest.approx(float(value.detach().square().sum()))
    found = float(((change * g).sum(-1) ** 2).sum()) / weight
    assert found == pytest.approx(float(change.square().sum()) / weight, rel=0.15)


@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_the_loss_of_logits_in_parts_is_that_of_all(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and times what the loss is multiplied by; the logits stay as they were."""
    monkeypatch.setattr(losses, "_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    before = logits.detach().clone()
    value, count = General(0, is_logits=True, masks=[None], seed=3)([logits], 0, 2)
    (slope,) = torch.autograd.grad(2 * value, [logits])
    rows = logits.reshape(-1, 7)
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    wanted = torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6) and count == 10
    assert torch.equal(slope, torch.autograd.grad(2 * wanted, [logits])[0])
    assert torch.equal(logits, before)


def test_a_mask_of_all_positions_is_none() -> None:
    """And one that leaves some out does leave them out."""
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = [General(0, is_logits=True, masks=[m])([logits], 0, 2) for m in (mask, None)]
    assert found[0][1] == found[1][1] == 10 and torch.equal(found[0][0], found[1][0])
    mask[1, 3:] = False
    value, count = General(0, is_logits=True, masks=[mask])([logits], 0, 2)
    assert count == 8 and not torch.autograd.grad(value, [logits])[0][1, 3:].any()
