"""Names of peft.utils.other."""

from torch import nn

from peft_fast.checkpoint import EMBEDDING_LAYER_NAMES
from peft_fast.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from peft_fast.tuners.modules_to_save import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft_fast.tuners.trainable_tokens.wrapper import TrainableTokensWrapper


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name in the parent) of the module at path `key`."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "prepare_model_for_kbit_training",
]
