"""Models that processes make from the same seeds, data, and a loop that trains them alone or as one of several."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peft_fast

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def rows(count: int = 15) -> Tensor:
    """[count, 10]. Batches of 4 leave 3 for the last: two for one process and one for the other."""
    return torch.randint(1, SIZES["vocab_size"], (count, 10), generator=torch.Generator().manual_seed(3))


def base(**options: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def mixture(implementation: str = "grouped_mm") -> Any:
    """A mixture of experts."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.set_experts_implementation(implementation)
    return model


def adapted(model: nn.Module, library: Any = peft_fast, seed: int = 5, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    return library.get_peft_model(model, library.LoraConfig(**config))


def accelerated(model: nn.Module) -> Any:
    import peft

    made = adapted(model, peft)
    peft_fast.accelerate(made)
    return made


def own(bits: int = 4) -> nn.Module:
    return peft_fast.quantize_linear_layers(base(), bits=bits)


def bitsandbytes(storage: torch.dtype = torch.uint8, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With NF4 layers whose codes are kept as `storage`, as BitsAndBytesConfig(bnb_4bit_quant_storage=...) has it."""
    from bitsandbytes.nn import Linear4bit

    model: Any = base()
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            sizes = (linear.in_features, linear.out_features, False)
            layer = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", quant_storage=storage)
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def recomputing(model: Any) -> Any:
    peft_fast.set_recompute(model, norms=True)
    return model


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def train(
    model: Any,
    data: Tensor,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    waiting: Any = None,
    momentum: float = 0.9,
) -> list[float]:
    """The loss of every step, over all processes, for batches of 4 rows that are dealt out to them.

    waiting: called with the model, a context in which gradients are not yet exchanged: for all micro-batches but the
    last of each step
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=momentum)
    losses = []
    for batch in data.split(4):
        optimizer.zero_grad()
        mine = batch.tensor_split(world)[rank]
        total = torch.zeros(())
        for number, part in enumerate(mine.tensor_split(accumulate)):
            more = number + 1 < accumulate and waiting is not None
            with waiting(model) if more else contextlib.nullcontext():
                share = len(part) / len(batch)
                loss = model(input_ids=part, labels=part).loss * share
                (loss * world).backward()  # what is exchanged is the mean of all processes' gradients
                total += loss.detach()
        optimizer.step()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def adapter(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors, by peft_fast's function or by peft's."""
    import sys

    library = peft_fast if isinstance(model, peft_fast.PeftModel) else sys.modules["peft"]
    return {
        key: value.clone()
        for key, value in library.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def assert_equal(mine: dict[str, Tensor], others: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert mine.keys() == others.keys()
    for key, value in mine.items():
        assert type(value) is Tensor, key
        torch.testing.assert_close(
            value, others[key], rtol=10 * tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )
