"""vLLM's own loader of adapters, run on the CPU: what test_vllm.py starts, in a process of its own.

arguments: the wheel of vllm or its installed folder, a folder for what is found, and folders of adapters

vllm/lora/peft_helper.py, lora_weights.py and lora_model.py run as they are in the wheel, and of utils.py (which imports
every layer of vLLM's) the functions that read names. What else these import, a logger, pinned memory and classes named
in annotations, is not vLLM's here.
"""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zipfile import ZipFile

from safetensors.torch import save_file

OF_UTILS = {"get_lora_id", "parse_fine_tuned_lora_name", "is_base_embedding_weights"}
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
REPLACED: dict[str, dict[str, Any]] = {
    "vllm.logger": {"init_logger": lambda _: SimpleNamespace(info_once=lambda *_: None)},
    "vllm.config": {},
    "vllm.config.lora": {"LoRAConfig": object},
    "vllm.model_executor": {},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.utils": {"WeightsMapper": object},
    "vllm.utils": {},
    "vllm.utils.torch_utils": {"PIN_MEMORY": False},
}


def source(where: Path, name: str) -> str:
    if where.is_dir():
        return (where / name).read_text()
    with ZipFile(where) as wheel:
        return wheel.read(f"vllm/{name}").decode()


def package(where: Path) -> None:
    for name in ("vllm", "vllm.lora"):
        found = ModuleType(name)
        inside = name.replace(".", "/") if where.suffix == ".whl" else name.removeprefix("vllm").lstrip(".")
        found.__path__ = [str(where / inside)]  # a wheel is a zip file, which Python imports from
        sys.modules[name] = found
    for name, names in REPLACED.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(names)
    tree = ast.parse(source(where, "lora/utils.py"))
    kept = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name in OF_UTILS]
    assert {one.name for one in kept} == OF_UTILS
    utils = sys.modules["vllm.lora.utils"] = ModuleType("vllm.lora.utils")
    vars(utils)["_GLOBAL_LORA_ID"] = 0
    exec(compile(ast.Module(kept, []), "vllm/lora/utils.py", "exec"), vars(utils))  # noqa: S102


def read(folder: Path, out: Path, max_lora_rank: int) -> dict[str, Any]:
    """What vLLM says, or the weights that it adds to each layer, with their scales, in a file."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    try:
        helper = PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=max_lora_rank))
        model = LoRAModel.from_local_checkpoint(str(folder), LLAMA, helper, device="cpu")
    except ValueError as error:
        return {"error": str(error)}
    tensors = {}
    for path, layer in model.loras.items():
        layer.optimize()
        # Its layers have room for max_lora_rank and copy what is there, so that ranks have to agree in one layer only.
        delta = layer.lora_b @ layer.lora_a
        tensors[path] = (delta.t() if path.endswith("embed_tokens") else delta).contiguous()
    save_file(tensors, out)
    return {"rank": model.rank, "scale": helper.vllm_lora_scaling_factor}


if __name__ == "__main__":
    where, results, *folders = map(Path, sys.argv[1:])
    package(where)
    found = {one.name: read(one, results / f"{one.name}.safetensors", 512) for one in folders}
    (results / "found.json").write_text(json.dumps(found))
