"""A model in train() mode, for which there are no compiled graphs."""

from __future__ import annotations

from torch import fx

from qfx.errors import explain
from qfx.trace import in_training


def training() -> ValueError:
    """The error that says so."""
    return ValueError(
        explain(
            "torch.compile(backend='qfx') is for inference, and the model is in train() mode",
            expected="model.eval()",
            found="model.train()",
            next_step="call model.eval() first; to train through quantization use QAT (qfx.prepare_qat)",
        )
    )


def drops(node: fx.Node) -> bool:
    """A dropout that is active: only a model in training has one."""
    if node.op != "call_function" or getattr(node.target, "__name__", "").partition(".")[0] != "dropout":
        return False
    share = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return in_training(node.args, node.kwargs) is True and bool(share != 0)
