"""A QLoRA training step of a small Llama on an NF4 base: forward, backward, AdamW; against peft + bitsandbytes.

The same layers of bitsandbytes on both sides; kernels outside the linear layers are transformers' own on both.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import Case

# (hidden, intermediate, layers, batch, tokens per row)
SHAPES = {"cpu": (512, 1408, 4, 2, 256), "cuda": (2048, 8192, 4, 2, 1024)}
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def saved_llama(folder: str, hidden: int, intermediate: int, layers: int) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, vocab_size=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapted(library: Any, folder: str, device: torch.device, compute: torch.dtype, p: float) -> Any:
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute)
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=compute, device_map={"": device}, local_files_only=True
    )
    torch.manual_seed(0)
    config = library.LoraConfig(r=16, lora_dropout=p, target_modules="all-linear", task_type="CAUSAL_LM")
    return library.get_peft_model(model, config).train()


def step(model: Any, ids: torch.Tensor, autocast: bool) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> torch.Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def cases(device: torch.device) -> Iterator[Case]:
    hidden, intermediate, layers, batch, length = SHAPES[device.type]
    ids = torch.randint(0, 2048, (batch, length), device=device)
    shape = f"llama hidden={hidden} layers={layers} tokens={batch * length} r=16 nf4"
    with tempfile.TemporaryDirectory() as folder:
        saved_llama(folder, hidden, intermediate, layers)
        for dtype in (torch.float32, torch.bfloat16):
            for p in (0.0, 0.05):
                libraries = {library.__name__: library for library in (peft, peft_fast)}
                runs = {
                    name: step(adapted(library, folder, device, dtype, p), ids, dtype == torch.bfloat16)
                    for name, library in libraries.items()
                }

                def gate(runs=runs, p=p, dtype=dtype) -> None:
                    theirs, ours = (run().item() for run in runs.values())
                    if p == 0.0:  # with dropout the masks differ by design
                        assert abs(ours - theirs) < 1e-2 * abs(theirs), (ours, theirs)

                name = f"{shape} p={p}" + (" autocast" if dtype == torch.bfloat16 else "")
                yield Case("qlora_step", name, dtype, "forward+backward+AdamW", runs, gate)
