"""A tiny model directory, a data file, and the arguments of a short run on them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast.finetune import embedded


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random Llama of 0.1 million parameters with the byte-level tokenizer, as any model directory."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    embedded.byte_tokenizer(1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} plus one is ", "completion": f"{i + 1}, of course."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(model_folder, data_file, tmp_path) -> list[str]:
    """A run of a second, to be followed by what a test changes."""
    return [
        "--model", str(model_folder), "--data", str(data_file), "--output", str(tmp_path / "run"), "--rank", "4",
        "--steps", "4", "--batch-size", "4", "--sequence-length", "32", "--learning-rate", "1e-2",
        "--sample-tokens", "0", "--save-every", "0",
    ]  # fmt: skip
