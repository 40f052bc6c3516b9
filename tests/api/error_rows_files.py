"""Rows of error_table.py: saving and loading."""

from pathlib import Path
from typing import Any

import torch
from error_tools import CONFIG, WEIGHTS, Row, Tools, emptied, half, named, quietly, with_code, write
from safetensors import SafetensorError

SAVING = [
    Row(
        "tensors given that lack some of the adapter's",
        lambda l, t: t.model(l).save_pretrained(t.folder, state_dict={}),
        None,
        "",
        ("state_dict lacks 8 tensors of adapter 'default'", "q_proj.lora_A"),
        ValueError,
        why="peft writes a file without them",
    ),
    Row(
        "saving over a file",
        lambda l, t: t.model(l).save_pretrained(write(t.folder, "") / CONFIG),
        ValueError,
        "should be a directory",
        ("save_directory must be a directory", "got the file"),
    ),
    Row(
        "selecting adapters that are not there",
        lambda l, t: t.model(l).save_pretrained(t.folder, selected_adapters=["x"]),
        ValueError,
        "invalid `selected_adapters`",
        ("selected_adapters ['x'] do not exist", "there are ['default']"),
    ),
    Row(
        "a vocabulary of another size",
        lambda l, t: resized(t, l),
        UserWarning,
        "resized",
        ("the vocabulary was resized", "embeddings are saved"),
    ),
    Row(
        "a base model whose config is not to be found",
        lambda l, t: t.model(l, named(t.llama(), "no/where")).save_pretrained(t.folder),
        UserWarning,
        "Could not find a config",
        ("'no/where' has no config.json", "taken to be unchanged", "save_embedding_layers=True"),
    ),
    Row(
        "embeddings of a model that does not name them",
        lambda l, t: t.bare(l).save_pretrained(t.folder, save_embedding_layers=True),
        UserWarning,
        "Could not identify embedding",
        ("save_embedding_layers=True saves none", "Sequential is no transformers model", "modules_to_save"),
    ),
    Row(
        "weights that are shards",
        lambda l, t: emptied(t.model(l)).save_pretrained(t.folder),
        UserWarning,
        "invalid shape",
        ("1 tensors of the adapter are empty", "lora_A", "Gather them"),
        ValueError,
        why="the file would be worth nothing, and would take the place of a good one",
    ),
    Row(
        "the tensors of an adapter that is not there",
        lambda l, t: l.get_peft_model_state_dict(t.model(l), adapter_name="x"),
        KeyError,
        "x",
        ("adapter 'x' does not exist", "there are ['default']"),
        ValueError,
        why="a KeyError says nothing but the key",
    ),
    Row(
        "save_embedding_layers with another value",
        lambda l, t: t.model(l).save_pretrained(t.folder, save_embedding_layers="yes"),
        None,
        "",
        ("must be True, False or 'auto'", "got 'yes'"),
        ValueError,
        why="peft takes any text for True",
    ),
    Row(
        "uploading by an argument",
        lambda l, t: t.model(l).save_pretrained(t.folder, push_to_hub=True),
        None,
        "",
        ("uploads nothing", "call push_to_hub"),
        ValueError,
        why="peft swallows the argument and uploads nothing",
    ),
]


def resized(tools: Tools, library: Any) -> None:
    tools.llama().save_pretrained(tools.folder / "base")
    base = named(tools.llama(), str(tools.folder / "base"))
    quietly(lambda: base.resize_token_embeddings(99))
    tools.model(library, base).save_pretrained(tools.folder / "adapter")


