"""Rows of error_table.py: EVA."""

import torch
from error_tools import Row


def eva(library, tools, **options):
    return tools.model(library, init_lora_weights="eva", eva_config=library.EvaConfig(), **options)


def data(rows=20):
    return [{"input_ids": torch.randint(1, 96, (4, rows))} for _ in range(2)]


def initialised(library, model, *args, **kwargs):
    return library.initialize_lora_eva_weights(model, *args, show_progress_bar=False, **kwargs)


def searched(library, model, *args, **kwargs):
    return library.get_eva_state_dict(model, *args, show_progress_bar=False, **kwargs)


def several_active(library, tools):
    model = eva(library, tools)
    model.add_adapter("other", library.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    initialised(library, model, data())


def without_some_layers(library, tools):
    model = eva(library, tools)
    found = searched(library, model, data())
    return initialised(library, model, eva_state_dict=dict(list(found.items())[:1]))


EVA = [
    Row(
        "EVA without its config",
        lambda l, t: l.LoraConfig(init_lora_weights="eva"),
        UserWarning,
        "Using default EVA config",
        ("without eva_config", "its defaults are taken"),
    ),
    Row(
        "an EVA config without its start",
        lambda l, t: l.LoraConfig(eva_config=l.EvaConfig()),
        UserWarning,
        "ignored",
        ("eva_config is ignored",),
    ),
    Row(
        "EVA's config as something else",
        lambda l, t: l.LoraConfig(init_lora_weights="eva", eva_config=3),
        TypeError,
        "must be a",
        ("eva_config must be a EvaConfig, or a dict", "got 3"),
    ),
    Row(
        "EVA's ranks below r",
        lambda l, t: l.EvaConfig(rho=0.5),
        ValueError,
        "`rho` must be >= 1.0",
        ("rho must be a number, at least 1", "got 0.5"),
    ),
    Row(
        "EVA's similarity above 1",
        lambda l, t: l.EvaConfig(tau=2),
        ValueError,
        "`tau` must be between",
        ("tau must be a number, from 0 to 1", "got 2"),
    ),
    Row(
        "EVA in a model that has its weights already",
        eva,
        UserWarning,
        "Setting low_cpu_mem_usage=True",
        ("init_lora_weights='eva'", "low_cpu_mem_usage=True"),
    ),
    Row(
        "EVA's weights for a model without adapters",
        lambda l, t: initialised(l, t.llama(), data()),
        ValueError,
        "must be a PeftModel",
        ("must be a PeftModel", "got LlamaForCausalLM"),
    ),
    Row(
        "EVA's weights for an adapter of another start",
        lambda l, t: initialised(l, t.model(l), data()),
        ValueError,
        "can only be used with",
        ("init_lora_weights='eva'", "has True"),
    ),
    Row(
        "EVA's weights with several active adapters",
        several_active,
        ValueError,
        "single active adapter",
        ("a single active adapter", "call set_adapter"),
    ),
    Row(
        "EVA's weights without data",
        lambda l, t: initialised(l, eva(l, t)),
        ValueError,
        "dataloader is required",
        ("needs a dataloader", "eva_state_dict"),
    ),
    Row(
        "EVA's components of a model without adapters or config",
        lambda l, t: searched(l, t.llama(), data()),
        ValueError,
        "peft_config is required",
        ("peft_config is needed",),
    ),
    Row(
        "EVA on no data",
        lambda l, t: searched(l, eva(l, t), []),
        ValueError,
        "dataloader is empty",
        ("the dataloader is empty",),
    ),
    Row(
        "EVA on batches that are no dicts",
        lambda l, t: searched(l, eva(l, t), [torch.zeros(4, 20)]),
        TypeError,
        "must be a dictionary",
        ("a batch must be a dict", "prepare_model_inputs_fn"),
    ),
    Row(
        "EVA with functions for layers that are not there",
        lambda l, t: searched(l, eva(l, t), data(), prepare_layer_inputs_fn={"x": lambda x, y, z: x}),
        ValueError,
        "not found in the model",
        ("layers that EVA does not look at", "whole paths"),
    ),
    Row(
        "EVA's components of some layers alone",
        without_some_layers,
        UserWarning,
        "were initialized with init_lora_weights=True",
        ("EVA has no components for", "start plainly"),
    ),
    Row(
        "EVA with more ranks than features",
        lambda l, t: searched(l, eva(l, t, r=40), data(50)),
        ValueError,
        "n_features=64",
        ("has 64 features, fewer than the 80 ranks", "smaller r"),
    ),
]
