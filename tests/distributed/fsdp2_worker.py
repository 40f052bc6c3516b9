"""What test_fsdp2.py starts twice: trains each of the named cases alone, and sharded by torch's fully_shard.

arguments: the folder for adapters, and the cases
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from processes import join, tell
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import peft_fast
from peft_fast import ops

folder, rank, world = Path(sys.argv[1]), *join()
FACTORS = ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")
PARTS = ("self_attn", "mlp")
ONE = ("self_attn.q_proj", "mlp.up_proj")
UNITS: dict[str, tuple[str, ...]] = {  # paths' ends of what is sharded by itself, beside the layers and the model
    "layers": (), "leaves": FACTORS, "parts": PARTS, "adapted": ONE,
    "bases": tuple(f"{name}.base_layer" for name in ONE), "norms": ("layernorm",),
}  # fmt: skip
HALF = torch.bfloat16
CASES: dict[str, tuple[Any, dict[str, Any]]] = {  # (what makes the model, how it is sharded and trained)
    "dense": (lambda: models.adapted(models.base()), {}),
    "leaves": (lambda: models.adapted(models.base()), {"units": "leaves"}),
    "parts": (lambda: models.adapted(models.base()), {"units": "parts"}),
    "adapted": (lambda: models.adapted(models.base()), {"units": "adapted"}),
    "bases": (lambda: models.adapted(models.base()), {"units": "bases"}),
    "accumulated": (lambda: models.adapted(models.base()), {"accumulate": 2}),
    "checkpointed": (lambda: models.checkpointed(models.adapted(models.base()), False), {}),
    "reentrant": (lambda: models.checkpointed(models.adapted(models.base()), True), {}),
    "norms": (lambda: models.recomputing(models.adapted(models.base())), {}),
    "norms-nf4": (lambda: models.recomputing(models.adapted(models.own())), {}),
    "norms-alone": (lambda: models.recomputing(models.adapted(models.base())), {"units": "norms"}),
    "dora": (lambda: models.adapted(models.base(), use_dora=True), {}),
    "dora-leaves-nf4": (lambda: models.adapted(models.own(), use_dora=True), {"units": "leaves"}),
    "modules-to-save": (lambda: models.adapted(models.base(), modules_to_save=["lm_head"]), {}),
    "embedding": (lambda: models.adapted(models.base(), target_modules=["embed_tokens", "q_proj"]), {}),
    "tied": (lambda: models.adapted(models.base(tie_word_embeddings=True)), {}),
    "tokens": (lambda: models.adapted(models.base(), trainable_token_indices=[3, 5]), {}),
    "accelerated": (lambda: models.accelerated(models.base()), {}),
    "nf4": (lambda: models.adapted(models.own()), {}),
    "int8": (lambda: models.adapted(models.own(8)), {}),
    "bitsandbytes": (lambda: models.adapted(models.bitsandbytes()), {}),
    "bitsandbytes-bf16": (lambda: models.adapted(models.bitsandbytes(HALF)), {}),
    "bitsandbytes-fp32": (lambda: models.adapted(models.bitsandbytes(torch.float32)), {"units": "leaves"}),
    "half-nf4": (lambda: models.adapted(models.own()), {"half": True}),
    "half-bitsandbytes": (lambda: models.adapted(models.bitsandbytes(HALF, HALF)), {"half": True}),
}


def sharded(model: Any, units: str = "layers", half: bool = False) -> Any:
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=HALF)} if half else {}
    for name, module in model.named_modules():
        if name.endswith(UNITS[units]) and units != "layers":
            fully_shard(module, **policy)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


@contextmanager
def waiting(model: Any):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


@contextmanager
def counted():
    """{op: calls} of the ops that a model's routes name."""
    calls = dict.fromkeys(("lora_mlp", "lora_group", "lora_linear"), 0)
    real = {name: getattr(ops, name) for name in calls}

    def counting(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in calls:
        setattr(ops, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(ops, name, function)


def routes(model: Any) -> dict[str, list[str]]:
    rows = peft_fast.explain(model, show=False).rows
    ends = ("layers.0.self_attn", "layers.0.mlp", "layers.0.self_attn.q_proj", "layers.0.input_layernorm")
    return {end: [row.route, row.because] for end in ends for row in rows if row.name.endswith(end)}


def run(name: str) -> dict[str, Any]:
    make, options = CASES[name]
    how = {key: options[key] for key in ("units", "half") if key in options}
    accumulate = options.get("accumulate", 1)
    data = models.rows(16 if accumulate > 1 else 15)
    alone = make()
    start = models.adapter(alone)
    expected = models.train(alone, data)
    model = sharded(make(), **how)
    assert any(type(p).__name__ == "DTensor" for p in model.parameters() if p.requires_grad)
    said = routes(model)
    with counted() as calls:
        losses = models.train(model, data, rank, world, accumulate, waiting)
    distances = [abs(a - b) for a, b in zip(losses, expected)]
    half = "half" in options  # and the other in fp32: steps drift apart
    assert distances[0] < (1e-3 if half else 1e-5), (losses, expected)
    assert max(distances) < (3e-2 if half else 1e-5), (losses, expected)
    trained = models.adapter(alone)
    assert max(float((trained[key] - start[key]).abs().max()) for key in start) > 1e-3
    if isinstance(model, peft_fast.PeftModel):
        if not half:
            models.assert_equal(models.adapter(model), trained, 5e-5)
        model.save_pretrained(folder / name, is_main_process=rank == 0)
    with torch.no_grad():
        after = float(alone.eval()(input_ids=data[:4], labels=data[:4]).loss)
    return {"losses": losses, "after": after, "routes": said, "calls": calls}


def life() -> dict[str, Any]:
    """What people do to a model between forwards, while its weights are shards."""
    data, results = models.rows(4), {}
    mine = data.tensor_split(world)[rank]
    for kind, make in {"dense": CASES["dense"][0], "nf4": CASES["nf4"][0]}.items():
        alone, model = make(), sharded(make())

        @torch.no_grad()
        def loss(one: Any) -> float:
            return float(one(input_ids=mine, labels=mine).loss)

        def same(alone: Any = alone, model: Any = model, loss: Any = loss) -> None:
            assert abs(loss(model) - loss(alone)) < 1e-5, (loss(model), loss(alone))

        same()
        with alone.disable_adapter(), model.disable_adapter():
            same()
        models.train(alone, data)
        models.train(model, data, rank, world)
        same()
        refused = {}
        attempts = {"merge_to_16bit": lambda model=model: model.merge_to_16bit()}
        if kind == "nf4":
            attempts["merge_adapter"] = lambda model=model: model.merge_adapter()
        else:
            before = loss(model)
            model.merge_adapter()
            assert abs(loss(model) - before) < 1e-5
            model.unmerge_adapter()
            same()
        for name, attempt in attempts.items():
            try:
                attempt()
            except ValueError as error:
                refused[name] = str(error)
        same()
        other = folder / "other"
        if rank == 0:
            models.adapted(models.base(), seed=9).save_pretrained(other)
        dist.barrier()
        for one in (alone, model):
            one.load_adapter(other, "default", is_trainable=True)
        same()
        models.train(model, data, rank, world)
        models.train(alone, data)
        models.assert_equal(models.adapter(model), models.adapter(alone), 5e-5)
        results[kind] = refused
    return results


def cast() -> str:
    """Codes that are stored as fp32, under mixed precision in bf16: FSDP casts them."""
    model = sharded(models.adapted(models.bitsandbytes(torch.float32)), half=True)
    try:
        model(input_ids=models.rows(2))
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    wanted = sys.argv[2:]
    extra = {"life": life, "cast": cast}
    tell(folder, rank, {name: extra[name]() if name in extra else run(name) for name in wanted})
    dist.barrier()
    dist.destroy_process_group()