ONE = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OLD = ONE.replace("lora_A", "lora_A.default")
LOADING = [
    Row(
        "another model's adapter",
        lambda l, t: t.load(l, t.rewritten(l, lambda v: {f"x.{key}": value for key, value in v.items()})),
        UserWarning,
        "missing adapter keys",
        ("the file is no adapter for this model", "none of its 8 tensors", "such as"),
        ValueError,
        why="nothing would be loaded, and the model would do what it did before",
    ),
    Row(
        "weights that are missing where there are no values yet",
        lambda l, t: t.load(l, t.rewritten(l, lambda v: v.pop(ONE) is None), low_cpu_mem_usage=True),
        UserWarning,
        "missing adapter keys",
        ("low_cpu_mem_usage needs every weight", "the file, which lacks", "q_proj.lora_A"),
        ValueError,
        why="a model with weights on the meta device cannot run",
    ),
    Row(
        "weights of another scale over an adapter that is there",
        lambda l, t: t.model(l).load_adapter(t.changed(l, lora_alpha=64), "default"),
        None,
        "",
        ("trained with lora_alpha=64", "the adapter here has 8", "Load them under another name"),
        ValueError,
        why="peft loads them, and they do something else than in training",
    ),
    Row(
        "a weight under an old key and a new one, with other values",
        lambda l, t: t.load(l, t.rewritten(l, lambda v: v.update({OLD: v[ONE] + 1}))),
        None,
        "",
        ("lora_A.default.weight twice", "with other values"),
        ValueError,
        why="peft takes the one that comes last",
    ),
    Row(
        "numbers of another kind",
        lambda l, t: t.load(l, t.rewritten(l, lambda v: {key: value.int() for key, value in v.items()})),
        None,
        "",
        ("8 tensors of the file do not fit", "torch.int32 for", "torch.float32"),
        ValueError,
        why="peft takes whole numbers for weights",
    ),
    Row(
        "a config that is none",
        lambda l, t: t.load(l, t.saved(l), config={}),
        ValueError,
        "must be a PeftConfig",
        ("config must be a PeftConfig", "got dict"),
    ),
    Row(
        "no weights in the folder",
        lambda l, t: t.load(l, without(t.saved(l))),
        Exception,
        "",
        ("Can't find 'adapter_model.safetensors' or 'adapter_model.bin'",),
        ValueError,
        why="peft goes on to ask the Hub for the folder's name: what it raises is about that name",
    ),
    Row(
        "weights that are missing",
        lambda l, t: t.load(l, t.rewritten(l, lambda v: v.pop(ONE) is None)),
        UserWarning,
        "missing adapter keys",
        ("the file lacks weights", "q_proj.lora_A.default.weight"),
    ),
    Row(
        "weights of another size",
        lambda l, t: t.load(l, t.changed(l, r=8)),
        RuntimeError,
        "size mismatch",
        ("8 tensors of the file do not fit", "(4, 64)", "another rank", "See r and target_modules"),
        ValueError,
        why="found before anything is written, as bad input is",
    ),
    Row(
        "weights of another size, let through",
        lambda l, t: t.load(
            l, t.rewritten(l, lambda v: v.update({ONE: torch.ones(4, 3)})), ignore_mismatched_sizes=True
        ),
        UserWarning,
        "ignore_mismatched_sizes",
        ("not loaded, because of their sizes", "q_proj.lora_A"),
    ),
    Row(
        "a file that is cut",
        lambda l, t: t.load(l, half(t.saved(l) / WEIGHTS)),
        SafetensorError,
        "deserializing",
        ("adapter_model.safetensors cannot be read", "damaged or truncated"),
        ValueError,
        why="ours says which file",
    ),
    Row(
        "a pickle with code in it",
        lambda l, t: t.load(l, with_code(t, l)),
        Exception,
        "Weights only load failed",
        ("cannot be read", "would run code, which is never loaded"),
        ValueError,
        why="ours says which file",
    ),
    Row(
        "weights for layers that the model does not have",
        lambda l, t: t.load(l, t.saved(l), t.llama(num_hidden_layers=1)),
        None,
        "",
        ("has weights for layers that this model or its config does not adapt", "layers.1", "another base model"),
        ValueError,
        why="peft's load_adapter returns their names; its from_pretrained says nothing, and half an adapter is loaded",
    ),
    Row(
        "weights of the base model",
        lambda l, t: t.load(
            l, t.rewritten(l, lambda v: v.update({ONE.replace("lora_A", "base_layer"): torch.ones(64, 64)}))
        ),
        None,
        "",
        ("has weights for layers", "q_proj.base_layer.weight"),
        ValueError,
        why="peft writes them into the base model, where unload() keeps them",
    ),
    Row(
        "a module trained whole that the file lacks",
        lambda l, t: t.load(
            l, t.rewritten(l, lambda v: v.pop("base_model.model.lm_head.weight") is None, modules_to_save=["lm_head"])
        ),
        KeyError,
        "lm_head",
        ("the file lacks weights", "lm_head.modules_to_save.default.weight"),
        UserWarning,
        why="as with any other weight that is missing",
    ),
    Row(
        "tensors for an adapter that is not there",
        lambda l, t: l.set_peft_model_state_dict(t.model(l), {}, "x"),
        KeyError,
        "x",
        ("adapter 'x' does not exist", "there are ['default']"),
        ValueError,
        why="a KeyError says nothing but the key",
    ),
    Row(
        "an argument that nothing knows",
        lambda l, t: t.load(l, t.saved(l), revison="main"),
        None,
        "",
        ("unknown keyword arguments ['revison']", "these are"),
        TypeError,
        why="peft ignores it",
    ),
    Row(
        "an argument that does nothing",
        lambda l, t: t.load(l, t.saved(l), device_map="auto"),
        None,
        "",
        ("['device_map'] have no effect on an adapter", "give them to the base model"),
        UserWarning,
        why="peft ignores it",
    ),
    Row(
        "a device that is not there",
        lambda l, t: l.load_peft_weights(t.saved(l), "abacus"),
        SafetensorError,
        "abacus",
        ("the device must be one of this machine", "got 'abacus'"),
        ValueError,
        why="the file is not to blame",
    ),
    Row(
        "a key_mapping that is no expression",
        lambda l, t: l.load_peft_weights(t.saved(l), "cpu", {"(": ""}),
        Exception,
        "unterminated",
        ("key_mapping must map regular expressions", "got '('"),
        ValueError,
        why="re.error says not where",
    ),
]


