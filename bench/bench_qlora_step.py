"""A training step of a small Llama, forward, backward and AdamW, against peft: QLoRA on an NF4 base of bitsandbytes
(the same layers on both sides), and LoRA on a dense one.

Under autocast the adapters are fp32 and the stream too; kernels outside the linear layers are transformers' own.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import Case

SIZES = {"cpu": (512, 1408, 4), "cuda": (2048, 8192, 4)}  # hidden, intermediate, layers
BATCHES = {"cpu": ((2, 256), (8, 128)), "cuda": ((2, 1024),)}  # rows, tokens per row
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def saved_llama(folder: str, hidden: int, intermediate: int, layers: int) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), vocab_size=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapted(library: Any, folder: str, device: torch.device, bits: int, compute: torch.dtype, p: float) -> Any:
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute) if bits == 4 else None
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
    with tempfile.TemporaryDirectory() as folder:
        saved_llama(folder, *SIZES[device.type])
        settings = itertools.product((4, 16), BATCHES[device.type], (torch.float32, torch.bfloat16), (0.0, 0.05))
        for bits, batch, dtype, p in settings:
            yield _case(device, folder, bits, batch, dtype, p)


def _case(device: torch.device, folder: str, bits: int, batch: tuple[int, int], dtype: torch.dtype, p: float) -> Case:
    hidden, _, layers = SIZES[device.type]
    ids, autocast = torch.randint(0, 2048, batch, device=device), dtype == torch.bfloat16
    runs = {
        library.__name__: step(adapted(library, folder, device, bits, dtype, p), ids, autocast)
        for library in (peft, peft_fast)
    }

    def gate() -> None:
        theirs, ours = (run().item() for run in runs.values())
        if p == 0.0:  # with dropout the masks differ by design
            assert abs(ours - theirs) < 1e-2 * abs(theirs), (ours, theirs)

    kind = "nf4" if bits == 4 else "dense"
    name = f"llama hidden={hidden} layers={layers} batch={batch[0]}x{batch[1]} r=16 {kind} p={p}"
    op = "qlora_step" if bits == 4 else "lora_step"
    return Case(op, f"{name} autocast" if autocast else name, dtype, "forward+backward+AdamW", runs, gate)
