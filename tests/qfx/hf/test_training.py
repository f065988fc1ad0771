"""transformers' Trainer on prepared models and on adapters: accumulation, checkpoints, evaluation, resuming."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import qfx
from qfx.hf.training import Scheduled, StopAtNaN
from qfx.qat import quantizers
from tests import tiny
from tests.qat_nets import DATA, VOCAB, Net, both

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # of peft
    "ignore:.*pin_memory:UserWarning",
)
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"  # its name in older releases
RECIPE = both("u4/g16", "u8", "u4/g16")
RECIPE["rules"].append({"target": "tied", "w": "u4/g16"})


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, tiny.VOCAB, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def training(model: Any, folder: Path, **fields: Any) -> Trainer:
    asked: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1,
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, CHECKPOINTING: True,
        "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    callbacks = fields.pop("callbacks", [])
    arguments = TrainingArguments(str(folder), **{**asked, **fields})
    return Trainer(model, arguments, train_dataset=Text(), eval_dataset=Text(), callbacks=callbacks)


def losses(trainer: Trainer) -> list[float]:
    return [h[key] for h in trainer.state.log_history for key in ("loss", "eval_loss") if key in h]


def goes_on_exactly(make: Any, folder: Path, **fields: Any) -> Trainer:
    """Trains, and trains again from the checkpoint in the middle: every loss and tensor is the same."""
    whole = training(make(), folder, **fields)
    whole.train()
    resumed = training(make(), folder, **fields)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert len(losses(whole)) == 6 and losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[2], "the loss of the evaluation falls"
    model: Any = resumed.model
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in whole.model.state_dict().items())
    return whole


class Scored(Net):
    """The small net with the loss that the Trainer reads."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(input_ids % VOCAB)
        return {"loss": torch.nn.functional.cross_entropy(y.flatten(0, 1), input_ids.flatten() % VOCAB), "logits": y}


