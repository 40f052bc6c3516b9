"""What test_ddp.py starts twice: trains each of the named cases alone, and under DistributedDataParallel.

arguments: the folder for adapters, and the cases
"""

import sys
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from processes import join, tell
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

folder, rank, world = Path(sys.argv[1]), *join()
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {  # (what makes the model, how it is trained)
    "accumulated": (lambda: models.adapted(models.base()), {"accumulate": 2}),
    "checkpointed": (lambda: models.checkpointed(models.adapted(models.base()), False), {}),
    "checkpointed-accumulated": (lambda: models.checkpointed(models.adapted(models.base()), False), {"accumulate": 2}),
    "reentrant": (lambda: models.checkpointed(models.adapted(models.base()), True), {}),
    "uneven": (lambda: models.adapted(models.base()), {}),
    "dora": (lambda: models.adapted(models.base(), use_dora=True), {}),
    "modules-to-save": (lambda: models.adapted(models.base(), modules_to_save=["lm_head"]), {}),
    "embedding": (lambda: models.adapted(models.base(), target_modules=["embed_tokens", "q_proj"]), {}),
    "tied": (lambda: models.adapted(models.base(tie_word_embeddings=True)), {}),
    "tied-adapters": (
        lambda: models.adapted(
            models.base(tie_word_embeddings=True),
            target_modules=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
            init_lora_weights=True,
            lora_alpha=1,
        ),
        {},
    ),
    "tokens": (lambda: models.adapted(models.base(), trainable_token_indices=[3, 5]), {}),
    "accelerated": (lambda: models.accelerated(models.base()), {}),
    "experts": (lambda: models.adapted(models.mixture(), **EXPERTS), {"accumulate": 2}),
    "experts-checkpointed": (lambda: models.checkpointed(models.adapted(models.mixture(), **EXPERTS), False), {}),
    "experts-eager": (lambda: models.adapted(models.mixture("eager"), **EXPERTS), {}),
    "nf4": (lambda: models.adapted(models.own()), {}),
    "bitsandbytes": (lambda: models.adapted(models.bitsandbytes()), {}),
}


def run(name: str) -> list[float]:
    make, options = CASES[name]
    data = models.rows(16 if "accumulate" in options else 15)
    alone, model = make(), make()
    expected = models.train(alone, data)
    wrapped = DistributedDataParallel(model)
    losses = models.train(wrapped, data, rank, world, waiting=DistributedDataParallel.no_sync, **options)
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5, (losses, expected)
    models.assert_equal(models.adapter(model), models.adapter(alone), 5e-5)
    model.save_pretrained(folder / name, is_main_process=rank == 0)
    return losses


def running_out() -> float:
    """One process has one batch more than the other: torch's own context for that."""
    model = models.adapted(models.base())
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    mine = models.rows(5).split(1)[rank::world]
    with Join([wrapped]):
        for row in mine:
            optimizer.zero_grad()
            wrapped(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    tensors = models.adapter(model)
    for tensor in tensors.values():  # the process that had ended earlier has the other's last step
        other = tensor.clone()
        dist.broadcast(other, 0)
        torch.testing.assert_close(tensor, other)
    return float(sum(tensor.double().sum() for tensor in tensors.values()))


if __name__ == "__main__":
    wanted = sys.argv[2:]
    tell(folder, rank, {name: running_out() if name == "running-out" else run(name) for name in wanted})
    dist.barrier()
    dist.destroy_process_group()
