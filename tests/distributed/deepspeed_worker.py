"""What test_deepspeed.py starts twice: ZeRO-3 on CPUs, through gloo. Trains alone and sharded, saves, loads.

arguments: the folder for adapters, and cases of CASES
"""

import os
import sys
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate_worker import with_trainer
from processes import join, tell

import peft_fast

folder = Path(sys.argv[1])
# Trainer starts DeepSpeed's own exchange, as accelerate does.
rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "trainer" in sys.argv else join()
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


def without_compiling() -> None:
    """DeepSpeed compiles a way to exchange tensors through shared memory at its first start on a CPU, for minutes, and
    waits for ever where another process was killed at that. Without it there is gloo."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


def deepspeed_on_cpu() -> None:
    """accelerate (1.15, state.py) leaves DeepSpeed out where it is told of the CPU, and without a GPU, and not told, it
    finds no backend and counts one process. Here it finds gloo; all that it does then is its own code."""
    original = PartialState._prepare_backend

    def prepare(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        return original(self, True, *args, **kwargs)

    PartialState._prepare_backend = prepare


def through_trainer(name: str) -> dict[str, Any]:
    """Trainer(deepspeed=...): trains, evaluates, writes checkpoints, resumes from one, saves the adapter."""
    deepspeed_on_cpu()
    settings = {
        "zero_optimization": SETTINGS["zero_optimization"], "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }  # fmt: skip
    return with_trainer(name, lambda: models.adapted(models.base()), deepspeed=settings, use_cpu=False)


CASES: dict[str, Any] = {
    "dense": lambda name: run(name, lambda: models.adapted(models.base())),
    "dora": lambda name: run(name, lambda: models.adapted(models.base(), use_dora=True)),
    "nf4": lambda name: run(name, lambda: models.adapted(models.own())),
    "trainer": through_trainer,
}

if __name__ == "__main__":
    without_compiling()
    tell(folder, rank, {name: CASES[name](name) for name in sys.argv[2:]})
    dist.barrier()