@pytest.mark.parametrize("scales", ["learned", pytest.param("observed", marks=pytest.mark.slow)])
def test_a_module_of_no_library_trains_and_resumes(scales: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Scored()
    plan = qfx.plan(model, both("u4/g16", "u8"), [{"input_ids": batch["ids"]} for batch in DATA])
    start = copy.deepcopy(model)

    def make() -> Any:
        return qfx.prepare_qat(copy.deepcopy(start), plan, scales=scales)

    trainer = goes_on_exactly(make, tmp_path, max_grad_norm=0.5, **{CHECKPOINTING: False})
    tensors = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    again = make()
    again.load_state_dict(tensors)
    with torch.no_grad():
        wanted, found = (
            (m.eval()(Text()[0]["input_ids"][None])["logits"]) for m in (trainer.model, qfx.convert(again))
        )
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_second_training_begins_with_nothing_frozen() -> None:
    model = qfx.prepare_qat(Scored(), both("u4/g16"), [{"input_ids": batch["ids"]} for batch in DATA])
    callback, state = Scheduled(freeze={1: "norm"}), TrainerState()
    for at in (0, 0, 1, 1):
        state.global_step = at
        callback.on_train_begin(None, state, None, model=model)
        assert model.get_parameter("norm.weight").requires_grad == (at == 0)
        if not at:
            callback.on_step_end(None, state, None)


def test_the_best_model_is_one_of_the_last_formats(tmp_path: Path) -> None:
    """Evaluations in more bits, or in float, are better: scales of theirs would be loaded into the plan's formats."""
    torch.manual_seed(0)
    model: Any = qfx.prepare_qat(Scored(), both("u4/g16"), [{"input_ids": batch["ids"]} for batch in DATA])
    scores = iter(range(9, 0, -1))
    trainer = training(
        model, tmp_path, callbacks=[Scheduled(start_after=1, bits={0: 8, 3: 4})], load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, save_steps=1, eval_steps=1, **{CHECKPOINTING: False},
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 3
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(t, saved[n]) for n, t in model.state_dict().items() if n in saved)
    with torch.no_grad():
        copied: Any = copy.deepcopy(model)
        quantized = qfx.convert(copied).get_submodule("up").weight
        assert float((quantized - model.up.weight).norm() / model.up.weight.norm()) < 0.1


@pytest.mark.slow
def test_a_schedule_is_stepped_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Scored()
    plan = qfx.plan(start, both("u4/g16", "u8"), [{"input_ids": batch["ids"]} for batch in DATA])
    callback = Scheduled(start_after=1, bits={0: 8, 1: 6, 3: 4}, freeze={3: "norm"})
    trainer = goes_on_exactly(
        lambda: qfx.prepare_qat(copy.deepcopy(start), plan), tmp_path,
        callbacks=[callback], **{CHECKPOINTING: False},
    )  # fmt: skip
    assert callback.schedule is not None and callback.schedule.steps == 4
    model: Any = trainer.model
    assert not model.norm.weight.requires_grad
    assert {str(q.format) for n, q in quantizers(model).items() if "weight" in n and "table" not in n} == {"u4/g16"}
    qfx.convert(model)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scales", "bf16"), [("tied", "learned", False), ("llama", "observed", True)])
def test_a_prepared_model_trains_resumes_and_is_saved(kind: str, scales: Any, bf16: bool, tmp_path: Path) -> None:
    data = [{"input_ids": torch.stack([Text()[i]["input_ids"] for i in (0, 1)])}]
    plan = qfx.plan(tiny.build(kind), RECIPE, data)

    def make() -> Any:
        return qfx.prepare_qat(tiny.build(kind), plan, scales=scales)

    trainer = goes_on_exactly(make, tmp_path, bf16=bf16)
    held: dict[str, Tensor] = trainer.model.state_dict()
    folder = tmp_path / "checkpoint-4"
    tensors = load_file(folder / "model.safetensors")
    missing = set(held) - set(tensors)
    assert missing == ({"lm_head.weight"} if kind == "tied" else set()), "stored once"
    assert all(torch.equal(t, held[n]) for n, t in tensors.items()) and any("log_scale" in n for n in tensors)
    for read in (tiny.CLASSES[kind].from_pretrained, qfx.load):
        with pytest.raises(
            ValueError, match=r"(?s)prepare_qat prepared: float weights.*next step.*resume_from_checkpoint"
        ):
            read(folder)
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trained = tiny.logits(model.eval())
    again = make().eval()
    assert set(again.load_state_dict(tensors, strict=False).missing_keys) == missing
    assert torch.equal(tiny.logits(again), trained)
    qfx.convert(model)
    model.save_pretrained(tmp_path / "quantized")
    assert torch.allclose(tiny.logits(tiny.CLASSES[kind].from_pretrained(tmp_path / "quantized")), trained, atol=0.1)


@pytest.mark.slow
def test_adapters_train_and_resume_and_a_packed_model_alone_is_refused(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "float")

    def packed() -> Any:
        config = qfx.QfxConfig("nf4")
        return tiny.CLASSES["llama"].from_pretrained(tmp_path / "float", quantization_config=config)

    def make() -> Any:
        torch.manual_seed(0)
        return qfx.add_adapters(packed(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    trainer = goes_on_exactly(make, tmp_path, learning_rate=2e-2)
    trained: Any = trainer.model
    loaded = qfx.load_adapters(packed(), tmp_path / "checkpoint-4")
    assert torch.equal(tiny.logits(loaded), tiny.logits(trained.eval()))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        training(packed(), tmp_path)


class Poison(TrainerCallback):  # type: ignore[misc]
    """Puts NaN into a weight after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].model.norm.weight.data[3] = torch.nan


def test_nan_stops_the_training_and_names_the_step(tmp_path: Path) -> None:
    model = tiny.build("llama")
    fields: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}
    with pytest.raises(ValueError, match=r"(?s)step 3: the gradient of 'model\.\S+' is NaN.*of 12 in all.*checkpoint"):
        training(model, tmp_path, callbacks=[Poison(), StopAtNaN()], **fields).train()
    assert torch.isfinite(model.lm_head.weight).all(), "before it reaches other weights"
    arguments, state = (
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        type("State", (), {"global_step": 7}),
    )
    arguments.fp16 = True
    with pytest.raises(ValueError, match=r"step 7: the value of 'model\.norm\.weight' is NaN or infinite, 1 of 12"):
        StopAtNaN().on_step_end(arguments, state, None, model=model)
    model.zero_grad()
    model.model.norm.weight.data.fill_(1)
    for p in itertools.islice(model.parameters(), 2):
        p.grad = torch.full_like(p, torch.inf)
    StopAtNaN().on_pre_optimizer_step(arguments, state, None, model=model)  # the scaler's own
    StopAtNaN().on_step_end(arguments, state, None, model=nn.ReLU())  # without parameters
    StopAtNaN().on_step_end(arguments, state, None, model=model)
