"""LoRA layers that have their base layer's numbers, for models that read them: of convolutions and embeddings."""

from typing import Any

from .layer import LoraLayer


class WithConstants(LoraLayer):
    """Has the numbers of the base layer that torch lists as its constants, too: some models read conv.stride."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_layer")
            if name in getattr(base, "__constants__", ()):
                return getattr(base, name)
            raise
