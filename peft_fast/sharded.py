"""Weights that torch's FSDP2 (fully_shard) has spread over processes.

Between forwards a process holds its slice of each, as a DTensor; in a forward FSDP puts the whole weights in their
places, as plain tensors. So layers compute as in one process. What is done to weights between forwards is done here:
reading them for a file, writing a file's values to them, and saying beforehand what a forward will find.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# Not DTensor and other subclasses, whose products are their own. A FakeTensor stands for a plain one (memory.py).
PLAIN = (Tensor, nn.Parameter, FakeTensor)

_gathered: set[int] = set()  # ids of the weights that a forward will find whole, within `as_in_forward`


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    # torch makes none before this is imported.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_unit(module: nn.Module) -> bool:
    """Whether fully_shard was called with this very module: its weights are whole from its forward's beginning to that
    one's end, and around its own backward."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or all of a sharded one: then every process has to call it, and gets the same."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def write(own: Any, value: Tensor) -> None:
    """Copy `value`, which is whole, and on every process the same, into `own`, whole or sharded. Nothing is sent."""
    if is_sharded(own):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(own.device, own.dtype)
        value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(value)


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Raise ValueError where a weight of the module is sharded. `what`: cannot be done then."""
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"{what} needs whole weights, and those of this model are sharded (FSDP): save the adapter, which gathers "
            "it, and load it onto the base model in one process"
        )


def is_plain(weight: Any) -> bool:
    """Whether a layer's forward finds a plain tensor here, of which ops can take the values."""
    return type(weight) in PLAIN or (bool(_gathered) and id(weight) in _gathered)


@contextmanager
def as_in_forward(model: nn.Module) -> Iterator[None]:
    """Within the block is_plain says of weights that FSDP2 has sharded what it will say in a forward."""
    units = [module for module in model.modules() if is_unit(module)]
    found = {id(parameter) for unit in units for parameter in unit.parameters() if is_sharded(parameter)}
    _gathered.update(found)
    try:
        yield
    finally:
        _gathered.difference_update(found)
