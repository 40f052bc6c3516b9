"""Serving many adapters over one base model: see store.py."""

from .store import AdapterStore

__all__ = ["AdapterStore"]
