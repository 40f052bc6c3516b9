"""Tensors by name that are moved with their module and are neither trained nor saved: what ParameterDict is for
parameters."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class BufferDict(nn.Module):
    """A dict of tensors by adapter name, as buffers. `persistent`: they are in the state dict."""

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def update(self, buffers: Mapping[str, Tensor]) -> None:
        for name, tensor in buffers.items():
            self[name] = tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] = tensor
        else:
            self.register_buffer(name, tensor, persistent=self.persistent)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def pop(self, name: str) -> Tensor:
        tensor = self[name]
        del self[name]
        return tensor

    def clear(self) -> None:
        self._buffers.clear()

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Iterator[str]:
        return iter(self)

    def values(self) -> Iterator[Tensor]:
        return (self[name] for name in self)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self[name]) for name in self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.items())
