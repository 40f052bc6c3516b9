from .layer import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
