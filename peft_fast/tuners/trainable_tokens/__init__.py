"""Single tokens' rows of an embedding: as a method, and as what other methods train beside their adapters."""

from typing import TYPE_CHECKING, Any

from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer

if TYPE_CHECKING:
    from .model import TrainableTokensModel

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]


def __getattr__(name: str) -> Any:
    if name == "TrainableTokensModel":  # BaseTuner, which it is one of, imports this package for the others
        from .model import TrainableTokensModel

        return TrainableTokensModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
