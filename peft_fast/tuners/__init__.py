"""The methods. A new one is a folder here and a line in METHODS."""

from peft_fast.config import PeftConfig
from peft_fast.peft_types import PeftType

from .base import BaseTuner
from .layer import AdapterHolder, BaseTunerLayer
from .lora import LoraConfig, LoraModel
from .modules_to_save import ModulesToSaveWrapper

METHODS: dict[PeftType, tuple[type[PeftConfig], type[BaseTuner]]] = {
    PeftType.LORA: (LoraConfig, LoraModel),
}


def config_class(peft_type: PeftType | str | None) -> type[PeftConfig]:
    return _method(peft_type)[0]


def tuner_class(peft_type: PeftType | str | None) -> type[BaseTuner]:
    return _method(peft_type)[1]


def _method(peft_type: PeftType | str | None) -> tuple[type[PeftConfig], type[BaseTuner]]:
    built = [method.value for method in METHODS]
    if peft_type in built:
        return METHODS[PeftType(peft_type)]
    if peft_type in [known.value for known in PeftType]:
        raise NotImplementedError(
            f"peft_type {PeftType(peft_type).value} is not built in peft_fast yet: there is {', '.join(built)}"
        )
    raise ValueError(f"unknown peft_type {peft_type!r}: there is {', '.join(built)}")


__all__ = [
    "METHODS",
    "AdapterHolder",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraModel",
    "ModulesToSaveWrapper",
    "config_class",
    "tuner_class",
]
