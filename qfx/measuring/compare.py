"""A quantized model beside its float original on the same calls: accuracy, latency, bytes, peak memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qfx.calibration.padding import Attended, attended_by, predicted, without
from qfx.data import Call
from qfx.measuring import measure
from qfx.storage.files import write_safetensors

Model = Callable[..., Any]

_PAUSE = 0.05  # seconds after which threads no longer spin


@dataclass(frozen=True)
class Accuracy:
    """How near the outputs are. `output` names the tensor compared; all but the next two are of next-token logits only.

    sqnr_db over all values; cosine: mean over rows; kld: mean over tokens, in nats; perplexity_reference, perplexity;
    top1: share of tokens with the same best guess. tokens: how many were predicted. change: perplexity over
    perplexity_reference, less 1. kld_error, change_error: standard errors, as if tokens were independent; the latter of
    the two models' losses token by token, so that what both find hard does not widen it. None of fewer than two tokens.
    """

    output: str
    sqnr_db: float
    cosine: float
    kld: float | None = None
    perplexity_reference: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    tokens: int | None = None
    kld_error: float | None = None
    change: float | None = None
    change_error: float | None = None


@dataclass(frozen=True)
class Latency:
    """cold: seconds of the first call, compilation included. warm: the median of later calls, in seconds."""

    cold: float
    warm: float


@dataclass
class _Sums:
    """Sums over batches, those of means weighted by their positions, and what each token gives, f64 [n] of a batch.

    losses: negative log likelihoods by the reference and by the other model.
    """

    signal: float = 0.0
    noise: float = 0.0
    positions: int = 0
    cosine: float = 0.0
    top1: float = 0.0
    klds: list[Tensor] = field(default_factory=list)
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@torch.no_grad()
def accuracy(reference: Model, other: Model, calls: Sequence[Call], *, next_token: bool = False) -> Accuracy:
    """Run both on each call and compare their main output (see `main_output`).

    next_token: the output is logits [B, T, V] of the next token of `input_ids` [B, T]. Positions that a call's
    attention mask leaves out do not count (see `qfx.calibration.padding`). Raises ValueError where the outputs differ
    in shape or there is no call.
    """
    if not calls:
        raise ValueError("there is nothing to compare on: no batch was given")
    sums, name = _Sums(), ""
    for args, kwargs in calls:
        name, wanted = main_output(reference(*args, **kwargs))
        _, found = main_output(other(*args, **kwargs))
        kept = attended_by(_module(reference), args, kwargs)
        _add(sums, without(wanted, kept), without(found, kept))
        if next_token:
            _add_next_token(sums, wanted, found, kwargs["input_ids"] if "input_ids" in kwargs else args[0], kept)
    decibel = measure.decibel(sums.signal, sums.noise)
    return Accuracy(name, decibel, sums.cosine / sums.positions, **_of_distributions(sums), **_of_losses(sums))


def _of_distributions(sums: _Sums) -> dict[str, Any]:
    """What the distributions of next tokens tell; nothing of other outputs."""
    if not sums.klds:
        return {}
    klds = torch.cat(sums.klds)
    error = measure.standard_error(klds)
    return {"kld": float(klds.mean()), "kld_error": error, "top1": sums.top1 / sums.positions}


def _of_losses(sums: _Sums) -> dict[str, Any]:
    """What the losses of the tokens tell that were predicted; nothing where none was."""
    if not sums.losses:
        return {}
    reference, other = (torch.cat(parts) for parts in zip(*sums.losses, strict=True))
    ratio, error = measure.exp(float((other - reference).mean())), measure.standard_error(other - reference)
    return {
        "perplexity_reference": measure.exp(float(reference.mean())),
        "perplexity": measure.exp(float(other.mean())),
        "tokens": len(reference),
        "change": ratio - 1,
        "change_error": None if error is None else ratio * error,
    }


def _add(sums: _Sums, wanted: Tensor, found: Tensor) -> None:
    signal, noise = measure.energies(wanted, found)
    rows = wanted.numel() // wanted.shape[-1]
    sums.signal, sums.noise, sums.positions = sums.signal + signal, sums.noise + noise, sums.positions + rows
    sums.cosine += measure.cosine(wanted, found) * rows


def _add_next_token(sums: _Sums, wanted: Tensor, found: Tensor, ids: Tensor, kept: Attended) -> None:
    mask = kept.get(tuple(ids.shape), torch.ones_like(ids))
    tokens = without(wanted, kept), without(found, kept)
    sums.klds.append(measure.divergences(*tokens))
    sums.top1 += measure.top1_agreement(*tokens) * int(mask.sum())
    scored = predicted(mask.to(wanted.device))
    if bool(scored.any()):
        sums.losses.append((measure.nll(wanted, ids)[scored], measure.nll(found, ids)[scored]))


def _module(model: Model) -> Any:
    """The module whose forward tells the names of a call's arguments, also where torch.compile wraps it."""
    found = getattr(model, "_orig_mod", model)
    return found if hasattr(found, "forward") else SimpleNamespace(forward=found)


def main_output(output: Any) -> tuple[str, Tensor]:
    """The tensor by which models are compared: `logits`, else `last_hidden_state`, else the first float tensor.

    Raises ValueError where there is none.
    """
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return name, value
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
            return "output", leaf
    raise ValueError(f"the model's output holds no float tensor, found {type(output).__name__}")


@torch.no_grad()
def latency(models: Mapping[str, Model], call: Call, *, repeats: int = 20) -> dict[str, Latency]:
    """Time models on one call: each model's first call, then `repeats` rounds in which each is timed once, in turn.

    The turns let a slow moment of the machine hit all of them. Threads of one model spin for a while after its call and
    would slow the next one down, so each turn begins with a pause and a call that is not timed. Raises ValueError for
    repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, found {repeats}")
    cold = {name: seconds_of(model, call) for name, model in models.items()}
    warm: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            time.sleep(_PAUSE)
            seconds_of(model, call)
            warm[name].append(seconds_of(model, call))
    return {name: Latency(cold[name], statistics.median(warm[name])) for name in models}


def seconds_of(model: Model, call: Call) -> float:
    """Seconds of one call, a GPU's work included."""
    args, kwargs = call
    _wait(call)
    started = time.perf_counter()
    output = model(*args, **kwargs)
    _wait(output)
    return time.perf_counter() - started


def _wait(values: Any) -> None:
    """Let a GPU finish, where one is used."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(values)):
        torch.cuda.synchronize()


def peak_memory() -> int | None:
    """Most bytes of memory that this process held so far; None where the system does not say.

    From the kernel where it can be: ru_maxrss of a child process starts at its parent's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if _is_mac() else 1024)


def peak_of(folder: Path, batch: Mapping[str, Tensor], kind: str, baseline: str, device: str) -> int | None:
    """Peak memory of a new process that loads the model of a folder ("float" or "quantized") and calls it once.

    baseline: how a float model runs, "eager" or "inductor". Raises RuntimeError where that process fails.
    """
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "batch.safetensors"
        write_safetensors(inputs, batch)
        command = [sys.executable, "-m", "qfx.cli.peak", str(folder), str(inputs), kind, baseline, device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def _is_mac() -> bool:
    return sys.platform == "darwin"
