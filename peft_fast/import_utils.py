"""Names of peft.import_utils: which other libraries are installed. Nothing is imported to find out."""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def is_bnb_available() -> bool:
    return _installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    return is_bnb_available()  # every version that runs with the torch of today has 4-bit layers


def is_gptqmodel_available() -> bool:
    return _installed("gptqmodel")


def is_optimum_available() -> bool:
    return _installed("optimum")


def is_aqlm_available() -> bool:
    return _installed("aqlm")


def is_eetq_available() -> bool:
    return _installed("eetq")


def is_hqq_available() -> bool:
    return _installed("hqq")


def is_inc_available() -> bool:
    return _installed("neural_compressor")


def is_torchao_available() -> bool:
    return _installed("torchao")


def is_te_available() -> bool:
    return _installed("transformer_engine")


def is_diffusers_available() -> bool:
    return _installed("diffusers")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch has an Intel GPU. `check_device`: and whether a tensor can be put there."""
    import torch

    if not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return False
    if check_device:
        torch.empty(1, device="xpu")
    return True


is_transformers_ge_v5 = Version(version("transformers")) >= Version("5.0.0.dev0")
