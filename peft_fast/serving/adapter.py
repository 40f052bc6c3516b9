"""A LoRA adapter as a store keeps it: read and checked against the base model, its matrices one behind the other."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_fast.adapter_file import load_peft_weights
from peft_fast.config import PeftConfig
from peft_fast.tuners.base_weight import is_dense_linear, linear_features, quantized_weight, storage
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.lora import LoraConfig
from peft_fast.tuners.lora.initialisation import changes_base
from peft_fast.tuners.matching import by_pattern

KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
PREFIX = "base_model.model."


class Piece(NamedTuple):
    """An adapter's part for one layer, in the memory of the layer's device: A [R, K] at `start`, B [N, R] behind it."""

    device: torch.device
    start: int
    R: int
    K: int
    N: int
    scale: float


class StoredAdapter:
    """`memory`: one flat tensor a device. Nothing is padded: an adapter takes R * (K + N) elements a layer."""

    def __init__(self, source: str, pieces: dict[str, Piece], memory: dict[torch.device, Tensor]) -> None:
        self.source, self.pieces, self.memory = source, pieces, memory

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.memory.values())

    def factors(self, path: str) -> tuple[Tensor, Tensor, float] | None:
        """(A [R, K], B [N, R], scale) for the layer at `path`, without a copy; None where the adapter leaves it."""
        piece = self.pieces.get(path)
        if piece is None:
            return None
        _, start, R, K, N, scale = piece
        flat = self.memory[piece.device]
        return flat[start : start + R * K].view(R, K), flat[start + R * K : start + R * (K + N)].view(N, R), scale


class ReadAdapter(NamedTuple):
    """An adapter that has been read and fits the model, and is not where it will be used yet."""

    source: str
    tensors: dict[str, tuple[Tensor, Tensor]]  # path: A, B
    pieces: dict[str, Piece]
    dtype: torch.dtype

    @property
    def sizes(self) -> dict[torch.device, int]:
        """Elements a device."""
        sizes: dict[torch.device, int] = {}
        for piece in self.pieces.values():
            sizes[piece.device] = sizes.get(piece.device, 0) + piece.R * (piece.K + piece.N)
        return sizes

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values()) * self.dtype.itemsize

    @property
    def rank(self) -> int:
        return max(piece.R for piece in self.pieces.values())

    def stored(self) -> StoredAdapter:
        """Moved to the devices of its layers."""
        memory = {device: torch.empty(size, dtype=self.dtype, device=device) for device, size in self.sizes.items()}
        adapter = StoredAdapter(self.source, self.pieces, memory)
        for path, (A, B) in self.tensors.items():
            own_A, own_B, _ = adapter.factors(path)  # type: ignore[misc]
            own_A.copy_(A)
            own_B.copy_(B)
        return adapter


def read(model: nn.Module, source: str | os.PathLike[str], dtype: torch.dtype, **hub_arguments: Any) -> ReadAdapter:
    """Read an adapter's folder, or one of the Hub, for `model`.

    Raises ValueError for files that are broken, for adapters that are no plain LoRA on linear layers, and for those of
    another base model: a layer that is not there, or of another shape; or one that is written with the adapter, as peft
    writes the head and the embeddings where the head is adapted, and is not the model's.
    """
    source = str(source)
    config = PeftConfig.from_pretrained(source, **hub_arguments)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"a store holds LoRA adapters, and {source} has one of {config.peft_type}")
    if config.layer_replication:
        raise ValueError(f"{source} replicates layers of its base model: a store's base model is shared and stays")
    if config.alora_invocation_tokens:
        raise ValueError(f"{source} has alora_invocation_tokens, and a store's adapters are there for all tokens")
    if changes_base(config.init_lora_weights):
        raise ValueError(
            f"{source} belongs to a base model that init_lora_weights={config.init_lora_weights!r} has changed, and a "
            "store's is shared and stays: write the adapter as plain LoRA, by save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    pairs = _pairs(model, source, load_peft_weights(source, "cpu", **hub_arguments))
    pieces: dict[str, Piece] = {}
    ends: dict[torch.device, int] = {}
    for path, (A, B) in pairs.items():
        device, K, N = _layer(model, source, path)
        R = by_pattern(config.rank_pattern, path, config.r)
        if A.shape != (R, K) or B.shape != (N, R):
            raise ValueError(
                f"{source} is of another base model, or its config is not its own: {path} takes A {(R, K)} and B "
                f"{(N, R)}, got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        if not all(bool(factor.to(dtype).isfinite().all()) for factor in (A, B)):
            raise ValueError(f"{source} is broken, or not for {dtype}: {path} has inf or NaN")
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        start = ends.get(device, 0)
        pieces[path] = Piece(device, start, R, K, N, alpha / (R**0.5 if config.use_rslora else R))
        ends[device] = start + R * (K + N)
    return ReadAdapter(source, pairs, pieces, dtype)


def _pairs(model: nn.Module, source: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{path of the layer: (A, B)}"""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key if key.startswith(PREFIX) else PREFIX + key)
        if match is None:
            if _is_models_own(model, key, tensor):
                continue
            if ".base_layer." in key:
                raise ValueError(f"{source} is of another base model: it has {key!r}, and the model's is not that")
            raise ValueError(
                f"{source} has {key!r}: a store holds plain LoRA on linear layers, without DoRA, biases, embeddings, "
                "trained tokens or modules_to_save. Use PeftModel and adapter_names for these"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"{source} has no weights of an adapter")
    half = next((path for path, pair in found.items() if len(pair) < 2), None)
    if half is not None:
        raise ValueError(f"{source} is broken: {half} has only one of lora_A and lora_B")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _is_models_own(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether it is a weight of the base model: peft writes the head and the embeddings where they are adapted."""
    path, _, name = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return False
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    own = getattr(base, name, None)
    return isinstance(own, nn.Parameter) and own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to(own.dtype))


def _layer(model: nn.Module, source: str, path: str) -> tuple[torch.device, int, int]:
    """(device, in features, out features) of the linear layer that an adapter is for."""
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{source} is of another base model: {type(model).__name__} has no {path}") from None
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if quantized_weight(base) is None and not is_dense_linear(base):
        raise ValueError(f"{source} adapts {path}, a {type(base).__name__}: a store holds LoRA on linear layers")
    K, N = linear_features(base)
    weight = storage(base)
    return (torch.device("cpu") if weight is None else weight.device), K, N
