"""What the rows of error_table.py are made of: models and folders for both libraries, and a row itself."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj"]


@dataclass
class Row:
    what: str
    call: Callable[[Any, Any], Any]  # of the library and Tools
    peft: (
        type[BaseException] | tuple[type[BaseException], ...] | None
    )  # what peft raises or, for a Warning, warns with; None: nothing
    theirs: str = ""  # a part of peft's message: that it is this one
    says: tuple[str, ...] = ()  # parts of ours, in this order: the rule, what was got, the way out
    ours: type[BaseException] | tuple[type[BaseException], ...] | None = None  # where it is not peft's; see why
    silent: bool = False  # ours gives nothing
    why: str = ""  # we differ


class Tools:
    """Models and folders for a row, the same ones for both libraries."""

    def __init__(self, llama: Callable[..., Any], llama_4bit: Callable[..., Any], folder: Path) -> None:
        self.llama, self.llama_4bit, self.folder = llama, llama_4bit, folder

    def model(self, library: Any, base: nn.Module | None = None, **options: Any) -> Any:
        config = library.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
        return library.get_peft_model(self.llama() if base is None else base, config)

    def saved(self, library: Any, **options: Any) -> Path:
        self.model(library, **options).save_pretrained(self.folder)
        return self.folder

    def changed(self, library: Any, **values: Any) -> Path:
        """A saved adapter with another config."""
        path = self.saved(library) / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return self.folder

    def rewritten(self, library: Any, change: Callable[[dict[str, Any]], Any], **options: Any) -> Path:
        """A saved adapter with other tensors."""
        path = self.saved(library, **options) / WEIGHTS
        values = load_file(path)
        save_file(change(values) or values, path)
        return self.folder

    def load(self, library: Any, folder: Path, base: nn.Module | None = None, **options: Any) -> Any:
        return library.PeftModel.from_pretrained(self.llama() if base is None else base, folder, **options)

    def two(self, library: Any, **options: Any) -> Any:
        model = self.model(library, **options)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=TARGETS))
        return model

    def listed(self, library: Any, **options: Any) -> Any:
        base = nn.ModuleDict({"one": nn.Linear(4, 4), "many": nn.ModuleList([nn.Linear(4, 4)])})
        return library.get_peft_model(base, library.LoraConfig(target_modules=["one"], **options))

    def bare(self, library: Any, **options: Any) -> Any:
        """LoRA on two linear layers without biases."""
        base = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        return library.get_peft_model(base, library.LoraConfig(**{"target_modules": ["0"], **options}))


def write(folder: Path, text: str, name: str = CONFIG) -> Path:
    (folder / name).write_text(text)
    return folder


def broken(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(float("nan"))
    return model


def named(base: Any, name: str) -> Any:
    base.name_or_path = name
    return base


def half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:100])
    return path.parent


def with_code(tools: Tools, library: Any) -> Path:
    (tools.saved(library) / WEIGHTS).unlink()
    torch.save({"x": nn.Linear(1, 1)}, tools.folder / "adapter_model.bin")
    return tools.folder


def quietly(call: Callable[[], Any]) -> Any:
    """What comes before the step of interest, whose own warnings are not the row's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def emptied(model: Any) -> Any:
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    parameter.data = torch.empty(0)
    return model


NOT_YET = "the option is not built yet, and so refused by name before anything else is said of it"
REFUSED_BY_NAME = (NotImplementedError, ValueError)  # the second once it is built
