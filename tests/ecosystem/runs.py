"""Tiny training runs with transformers' Trainer and TRL, the same for real peft, for peft_fast, and for a model of
peft's that is accelerated."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import peft_fast

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [
    "the quick brown fox", "jumps over the lazy dog", "pack my box with five", "dozen liquor jugs.", "a stitch in time",
    "saves nine, they say", "all that glitters", "is not gold, my dear",
]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def base(folder: Path | None = None, **options: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": len(LETTERS) + len(SPECIAL), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def adapted(kind: str, model: nn.Module, **options: Any) -> Any:
    """`kind`: "peft", "peft_fast", or "accelerated": peft's model after peft_fast.accelerate."""
    import peft

    library = peft_fast if kind == "peft_fast" else peft
    torch.manual_seed(5)
    config = library.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = library.get_peft_model(model, config)
    if kind == "accelerated":
        peft_fast.accelerate(made)
    return made


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens that a model can learn a little of, with a column that no model takes."""

    def __init__(self, count: int = 16, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, len(LETTERS), (count, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "of_no_use": ids[:1]}


SETTINGS = {
    "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "learning_rate": 5e-3, "save_strategy": "no",
    "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 11, "lr_scheduler_type": "constant",
}  # fmt: skip


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), **{**SETTINGS, **options})
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(8, 4))


def losses(made: Trainer) -> list[float]:
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def distance(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b))


def tensor_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt") and p.stat().st_size)
