"""What test_deepspeed.py starts twice: ZeRO-3 on CPUs, through gloo. Trains alone and sharded, saves, loads.

arguments: the folder for adapters
"""

import sys
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from processes import join, tell

import peft_fast

folder, rank, world = Path(sys.argv[1]), *join()
SETTINGS = {
    "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


def engine_of(model: Any) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)[0]


def train(engine: Any, data: torch.Tensor) -> list[float]:
    losses = []
    for batch in data.split(4):
        mine = batch.tensor_split(world)[rank]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def run(name: str, make: Any) -> dict[str, Any]:
    import deepspeed

    data = models.rows(16)
    alone = make()
    expected = models.train(alone, data, momentum=0.0)
    engine = engine_of(make())
    model = engine.module
    said = {row.route for row in peft_fast.explain(model, show=False).rows}
    losses = train(engine, data)
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5, (losses, expected)
    try:
        model.save_pretrained(folder / "without-gathering", is_main_process=rank == 0)
        refused = ""
    except ValueError as error:
        refused = str(error)
    # What transformers' Trainer does: the trained weights, gathered on the main process.
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        model.save_pretrained(folder / name, state_dict=state)
        with torch.no_grad():
            after = float(alone.eval()(input_ids=data[:4], labels=data[:4]).loss)
    dist.barrier()
    # Loading: between forwards weights are elsewhere, and GatheredParameters brings them here.
    trained = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
        for parameter in trained:
            parameter.data.zero_()
        model.load_adapter(folder / name, "default", is_trainable=True)
    with deepspeed.zero.GatheredParameters(trained):
        if rank == 0:
            models.assert_equal(models.adapter(model), models.adapter(alone), 5e-5)
    engine.destroy()
    return {"losses": losses, "refused": refused, "routes": sorted(said), **({"after": after} if rank == 0 else {})}


if __name__ == "__main__":
    cases = {
        "dense": lambda: models.adapted(models.base()),
        "dora": lambda: models.adapted(models.base(), use_dora=True),
        "nf4": lambda: models.adapted(models.own()),
    }
    tell(folder, rank, {name: run(name, cases[name]) for name in sys.argv[2:]})
    dist.barrier()
