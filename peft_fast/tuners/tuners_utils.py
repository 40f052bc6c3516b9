"""Names of peft.tuners.tuners_utils."""

from .base import BaseTuner
from .layer import BaseTunerLayer
from .prompt_learning import BasePromptEncoder


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": the paths of the modules that have this adapter, "unmatched": all others} in `tuner.model`.

    Raises ValueError for an adapter that does not exist.
    """
    tuner._check_known([adapter_name])
    mine = {path for path, layer in tuner.layers() if adapter_name in layer.available_adapters()}
    paths = [path for path, _ in tuner.model.named_modules()]
    return {
        "matched": [path for path in paths if path in mine],
        "unmatched": [path for path in paths if path not in mine],
    }


__all__ = ["BasePromptEncoder", "BaseTuner", "BaseTunerLayer", "inspect_matched_modules"]