def without(folder: Path) -> Path:
    (folder / WEIGHTS).unlink()
    return folder


AUTO = [
    Row(
        "an Auto class called",
        lambda l, t: l.AutoPeftModel(),
        OSError,
        "designed to be instantiated",
        ("makes models of other classes", "call AutoPeftModel.from_pretrained"),
    ),
    Row(
        "AutoPeftModel for an adapter with a task",
        lambda l, t: l.AutoPeftModel.from_pretrained(t.saved(l)),
        ValueError,
        "task type",
        ("AutoPeftModel cannot load an adapter for CAUSAL_LM", "use AutoPeftModelForCausalLM"),
    ),
    Row(
        "the Auto class of another task",
        lambda l, t: l.AutoPeftModelForSeq2SeqLM.from_pretrained(t.saved(l)),
        ValueError,
        "Expected target PEFT class",
        ("AutoPeftModelForSeq2SeqLM cannot load an adapter for CAUSAL_LM", "use AutoPeftModelForCausalLM"),
    ),
    Row(
        "a class from a package that is not allowed",
        lambda l, t: l.AutoPeftModel.from_pretrained(
            t.changed(l, task_type=None, auto_mapping={"parent_library": "os", "base_model_class": "system"})
        ),
        ValueError,
        "import allowlist",
        ("asks to import 'os'", "not in the import allowlist", "import_allowlist=['os']"),
    ),
    Row(
        "an adapter that names no class",
        lambda l, t: l.AutoPeftModel.from_pretrained(t.changed(l, task_type=None, auto_mapping=None)),
        ValueError,
        "Cannot infer the auto class",
        ("neither task_type nor auto_mapping", "load the base model yourself"),
    ),
]
