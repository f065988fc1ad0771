"""What qfx.quantize, qfx.plan, qfx.load refuse: each with its message, and with the model left as it was."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import QfxWarning, Recipe, Rule, UnsupportedError
from qfx.hf import hub

Act = Callable[[nn.Module, Path], object]


class Net(nn.Module):
    """embedding, two linears; f32[batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 4)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        """ids int64 [batch, length] -> [batch, 4]."""
        x = self.table(ids)
        x = x if scale is None else x * scale
        found: Tensor = self.down(torch.relu(self.up(x))).mean(1)
        return found


class Computed(nn.Module):
    """A weight that is computed from two parameters, beside an ordinary linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(F.linear(x, self.a * self.b))
        return found


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.free = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return F.linear(self.fc(x) if x.sum() > 0 else x, self.free)


class Tied(nn.Module):
    """A head that shares the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids))
        return found


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
DATA = [IDS, IDS + 1, IDS + 2]
TYPO = Recipe(name="typo", rules=(*Recipe.parse("w8a8").rules, Rule(target="dwon", w="none", x="none")))


@dataclass
class Case:
    """What is done to which model, and what must be said."""

    name: str
    error: type[BaseException]
    message: str
    act: Act
    model: Callable[[], nn.Module] = Net


def spoiled(value: float, name: str = "up") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Net()
        with torch.no_grad():
            model.get_submodule(name).weight.view(-1)[5] = value  # type: ignore[operator]
        return model

    return build


def run(recipe: Any = "w8a8", data: Any = None, **options: Any) -> Act:
    return lambda model, _: qfx.quantize(model, recipe, data, **options)


def hurt(value: float) -> list[tuple[Tensor, Tensor]]:
    """Two batches, the second of which makes the input of `up` infinite or NaN."""
    return [(IDS, torch.ones(2, 3, 1)), (IDS, torch.full((2, 3, 1), value))]


def saved_plan(folder: Path) -> Path:
    qfx.plan(Net(), "w8a8-static", DATA, progress=False).save(folder)
    return folder


def load_plan(model: nn.Module, folder: Path) -> nn.Module:
    return qfx.quantize(model, qfx.Plan.load(folder))


def truncated_plan(model: nn.Module, folder: Path) -> object:
    file = saved_plan(folder) / "plan.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    return load_plan(model, folder)


def truncated_json(model: nn.Module, folder: Path) -> object:
    file = saved_plan(folder) / "plan.json"
    file.write_bytes(file.read_bytes()[:-30])
    return load_plan(model, folder)


def altered_plan(model: nn.Module, folder: Path) -> object:
    file = saved_plan(folder) / "plan.json"
    file.write_text(file.read_text().replace("i8/ch", "i9/ch"))
    return load_plan(model, folder)


def other_models_plan(model: nn.Module, _: Path) -> object:
    other = Net()
    nn.init.ones_(other.up.weight)
    return qfx.quantize(model, qfx.plan(other), strict=True)


def another_structures_plan(model: nn.Module, _: Path) -> object:
    plan = qfx.plan(nn.Sequential(nn.Linear(3, 3)).eval(), "w8a8", [torch.randn(2, 3)])
    plan.fingerprint = ""
    return qfx.quantize(model, plan)


def plan_without_scale(model: nn.Module, _: Path) -> object:
    plan = qfx.plan(model, "w8a8-static", DATA, progress=False)
    del plan.tensors["up/x_scale"]
    return qfx.quantize(model, plan)


def plan_with_lost_factor(model: nn.Module, _: Path) -> object:
    plan = qfx.plan(model, "w8a8-smooth", DATA, progress=False, smooth_alpha=0.5)
    plan.rewrites.append({**plan.rewrites[0], "factor": "lost"})
    return qfx.quantize(model, plan)


def plan_of_another_rewrite(model: nn.Module, _: Path) -> object:
    plan = qfx.plan(model, "w8a8", DATA)
    plan.rewrites.append({"name": "untie", "linear": "head", "table": "tables.weight", "weight": "head.weight"})
    return qfx.quantize(model, plan)


def twice(model: nn.Module, _: Path) -> object:
    return qfx.quantize(qfx.quantize(Tied().eval(), "w8a8", [IDS]), "w4a16")


