"""Customize a text-to-image diffusion model: per-head products of low rank, added to a frozen model.

``add_adapter`` -> train -> ``save_adapter``; later ``load_adapter`` -> generate. Source: COMCAT (arXiv 2305.17235), Eq. 8.
"""

from .adapter import Adapter, adapters, add_adapter, get_adapter, remove_adapter, set_adapters
from .formats import load_adapter, read_adapter, save_adapter

__all__ = [
    "Adapter",
    "adapters",
    "add_adapter",
    "get_adapter",
    "load_adapter",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapters",
]
