"""Rows of error_table.py: parameters that are adapted though they are no layers', and models that are offloaded."""

import accelerate
import torch
import transformers
from error_tools import Row
from torch import nn

DOWN = ["experts.down_proj"]


def _moe():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    experts = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts, **heads))


def _model(library, **options):
    config = library.LoraConfig(**{"target_modules": [], "target_parameters": DOWN, **options})
    return library.get_peft_model(_moe(), config)


def _odd(library, name):
    model = nn.Sequential(nn.Linear(2, 2))
    model.own, model[0].deep = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2, 2, 2))
    return library.get_peft_model(model, library.LoraConfig(target_modules=[], target_parameters=[name]))


def _offloaded(library, tools, **options):
    base = accelerate.cpu_offload(tools.llama(), execution_device=torch.device("cpu"))
    return tools.model(library, base, **options)


PARAMETERS = [
    Row(
        "parameters, with dropout",
        lambda l, t: _model(l, lora_dropout=0.1),
        ValueError,
        "does not work with lora_dropout",
        ("lora_dropout is not for target_parameters", "leave out one of the two"),
    ),
    Row(
        "parameters, with a bias of B",
        lambda l, t: _model(l, lora_bias=True),
        ValueError,
        "does not work with lora_bias",
        ("lora_bias is not for target_parameters", "leave out one of the two"),
    ),
    Row(
        "parameters, with DoRA",
        lambda l, t: _model(l, use_dora=True),
        ValueError,
        "does not work with use_dora",
        ("use_dora is not for target_parameters", "leave out one of the two"),
    ),
    Row(
        "a parameter of four dimensions",
        lambda l, t: _odd(l, "deep"),
        ValueError,
        "only 2d and 3d are supported",
        ("LoRA adapts parameters [out, in] and [experts, out, in]", "deep is (2, 2, 2, 2)"),
    ),
    Row(
        "a parameter of the model itself",
        lambda l, t: _odd(l, "own"),
        ValueError,
        "top-level module is not supported",
        ("name a parameter of the model itself",),
    ),
    Row(
        "a parameter that is not there",
        lambda l, t: _model(l, target_parameters=["zzz"]),
        ValueError,
        "target_parameters",
        ("target_parameters ['zzz'] not found in the base model",),
    ),
    Row(
        "a parameter that is not there, beside one that is",
        lambda l, t: _model(l, target_parameters=[*DOWN, "zzz"]),
        None,
        "",
        ("target_parameters ['zzz'] match nothing",),
        RuntimeWarning,
        why="peft does not say so",
    ),
    Row(
        "experts that are adapted and trained as a whole",
        lambda l, t: _model(l, target_parameters=DOWN, modules_to_save=["experts"]),
        TypeError,
        "modules_to_save cannot be applied to modules of type",
        ("modules_to_save=['experts'] takes all of them away",),
        ValueError,
        why="it names the parameters and the module",
    ),
    Row(
        "a parameter of a layer that is adapted too",
        lambda l, t: _model(l, target_modules=["q_proj"], target_parameters=["q_proj.weight"]),
        ValueError,
        "not a valid target",
        ("is in target_modules, and its weight in target_parameters", "leave out one of them"),
    ),
    Row(
        "one of two layers that transformers has joined",
        lambda l, t: _model(l, target_modules=["up_proj"]),
        ValueError,
        "Cannot convert PEFT target(s) up_proj",
        ("gate_proj and up_proj are one parameter", "got ['up_proj'] alone"),
    ),
    Row(
        "parameters, and a state dict",
        lambda l, t: l.inject_adapter_in_model(
            l.LoraConfig(target_modules=["q_proj"], target_parameters=DOWN),
            _moe(),
            state_dict={"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 16)},
        ),
        ValueError,
        "please inject the adapter without the state_dict",
        ("target_parameters are not found in a state_dict",),
    ),
    Row(
        "a second adapter on fewer parameters of a module",
        lambda l, t: _model(l, target_parameters=["experts.gate_up_proj", *DOWN]).add_adapter(
            "other", l.LoraConfig(target_modules=[], target_parameters=DOWN)
        ),
        None,
        "",
        ("have to be on the same parameters", "['down_proj', 'gate_up_proj']"),
        ValueError,
        why="its file would have keys that a model of its own has not",
    ),
    Row(
        "DoRA on a layer that is offloaded",
        lambda l, t: _offloaded(l, t, use_dora=True)(input_ids=torch.tensor([[1, 2]])),
        RuntimeError,
        "is not on the expected device",
        ("DoRA needs the base weight", "offloaded layers cannot have it", "Leave them out"),
        ValueError,
        why="before anything is changed",
    ),
    Row(
        "saving the adapters of a model that is offloaded",
        lambda l, t: _offloaded(l, t).save_pretrained(t.folder),
        NotImplementedError,
        "meta tensor",
        silent=True,
        why="ours have values",
    ),
]