def stop_midway(model: nn.Module, _: Path) -> object:
    def batches() -> Any:
        yield IDS
        raise KeyboardInterrupt

    return qfx.quantize(model, "w8a8-static", batches())


def first(name: str, *rest: str) -> str:
    """A pattern that finds all of these, in order."""
    return ".*".join((re.escape(name), *map(re.escape, rest)))


CASES = [
    Case("nan weight", ValueError, first("'up'", "not finite", "1 NaN"), run(), spoiled(float("nan"))),
    Case("inf weight", ValueError, first("'down'", "not finite", "1 Inf"), run(), spoiled(float("inf"), "down")),
    Case("nan table", ValueError, first("'table'", "not finite"), run(), spoiled(float("nan"), "table")),
    Case("nan weight with data", ValueError, "NaN", run("w8a8", DATA), spoiled(float("nan"))),
    Case("nan data", ValueError, first("batch 2", "NaN", "node: up"), run("w8a8-static", hurt(float("nan")))),
    Case("inf data", ValueError, first("batch 2", "Inf", "node: up"), run("w8a8-static", hurt(float("inf")))),
    Case("nan data, smooth", ValueError, first("batch 2", "NaN", "node: up"), run("w8a8-smooth", hurt(float("nan")))),
    Case("nan data, dynamic", ValueError, first("'up'", "NaN or Inf"), run("w8a8", hurt(float("nan"))[1:])),
    Case("empty data", ValueError, first("holds no batch", "at least one"), run("w8a8-static", [])),
    Case("used generator", ValueError, "holds no batch", run("w8a8-static", iter(()))),
    Case("path as data", ValueError, first("text or path 'a.txt'", "text_batches"), run("w8a8-static", "a.txt")),
    Case("one dict", ValueError, first("found one dict", "[batch]"), run("w8a8-static", {"ids": IDS})),
    Case("one tensor", ValueError, first("found one Tensor", "[batch]"), run("w8a8-static", IDS)),
    Case("number as data", ValueError, "iterable of batches is expected, found int", run("w8a8-static", 3)),
    Case("text batch", ValueError, first("batch 1 is text: 'hello'", "text_batches"), run("w8a8-static", ["hello"])),
    Case("wrong key", ValueError, first("batch 1", "missing a required argument: 'ids'", "forward(ids", "found: idz"),
         run("w8a8-static", [{"idz": IDS}])),
    Case("keys differ", ValueError, first("['ids']", "['ids', 'scale']"),
         run("w8a8-static", [{"ids": IDS}, {"ids": IDS, "scale": torch.ones(2, 3, 1)}])),
    Case("shape differs", ValueError, first("shape of 'ids'", "next step"), run("w8a8-static", [IDS, IDS[0]])),
    # torch 2.11 finds out when the graph runs, later ones while it is traced
    Case("the model does not run", ValueError, "does not take (a batch|batch 1) of the data.*next step",
         run("w8a8", [IDS.float()])),
    Case("id beyond the table", ValueError, first("does not take batch 2 of the data", "index out of range"),
         run("w8a8-static", [IDS, IDS + 90])),
    Case("unknown recipe", ValueError, "unknown preset 'w8a9', did you mean 'w8a8'?", run("w8a9")),
    Case("unknown part", ValueError, "unknown preset 'kv9'", run("w8a8+kv9")),
    Case("unknown key", ValueError, first("unknown key 'roundin'", "did you mean 'rounding'?"), run(roundin="mse")),
    Case("recipe with unknown key", ValueError, first("unknown key 'rule'", "'rules'"), run({"rule": []})),
    Case("bad format", ValueError, "i9", run({"rules": [{"target": "linear", "w": "i9"}]})),
    Case("recipe is a number", ValueError, "found int: 8", run(8)),
    Case("recipe file missing", FileNotFoundError, "no.yaml", run("no.yaml")),
    Case("static without data", ValueError, first("'w8a8-static' needs calibration data", "data=batches"),
         run("w8a8-static")),
    Case("rewrite without data", ValueError, "needs calibration data", run("w8a8", rewrites=("v-o",))),
    Case("target of nothing", UnsupportedError, first("'dwon'", "matches no node", "glob"),
         run(TYPO, [IDS], strict=True)),
    Case("nothing matches", ValueError, "gives no format to anything in Net",
         run({"rules": [{"target": "attention", "k": "i8/tok"}]}, [IDS])),
    Case("overrides with a plan", ValueError, "a plan is complete",
         lambda m, _: qfx.quantize(m, qfx.plan(m, "w8a8", [IDS]), rounding="mse")),
    Case("data with a plan", ValueError, "a plan is complete",
         lambda m, _: qfx.quantize(m, qfx.plan(m, "w8a8", [IDS]), DATA)),
    Case("another model's plan", ValueError, first("made for another model", "up.weight has other content"),
         other_models_plan),
    Case("another structure's plan", ValueError, first("does not fit the model", "named 0"), another_structures_plan),
    Case("plan without a scale", ValueError, first("no scale", "'up'"), plan_without_scale),
    Case("plan without a factor", ValueError, first("'smooth'", "'lost'"), plan_with_lost_factor),
    Case("plan with another's rewrite", ValueError, first("'untie'", "tables.weight"), plan_of_another_rewrite),
    Case("plan folder missing", FileNotFoundError, "no plan here", lambda m, path: load_plan(m, path / "none")),
    Case("plan truncated", ValueError, "altered or is truncated", truncated_plan),
    Case("plan.json truncated", ValueError, "truncated or no JSON", truncated_json),
    Case("plan.json altered", ValueError, "i9/ch", altered_plan),
    Case("computed weight", UnsupportedError, first("linear", "computed in the graph"), run("w8a8", [X], strict=True),
         Computed),
    Case("no graph", UnsupportedError, first("graph cannot be had", "torch.export", "not seen: free"),
         run("w8a8", [X], strict=True), Branching),
    Case("no graph, recipe that needs one", UnsupportedError, first("needs the graph of the model", "torch.export"),
         run("w8a8-static", [X]), Branching),
    Case("no inputs known", UnsupportedError, first("no example of its inputs is known", "data=[batch]"),
         run("w8a8", strict=True)),
    Case("no inputs known, rewrites", UnsupportedError, "needs the graph of the model", run(rewrites=("norm-fold",))),
    Case("quantized already", ValueError, first("is quantized already", "'table'", "float model"), twice),
    Case("compiled already", ValueError, first("the model is compiled", "module given to torch.compile"),
         lambda m, _: qfx.quantize(torch.compile(m, backend="qfx"), "w8a8", [IDS])),  # type: ignore[arg-type]
    Case("no module", ValueError, first("a model is needed", "found: list"), lambda m, _: qfx.quantize(["bert"])),  # type: ignore[arg-type]
    Case("no folder", ValueError, first("there is no folder ./bert", "hub name"), lambda m, _: qfx.quantize("./bert")),
    Case("empty model", ValueError, first("gives no format", "0 parameters"), run(), nn.Module),
    Case("model without weights", ValueError, "gives no format", run("w8a8", [X]), nn.ReLU),
    Case("weights on meta", ValueError, "meta device", run(), lambda: nn.Linear(8, 4, device="meta")),
    Case("interrupted", KeyboardInterrupt, "", stop_midway),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_refused_with_a_message_and_nothing_changed(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.train()
    next(iter(model.children()), model).eval()
    modes = [m.training for m in model.modules()]
    before = {name: t if t.is_meta else t.clone() for name, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        with pytest.raises(case.error, match=re.compile(case.message, re.DOTALL)) as caught:
            case.act(model, tmp_path)
    assert type(caught.value) is case.error
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(t.is_meta or torch.equal(after[n], t) or t.isnan().any() for n, t in before.items())


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25 and len({case.name for case in CASES}) == len(CASES)


def test_interrupted_in_the_middle_of_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Net().eval(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(self: object, *args: object) -> None:
        seen.append(self)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qfx.calibration.observers.MinMax.update", stop)
        with pytest.raises(KeyboardInterrupt):
            qfx.quantize(model, "w8a8-static", DATA)
    assert not [name for name, _ in model.named_modules() if "observer" in name]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert qfx.report(qfx.quantize(model, "w8a8-static", DATA)).rows


def loaded(path: Path) -> nn.Module:
    return qfx.load(path, Net().eval())


def write_json(path: Path, **changes: object) -> None:
    file = path / "qfx.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


SAVED: list[tuple[str, type[Exception], str, Callable[[Path], object]]] = [
    ("tensors truncated", ValueError, "altered or is truncated", lambda p: cut(p / "model.safetensors")),
    ("json truncated", ValueError, "truncated or no JSON", lambda p: cut(p / "qfx.json")),
    ("tensors missing", FileNotFoundError, "model.safetensors", lambda p: (p / "model.safetensors").unlink()),
    ("json missing", FileNotFoundError, "qfx.json is missing", lambda p: (p / "qfx.json").unlink()),
    (
        "version",
        ValueError,
        "another version.*expected: version 4 or earlier.*found: 99",
        lambda p: write_json(p, version=99),
    ),
    ("format", ValueError, "no qfx model", lambda p: write_json(p, format="other")),
    ("key", ValueError, "was altered", lambda p: write_json(p, more=1)),
    ("content", ValueError, "was altered", lambda p: write_json(p, tied={"a": "b"})),
    ("no json", ValueError, "no JSON object", lambda p: (p / "qfx.json").write_text("[]")),
    ("no text", ValueError, "truncated or no JSON", lambda p: (p / "qfx.json").write_bytes(b"\xff\xfe")),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be loaded, not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    qfx.save(qfx.quantize(Net().eval(), "w8a8", [IDS]), folder)
    loaded(folder)
    return folder


@pytest.mark.parametrize(("name", "error", "message", "spoil"), SAVED, ids=[case[0] for case in SAVED])
def test_spoiled_folders_are_refused(
    name: str, error: type[Exception], message: str, spoil: Callable[[Path], object], tmp_path: Path, sound: Path
) -> None:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "act",
    [
        lambda model: qfx.save(model, ""),
        lambda _: qfx.load(""),
        lambda _: qfx.plan(Net(), "w4a16-gptq", DATA, resume=""),
        lambda _: qfx.Plan(Recipe.parse("w8a8")).save(""),
        lambda _: qfx.Plan.load(""),
        lambda model: qfx.export_onnx(model, IDS, ""),
        lambda model: qfx.export_gguf(model, ""),
        lambda _: qfx.import_checkpoint(""),
        lambda _: qfx.onnx.load(""),
        lambda _: hub.resolve(""),
    ],
)
def test_an_empty_path_is_refused(
    act: Callable[[nn.Module], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pathlib takes it for the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the path is empty"):
        act(qfx.quantize(Net(), "w8a16", DATA))
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"qfx\.json is missing(.|\n)*next step"):
        qfx.load(tmp_path)


def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    qfx.save(qfx.quantize(Net().eval(), "w8a8", [IDS]), tmp_path)
    others: tuple[nn.Module, ...] = (Tied(), nn.Linear(3, 3))
    for other in others:
        kinds = [type(m) for m in other.modules()]
        with pytest.raises(ValueError, match=r"does not fit(.|\n)*'(up|table)' in the file and in the model"):
            qfx.load(tmp_path, other)
        assert [type(m) for m in other.modules()] == kinds
    with pytest.raises(ValueError, match="quantized already"):
        qfx.load(tmp_path, loaded(tmp_path))
    with pytest.raises(ValueError, match=r"holds no config\.json(.|\n)*qfx\.load\(folder, model\)"):
        qfx.load(tmp_path)


def test_only_quantized_models_are_saved(tmp_path: Path) -> None:
    for other in (Net(), "a text"):
        with pytest.raises(ValueError, match=r"nothing that qfx quantized(.|\n)*qfx\.quantize"):
            qfx.save(other, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recip": "w8a8"}, "unknown option 'recip', did you mean 'recipe'"),
        ({"recipe": "w8a9"}, "did you mean 'w8a8'"),
        ({"recipe": "w8a8-static"}, r"needs calibration data(.|\n)*qfx\.quantize"),
        ({"strict": "yes"}, "takes a bool"),
        ({"backend": "onx"}, "did you mean 'onnx'"),
        ({"recipe": "w8a8", "plan": qfx.Plan(Recipe.parse("w8a8"))}, "both given"),
    ],
)
def test_options_of_compile_are_refused(options: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(Net().eval(), backend="qfx", options=options)(IDS)
    torch._dynamo.reset()
