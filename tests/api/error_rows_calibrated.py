"""Rows of error_table.py: starts from sample data, and layers that are there several times."""

from error_tools import Row


def corda(library, tools, **options):
    config = {"target_modules": ["q_proj"], "init_lora_weights": "corda", "corda_config": {}, **options}
    return library.get_peft_model(tools.llama(), library.LoraConfig(**config))


def loraga(library, tools, step=lambda: None, **options):
    base = tools.llama()
    config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights="lora_ga", **options)
    return library.preprocess_loraga(base, config, step)


CALIBRATED = [
    Row(
        "CorDA without its preprocessing",
        lambda l, t: corda(l, t),
        ValueError,
        "run `preprocess_corda` first",
        ("needs what preprocess_corda leaves at the layers", "call it first"),
    ),
    Row(
        "CorDA without its config",
        lambda l, t: l.LoraConfig(init_lora_weights="corda"),
        UserWarning,
        "Using default CorDA config",
        ("without corda_config", "its defaults are taken"),
    ),
    Row(
        "a CorDA config without its start",
        lambda l, t: l.LoraConfig(corda_config={}),
        UserWarning,
        "ignored",
        ("corda_config is ignored",),
    ),
    Row(
        "LoRA-GA's preprocessing without its config",
        lambda l, t: loraga(l, t),
        ValueError,
        "lora_ga_config=LoraGAConfig",
        ("needs a config with lora_ga_config=LoraGAConfig",),
    ),
    Row(
        "LoRA-GA without a step that gives gradients",
        lambda l, t: loraga(l, t, lora_ga_config={}),
        None,
        "",
        ("gave 2 of the layers no gradient", "exclude them"),
        ValueError,
        why="peft leaves no gradients, and the adapter starts plainly, without a word",
    ),
    Row(
        "LoRA-GA without its preprocessing",
        lambda l, t: t.model(l, init_lora_weights="lora_ga", lora_ga_config={}),
        None,
        "",
        ("starts from gradients", "starts plainly"),
        UserWarning,
        why="peft starts plainly, without a word",
    ),
    Row(
        "LoRA-GA with another direction",
        lambda l, t: l.LoraGAConfig(direction="x"),
        None,
        "",
        ("direction must be one of ArBr", "got 'x'"),
        ValueError,
        why="peft fails once the adapter is made",
    ),
    Row(
        "LoRA-GA's config as something else",
        lambda l, t: l.LoraConfig(lora_ga_config=3),
        TypeError,
        "must be a",
        ("lora_ga_config must be a LoraGAConfig, or a dict", "got 3"),
    ),
]


REPLICATED = {"layer_replication": [[0, 2], [0, 2]]}

REPLICATIONS = [
    Row(
        "replicating layers of a model without a list of them",
        lambda l, t: t.bare(l, **REPLICATED),
        ValueError,
        "Could not locate the layers",
        ("needs a model with its layers in a ModuleList", "Sequential has none"),
    ),
    Row(
        "replicating layers that are not there",
        lambda l, t: t.model(l, layer_replication=[[0, 9]]),
        IndexError,
        "out of range",
        ("layer_replication [0, 9] goes beyond the 2 layers",),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "merging into replicated layers",
        lambda l, t: t.model(l, **REPLICATED).merge_adapter(),
        None,
        "",
        ("cannot be merged into replicated layers", "keep them unmerged"),
        ValueError,
        why="peft merges the adapters of all replicas into the one weight, without a word",
    ),
    Row(
        "PiSSA of replicated layers",
        lambda l, t: t.model(l, init_lora_weights="pissa", **REPLICATED),
        None,
        "",
        ("changes the base weights, which replicated layers share",),
        ValueError,
        why="peft takes the adapters of all replicas out of the one weight, without a word",
    ),
]
