"""Trains the small model under torchrun, for tests: `qat_processes.py FOLDER OTHER`.

DDP and FSDP2, learned and observed scales: four steps each, a checkpoint after two in FOLDER; where OTHER is given, the
last two steps again from the checkpoints there, which another number of processes may have saved. Process 0 prints
losses (means over processes), scales, and how far the processes' observed averages lie apart, as JSON.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qfx
from qfx.qat import quantizers
from tests.qat_nets import DATA, both, ids, net


class Run:
    """One model in training. run: the model as it is called."""

    def __init__(self, wrap: str, scales: Any) -> None:
        self.model = qfx.prepare_qat(net(), both("u4/g16", "u8"), DATA, scales=scales)
        self.run: Any = self.model
        if wrap == "ddp":
            self.run = DistributedDataParallel(self.model)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in ("up", "down"):
                fully_shard(self.model.get_submodule(part), mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def steps(self, *numbers: int) -> list[float]:
        """Mean losses of steps, each process on its part of the batch."""
        losses = []
        for number in numbers:
            batch = ids(number).chunk(dist.get_world_size())[dist.get_rank()]
            loss = nn.functional.cross_entropy(self.run.train()(batch).flatten(0, 1), batch.roll(1, 1).flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(mean_of(loss.detach())))
        return losses

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: str) -> None:
        state = self.state()
        load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def told(self) -> dict[str, Any]:
        """Sums of the scales, and how far the processes lie apart in observed averages."""
        found = quantizers(self.model)
        whole = [getattr(q.log_scale, "full_tensor", lambda q=q: q.log_scale)().detach() for q in found.values()]
        buffers = dict(found["up.fake_quant.inputs"].named_buffers())
        seen = torch.cat([buffers[n] for n in ("low", "high")]) if "low" in buffers else torch.zeros(1)
        return {"scales": [float(t.sum()) for t in whole], "apart": float((seen - mean_of(seen)).abs().max())}


def mean_of(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def main(folder: str, other: str) -> None:
    dist.init_process_group("gloo")
    found = {}
    for wrap, scales in product(("ddp", "fsdp"), ("learned", "observed")):
        name = f"{wrap}-{scales}"
        run = Run(wrap, scales)
        losses = run.steps(0, 1)
        save(run.state(), checkpoint_id=f"{folder}/{name}")
        found[name] = {"losses": losses + run.steps(2, 3), **run.told()}
        if other:
            again = Run(wrap, scales)
            again.load(f"{other}/{name}")
            found[name]["again"] = again.steps(2, 3)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
