"""An attached model whose frozen base lies in shares on every process (FSDP2), the adapter whole on each.

torchrun --standalone --nproc-per-node 2 tests/sharded_training.py FILE lora|prefix

Started as a plain program it does the same steps with the whole base. The losses go to FILE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import small_models
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import turret


def main(file: Path, kind: str) -> None:
    sharded = "RANK" in os.environ
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if sharded else (0, 1)
    model = small_models.build("llama", "generate").requires_grad_(False)
    method = turret.LoRA(r=4, lora_alpha=8, lora_dropout=0.0) if kind == "lora" else turret.Prefix(num_virtual_tokens=4)
    turret.attach(model, method, generator=torch.Generator().manual_seed(0))
    own = [each for each in model.parameters() if each.requires_grad]
    if sharded:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=set(own))
        fully_shard(model, mesh=mesh, ignored_params=set(own))
        assert sum(isinstance(each, DTensor) for each in model.parameters()) > 10
    optimiser = torch.optim.AdamW(own, lr=1e-2)
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        mine = ids[rank::size]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        mean = loss.detach() / size
        for each in own if sharded else ():
            dist.all_reduce(each.grad.div_(size))
        if sharded:
            dist.all_reduce(mean)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(mean))
    if rank == 0:
        file.write_text(json.dumps(losses))
    if sharded:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
