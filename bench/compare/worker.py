"""One library in a process of its own: imports it, then does what it reads, a command a line; answers in JSON.

    python -m bench.compare.worker '{"provider": "peft_fast", "options": {...}}'

Commands: "load" (the model, and a warm-up), "step" (one training step: forward, backward, AdamW), "memory" (of one
more), "quit". What libraries print goes to stderr: the answers have the real stdout for themselves.
"""

import importlib
import json
import sys
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .options import Options

WARM_UP = 2


def text_ids(vocabulary: int, count: int) -> torch.Tensor:
    """Bytes of Python's standard library as tokens: text that can be learned, the same for all."""
    root, data = Path(sysconfig.get_path("stdlib")), b""
    for path in sorted(root.glob("*.py")):
        data += path.read_bytes()
        if len(data) >= count:
            break
    ids = torch.frombuffer(bytearray(data[:count]), dtype=torch.uint8).long()
    return ids.repeat(count // max(1, len(ids)) + 1)[:count] % vocabulary


def with_unsloth(options: Options) -> Any:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before transformers, as it asks

    model, _ = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.seq_len, dtype=torch.bfloat16, load_in_4bit=options.bits == 4
    )
    return FastLanguageModel.get_peft_model(
        model, r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if options.gradient_checkpointing else False,
        random_state=options.seed,
    )  # fmt: skip


def with_library(name: str, options: Options, device: torch.device) -> Any:
    """As the libraries' documentation has it; peft and peft_fast draw the same adapters."""
    from . import models

    library = importlib.import_module(name)
    model = models.load(options, device)
    model.config.use_cache = False
    if options.prepare:
        model = library.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
    elif options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(options.seed)
    config = library.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = library.get_peft_model(model, config)
    if options.recompute and name == "peft_fast":
        library.set_recompute(model, norms="norms" in options.recompute, mlps="mlps" in options.recompute)
    return model


class Training:
    """A model, its optimiser and its batches."""

    def __init__(self, provider: str, options: Options) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.options = options
        model = with_unsloth(options) if provider == "unsloth" else with_library(provider, options, self.device)
        self.model = model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, weight_decay=0.0)
        shape = (options.steps + WARM_UP + 2, options.batch_size, options.seq_len)
        self.batches = text_ids(256, shape[0] * shape[1] * shape[2]).view(shape)
        self.taken = 0

    def forward(self) -> torch.Tensor:
        ids = self.batches[self.taken % len(self.batches)].to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.options.autocast else nullcontext()
        with autocast:
            return self.model(input_ids=ids, labels=ids).loss

    def step(self) -> dict[str, float]:
        """The loss, in nats per token, and the time in seconds."""
        self._wait()
        start = time.perf_counter()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        self.taken += 1
        return {"loss": loss.item(), "seconds": time.perf_counter() - start}

    def memory(self) -> dict[str, float]:
        """MiB: what a forward keeps for its backward, the most that a step takes beside what is there between steps,
        and what is there: weights, adapters, optimiser."""
        from bench.memory_peak import peak
        from bench.memory_saved import kept, total

        saved = total(kept(self.forward, self.model))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
            self.step()
            most = torch.cuda.max_memory_allocated() - resident
        else:
            most = peak(self.step)
            resident = sum(t.nbytes for t in {*self.model.parameters(), *self.model.buffers()})
            resident += sum(t.nbytes for state in self.optimizer.state.values() for t in state.values())
        return {"saved_mib": saved / 2**20, "peak_mib": most / 2**20, "resident_mib": resident / 2**20}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    given = json.loads(sys.argv[1])
    if given["provider"] != "unsloth":  # which is imported before all else
        importlib.import_module(given["provider"])
        importlib.import_module("bench.compare.models")
    training: Any = None
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            return
        if command == "load":
            training = Training(given["provider"], Options(**given["options"]))
            for _ in range(WARM_UP):
                training.step()
            answer(trained=sum(p.numel() for p in training.trained))
            continue
        answer(**(training.step() if command == "step" else training.memory()))


if __name__ == "__main__":
    main()
