"""Names of peft.import_utils: which other libraries are installed. Nothing is imported to find out."""

from functools import cache
from importlib import import_module
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


def is_torchao_ge_v0_18_0() -> bool:
    return is_torchao_available() and Version(version("torchao")) >= Version("0.18.0")


def is_te_available() -> bool:
    return _installed("transformer_engine")


def is_te_pytorch_available() -> bool:
    return is_te_available() and find_spec("transformer_engine.pytorch") is not None


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed. `check_device`: and finds a device."""
    if not _installed("torch_xla"):
        return False
    if check_device:
        xla_model = import_module("torch_xla.core.xla_model")
        try:
            xla_model.xla_device()
        except RuntimeError:
            return False
    return True


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


_transformers = Version(version("transformers"))
is_transformers_le_4_53 = _transformers < Version("4.54.0.dev0")
is_transformers_ge_v5 = _transformers >= Version("5.0.0.dev0")
is_transformers_ge_v5_1_0 = _transformers >= Version("5.1.0")
is_transformers_ge_v5_4_0 = _transformers >= Version("5.4.0")
is_transformers_ge_v5_6_0 = _transformers >= Version("5.6.0.dev0")
is_transformers_ge_v5_13_0 = _transformers >= Version("5.13.0.dev0")
is_transformers_ge_v5_17_0 = _transformers >= Version("5.17.0")
