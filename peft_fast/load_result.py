"""What loading an adapter's tensors gives back."""

from typing import NamedTuple


class LoadResult(NamedTuple):
    missing_keys: list[str]  # weights of the adapter, by name in the model, that the file lacks, or has of another size
    unexpected_keys: list[str]  # tensors in the file that the adapter has no place for: they are not loaded

    def __repr__(self) -> str:
        """As torch's, which code written for peft prints."""
        if not any(self):
            return "<All keys matched successfully>"
        return f"LoadResult(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"
