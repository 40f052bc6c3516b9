"""The base model's state dict under the names that it had before there were adapters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoint import described, some
from .inject import AnyTuner, tuner_of
from .load_result import LoadResult
from .tuners.layer import BaseTunerLayer
from .tuners.modules_to_save import ModulesToSaveWrapper
from .tuners.trainable_tokens.wrapper import TrainableTokensWrapper


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's state dict under the names that it had before there were adapters: `model` is a PeftModel.

    Values are those in use: of a merged layer with the adapters in them.
    """
    tuner = tuner_of(model)[0]
    state = tuner.model.state_dict()
    return {original: state[name] for original, name in _names_in_base(tuner, state).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load the base model's weights, under the names that it had before there were adapters, into a PeftModel.

    Raises RuntimeError, as load_state_dict does, for sizes that do not fit and, where `strict`, for keys that are
    missing or unexpected: before anything is written.
    """
    tuner = tuner_of(model)[0]
    own = tuner.model.state_dict()
    names = _names_in_base(tuner, own)
    result = LoadResult([key for key in names if key not in state_dict], [k for k in state_dict if k not in names])
    if strict and (result.missing_keys or result.unexpected_keys):
        raise RuntimeError(
            f"the state dict is not this base model's: it lacks {some(result.missing_keys) or 'nothing'}, and has "
            f"{some(result.unexpected_keys) or 'nothing'} beside; strict=False loads what fits"
        )
    values = {names[key]: value for key, value in state_dict.items() if key in names}
    wrong = [name for name, value in values.items() if isinstance(value, Tensor) and value.shape != own[name].shape]
    if wrong:
        shapes = "; ".join(f"{n}: {described(values[n])} for {described(own[n])}" for n in wrong[:3])
        raise RuntimeError(f"{len(wrong)} tensors of the state dict do not fit ({shapes}): it is another model's")
    tuner.model.load_state_dict(values, strict=False)
    return result


def _names_in_base(tuner: AnyTuner, state: Mapping[str, Any]) -> dict[str, str]:
    """{name in the base model: name in tuner.model} of what is no adapter's in `state`."""
    adapters = tuple(f"{path}.{attribute}" for path, holder in tuner.holders() for attribute in _attributes(holder))
    infixes = [
        (f"{path}.{attribute}.", f"{path}.")
        for path, module in tuner.model.named_modules()
        if (attribute := _inside(module)) is not None
    ]
    names: dict[str, str] = {}
    for name in state:
        if name.startswith(adapters):
            continue
        original = name
        for infix, plain in reversed(infixes):  # inner ones first: their paths have the outer ones' infixes in them
            if original.startswith(infix):
                original = plain + original.removeprefix(infix)
        names[original] = name
    return names


def _inside(module: nn.Module) -> str | None:
    """The attribute that has what was in the place of one of our modules."""
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, ModulesToSaveWrapper):
        return "original_module"
    return "token_adapter" if isinstance(module, TrainableTokensWrapper) else None


def _attributes(holder: Any) -> list[str]:
    """The submodules of a holder that are adapters', as beginnings of keys."""
    own = [name for name, _ in holder.named_children() if name not in ("base_layer", "original_module")]
    return [f"{name}." for name in own]
