import copy
import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_fast import ops

VOCABULARY = 96


@pytest.fixture
def keys_drawn_one_by_one(monkeypatch) -> None:
    """Layers that run as one op get the dropout keys that they would draw alone: the same masks from the same seed."""
    monkeypatch.setattr(ops, "new_dropout_keys", lambda device, n: [ops.new_dropout_key(device) for _ in range(n)])


@pytest.fixture
def group_calls(monkeypatch) -> list[int]:
    """How many layers each call of lora_group had."""
    seen, original = [], ops.lora_group
    monkeypatch.setattr(
        ops, "lora_group", lambda x, parts, **options: seen.append(len(parts)) or original(x, parts, **options)
    )
    return seen


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a tiny random Llama; the same arguments give the same model."""

    def build(dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).to(dtype)

    return build


@pytest.fixture
def llama_4bit(llama) -> Callable[..., LlamaForCausalLM]:
    """The same model with bitsandbytes' NF4 layers, as transformers leaves it after loading in 4 bits.

    Blocks of 64 divide every row: elsewhere bitsandbytes itself is wrong on CPUs.
    """

    def build(dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
        model = llama(dtype, **options)
        for name, linear in list(model.named_modules()):
            if type(linear) is not nn.Linear or name == "lm_head":
                continue
            with_bias = linear.bias is not None
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, with_bias, compute_dtype=dtype, quant_type="nf4"
            )
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
        model.is_loaded_in_4bit = model.is_quantized = True
        return model

    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def trained() -> Callable[..., nn.Module]:
    """Shifts every adapter weight by a random amount, so that the adapters do something."""

    def shake(model: nn.Module, seed: int = 1, std: float = 0.05) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.data += std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return model

    return shake


@pytest.fixture
def untouched() -> Callable:
    """`with untouched(model, folder):` fails if the block changes the model's modules, values or flags, or a file."""

    @contextmanager
    def check(model: nn.Module | None = None, folder: Path | None = None):
        before, files = _photograph(model), _hashes(folder)
        yield
        _compare(before, _photograph(model))
        assert _hashes(folder) == files

    return check


def _photograph(model: nn.Module | None) -> dict:
    modules = dict(model.named_modules()) if model else {}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())} if model else {}
    return {
        "modules": [(name, id(module), module.training) for name, module in modules.items()],
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()],
        "numbers": {name: _plain_attributes(module) for name, module in modules.items()},
        "values": {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in tensors.items()},
    }


def _plain_attributes(module: nn.Module) -> dict:
    kinds = (dict, list, str, bool, int, float)
    found = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
    return copy.deepcopy({name: _comparable(value) for name, value in found.items() if not name.startswith("_")})


def _comparable(value):
    """PeftModel.prompt_tokens is a dict of tensors."""
    if not isinstance(value, dict):
        return value
    return {key: item.tolist() if isinstance(item, torch.Tensor) else item for key, item in value.items()}


def _compare(before: dict, after: dict) -> None:
    for part in ("modules", "hooks", "numbers"):
        assert before[part] == after[part]
    assert list(before["values"]) == list(after["values"])
    for name, (identity, value, requires_grad) in before["values"].items():
        assert (identity, requires_grad) == after["values"][name][::2], name
        assert torch.equal(value.nan_to_num(), after["values"][name][1].nan_to_num()), name


def _hashes(folder: Path | None) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, pad_token_id=0)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models of random weights, written as any model on a hub is. Qwen2 has biases, GPT-2 has Conv1D layers."""
    found = {}
    for kind, build in MODELS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = build()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero as transformers makes them: nothing would depend on them
                    torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(found[kind])
    return found


@pytest.fixture
def load(folders) -> Callable[..., PreTrainedModel]:
    """`load("gpt2", bits=4)`: through from_pretrained and bitsandbytes, as users do it; bits=None: as it was saved."""

    def loaded(
        source: str | Path, bits: int | None, dtype: torch.dtype = torch.float32, **quantization
    ) -> PreTrainedModel:
        options = {}
        if bits == 4:
            defaults = {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": dtype,
            }
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **{**defaults, **quantization})
        elif bits == 8:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, **quantization)
        folder = folders.get(str(source), source)
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=dtype, local_files_only=True, **options
        )

    return loaded


@pytest.fixture
def inputs(tokens):
    """task -> the arguments of a forward with a loss."""

    def of(task):
        labels = {
            "SEQ_CLS": {"labels": torch.tensor([0, 1, 1])},
            "TOKEN_CLS": {"labels": tokens % 2},
            "QUESTION_ANS": {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])},
            "SEQ_2_SEQ_LM": {"labels": tokens[:, :6].contiguous()},
            "CAUSAL_LM": {"labels": tokens},
        }
        mask = torch.ones_like(tokens)
        mask[0, 6:] = 0
        return {"input_ids": tokens, "attention_mask": mask, **labels.get(task, {})}

    return of
