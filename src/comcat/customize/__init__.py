"""Customize a text-to-image diffusion model: per-head products of low rank, added to a frozen model.

``add_adapter`` -> train -> ``save_adapter``; later ``load_adapter`` -> ``generate``. Source: COMCAT (arXiv 2305.17235),
Eq. 8.
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .adapter import Adapter, adapters, add_adapter, get_adapter, remove_adapter, set_adapters
    from .config import CustomizeConfig
    from .convert import Conversion, export_lora
    from .formats import load_adapter, read_adapter, save_adapter
    from .generate import generate
    from .lora_import import import_lora
    from .opening import open_pipeline
    from .train import train

__all__ = [
    "Adapter",
    "Conversion",
    "CustomizeConfig",
    "adapters",
    "add_adapter",
    "export_lora",
    "generate",
    "get_adapter",
    "import_lora",
    "load_adapter",
    "open_pipeline",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapters",
    "train",
]

# Where they live; they are imported on first use, PyTorch and transformers with them.
_lazy.package(
    __name__,
    {
        "Adapter": "adapter",
        "Conversion": "convert",
        "CustomizeConfig": "config",
        "adapters": "adapter",
        "add_adapter": "adapter",
        "export_lora": "convert",
        "generate": "generate",
        "get_adapter": "adapter",
        "import_lora": "lora_import",
        "load_adapter": "formats",
        "open_pipeline": "opening",
        "read_adapter": "formats",
        "remove_adapter": "adapter",
        "save_adapter": "formats",
        "set_adapters": "adapter",
        "train": "train",
    },
)

del TYPE_CHECKING  # no name of ours
